"""Pictures: folders of them, their identity, and the numbers a vision model reads."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fedloom.client.data.files import Row
from fedloom.proto.errors import DataError, ModelError

__all__ = [
    "SUFFIXES",
    "Pictures",
    "Pixels",
    "decode",
    "fingerprint",
    "folder_rows",
    "noise_picture",
    "picture_settings",
]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Ends of the names of picture files."""

# Named, so that no other of Pillow's readers, some of which start programs, is tried on a file.
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")

_MOST_PIXELS = 50_000_000

Pixels = npt.NDArray[np.uint8]


def folder_rows(folder: Path, image: str, label: str) -> Iterator[Row]:
    """A row for each picture in the folders below `folder`, whose names are the labels.

    Args:
        folder: CLASS/PICTURE below it; files of other kinds and hidden ones are passed over.
        image: Name of the row's column for the picture's bytes.
        label: Name of its column for the class.
    """
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(group.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                try:
                    yield str(path), {image: path.read_bytes(), label: group.name}
                except OSError as error:
                    yield str(path), DataError(f"{path} cannot be read: {error.strerror}; check its permissions")


def decode(data: bytes, where: str) -> Image.Image:
    """The picture in RGB, turned as its camera noted.

    Raises:
        DataError: It is no picture of a known format, is cut off, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limits are looser than the one below
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise DataError(f"{where} has over {_MOST_PIXELS:,} pixels; make it smaller")
                return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where} cannot be read as a picture; write it again as one of {', '.join(_FORMATS)}, or remove it"
        ) from error


def fingerprint(data: bytes, where: str) -> str:
    """What stands for a picture in the privacy account: its size and the SHA-256 of its pixels.

    Equal pictures in files of different formats are one.

    Raises:
        DataError: It cannot be decoded.
    """
    picture = decode(data, where)
    return f"picture {picture.width}x{picture.height} {hashlib.sha256(picture.tobytes()).hexdigest()}"


def noise_picture(seed: int) -> bytes:
    """A file of 32 by 32 random pixels, for checks that must not touch real data."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Pictures:
    """How a model's pictures are prepared.

    Args:
        side: Height and width in pixels that the model gets.
        resized: Length that the shorter side is brought to before the middle is cut out; 0 brings both sides to `side`.
        mean: Of each channel, on a scale from 0 to 1.
        deviation: Likewise.
        resample: Pillow's number of the way to interpolate.
    """

    side: int
    resized: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    resample: int

    pad_token_id = 0
    """Pictures of one model have one size, so nothing is padded; collating asks all the same."""

    def pixels(self, data: bytes, where: str) -> Pixels:
        """The picture's pixels, uint8, shape (3, side, side)."""
        picture, side = decode(data, where), self.side
        if self.resized:
            # What is cut off anyway is cut off first: the rest of a long stripe would grow to gigabytes on its way.
            most = 8 * min(picture.size)
            wide, high = (min(length, most) for length in picture.size)
            left, top = (picture.width - wide) // 2, (picture.height - high) // 2
            picture = picture.crop((left, top, left + wide, top + high))
            scale = self.resized / min(picture.size)
            wide, high = (max(side, round(length * scale)) for length in picture.size)
            left, top = (wide - side) // 2, (high - side) // 2
            picture = picture.resize((wide, high), self.resample).crop((left, top, left + side, top + side))
        elif picture.size != (side, side):
            picture = picture.resize((side, side), self.resample)
        return np.ascontiguousarray(np.asarray(picture, np.uint8).transpose(2, 0, 1))

    def normalised(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """What the model reads, float32, shape (n, 3, side, side), from pixels of that shape."""
        mean, deviation = (np.array(each, np.float32).reshape(3, 1, 1) for each in (self.mean, self.deviation))
        scaled: npt.NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
        return scaled


def picture_settings(folder: Path, image_size: int | None) -> Pictures:
    """How the base model in `folder` wants its pictures, from its preprocessor_config.json and config.json.

    Args:
        folder: The base model.
        image_size: Side in pixels that the run asks for; None is the model's own.

    Raises:
        ModelError: The files name no size, or cannot be read.
    """
    try:
        path = folder / "preprocessor_config.json"
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        asked = settings.get("size") or config["image_size"]
        size: dict[str, int] = asked if isinstance(asked, dict) else {"height": asked}
        shortest = size.get("shortest_edge", 0)
        cut = settings.get("crop_size") if settings.get("do_center_crop") else None
        cut = cut.get("height") if isinstance(cut, dict) else cut
        own = int(cut or size.get("height") or shortest)
        side = image_size or own
        resized = round(shortest * side / own) if shortest else 0
        mean, deviation = (tuple(settings.get(f"image_{name}") or (0.5,) * 3) for name in ("mean", "std"))
        if side < 1 or len(mean) != 3 or len(deviation) != 3 or not all(deviation):
            raise ValueError("sizes and spreads must be above zero, one for each of three channels")
        return Pictures(side, resized, mean, deviation, int(settings.get("resample", Image.Resampling.BILINEAR)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} does not say how large its pictures are ({error!r}); give it a preprocessor_config.json with "
            "size, image_mean and image_std, as save_pretrained writes it"
        ) from error
