"""Pictures: their identity, and the numbers a vision model reads."""

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fedloom.core.errors import DataError, ModelError

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "ImageProcessor",
    "Pixels",
    "brightest",
    "decode",
    "fingerprint",
    "noise_picture",
    "picture_settings",
]

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Ends of the names of picture files, in small letters."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Named, so that no other of Pillow's readers, some of which start programs, is tried on a file."""

_MOST_PIXELS = 50_000_000

_EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
"""Pillow's modes of which nothing is lost in RGB."""

_BITS, _PHOTOMETRIC = 258, 262
"""Numbers of TIFF's tags BitsPerSample and PhotometricInterpretation; 0 of the latter says that 0 is white."""

_SEE_THROUGH = ("LA", "La", "PA", "RGBA", "RGBa")

Pixels = npt.NDArray[np.uint8]


def decode(data: bytes, where: str) -> Image.Image:
    """The picture in RGB with eight bits a colour, turned as its camera noted.

    Raises:
        DataError: It is no picture of a known format, is cut off, has too many pixels, or would lose something in RGB.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limits are looser than the one below
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise DataError(f"{where} has over {_MOST_PIXELS:,} pixels; make it smaller")
                # What a phone keeps behind a JPEG, a depth or a thumbnail, is no second picture.
                frames: int = getattr(picture, "n_frames", 1)
                if frames > 1 and picture.format != "MPO":
                    raise DataError(
                        f"{where} has {frames} frames or pages, and one picture is needed; save each that "
                        "counts as a file of its own"
                    )
                return _eight_bits(picture, ImageOps.exif_transpose(picture), where).convert("RGB")
    except DataError:
        raise
    except Exception as error:  # whatever a reader of formats makes of bytes that are none
        raise DataError(
            f"{where} cannot be read as a picture; write it again as one of {', '.join(FORMATS)}, or remove it"
        ) from error


def _eight_bits(file: Image.Image, picture: Image.Image, where: str) -> Image.Image:
    """The picture of a file in a mode whose conversion to RGB loses nothing that can be seen.

    Pillow's own conversion clips grey values of more than eight bits: of an X-ray it would leave a white sheet.

    Raises:
        DataError: There is none.
    """
    if picture.mode in _SEE_THROUGH or "transparency" in picture.info:
        _check_opaque(picture, where)
        return picture
    if picture.mode in _EIGHT_BITS:
        return picture
    if not picture.mode.startswith("I;16"):
        raise DataError(
            f"{where} has pixels of a kind (Pillow's mode {picture.mode}) that does not say which value is white; save "
            "it with 8 or 16 whole bits a pixel, from black at 0 to white at the greatest value"
        )
    tags = getattr(file, "tag_v2", {})
    values = np.asarray(picture).astype(np.uint16) >> (tags.get(_BITS, (16,))[0] - 8)
    return Image.fromarray((255 - values if tags.get(_PHOTOMETRIC) == 0 else values).astype(np.uint8))


def brightest(data: bytes) -> int | None:
    """The greatest value in a file of 16 whole bits a pixel, of 65535 for white; None of every other picture.

    Scanners and detectors write 12 bits into 16 without saying so: 4095 is then their white, and read as nearly black.
    One picture does not tell that from a dark one, all of a site do.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        tags = getattr(picture, "tag_v2", {})
        if not picture.mode.startswith("I;16") or tags.get(_BITS, (16,))[0] != 16 or tags.get(_PHOTOMETRIC) == 0:
            return None
        return int(np.asarray(picture).astype(np.uint16).max())


def _check_opaque(picture: Image.Image, where: str) -> None:
    """Refuse a picture that one can look through: what is seen there is the background's business.

    Raises:
        DataError: It is one.
    """
    least, _ = picture.convert("RGBA").getchannel("A").getextrema()
    if least != 255:
        raise DataError(
            f"{where} is transparent in parts, which have no colour; save it on a background, without alpha"
        )


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
class ImageProcessor:
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

    def prepared(self, data: bytes, where: str) -> Pixels:
        """What of a picture is kept: its pixels."""
        return self.pixels(data, where)

    def inputs(self, prepared: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """What the model reads: pixel_values, shape (n, 3, side, side)."""
        chosen = np.array(prepared, np.uint8).reshape(-1, 3, self.side, self.side)
        return {"pixel_values": self.normalised(chosen)}

    def drawn(self, generator: np.random.Generator) -> npt.NDArray[Any]:
        """Random pixels, as `prepared` leaves them."""
        return generator.integers(256, size=(3, self.side, self.side), dtype=np.uint8)

    def normalised(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """What the model reads, float32, shape (n, 3, side, side), from pixels of that shape."""
        mean, deviation = (np.array(each, np.float32).reshape(3, 1, 1) for each in (self.mean, self.deviation))
        scaled: npt.NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
        return scaled

    def save_pretrained(self, folder: str) -> None:
        """Write preprocessor_config.json, which `picture_settings` and transformers' AutoImageProcessor read."""
        square = {"height": self.side, "width": self.side}
        size: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": square}
        if self.resized:
            size = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": self.resized}}
            size |= {"do_center_crop": True, "crop_size": square}
        steps = {"do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True}
        numbers = {"image_mean": self.mean, "image_std": self.deviation, "resample": self.resample}
        document = {**size, **steps, **numbers, "rescale_factor": 1 / 255}
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def picture_settings(folder: Path, image_size: int | None) -> ImageProcessor:
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
        return ImageProcessor(side, resized, mean, deviation, int(settings.get("resample", Image.Resampling.BILINEAR)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} does not say how large its pictures are ({error!r}); give it a preprocessor_config.json with "
            "size, image_mean and image_std, as save_pretrained writes it"
        ) from error
