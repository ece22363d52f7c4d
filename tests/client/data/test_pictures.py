"""Pictures of every mode that files come in: read as what one sees, or refused with what to do."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedloom.client.data.load import load_rows
from fedloom.client.data.media.images import decode, fingerprint
from fedloom.core.errors import DataError

GREY = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)
"""What every picture below shows."""
COLOURS = Image.fromarray(np.stack([GREY, GREY, GREY], -1))


def file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def deep(values: Any, kind: str, **options: Any) -> bytes:
    return file(Image.fromarray(values.astype(np.uint16)), kind, **options)


def twelve_bits() -> bytes:
    """A TIFF of twelve bits a pixel, which Pillow reads and does not write."""
    wide = (GREY.astype(np.uint16) << 4).reshape(-1, 2)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in wide.tolist())
    tags = [(256, 8), (257, 6), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 6), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    body = packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + body


TURNED = Image.Exif()
TURNED[0x0112] = 3

SEEN: dict[str, bytes] = {
    "8 bits": file(Image.fromarray(GREY), "PNG"),
    "colours": file(COLOURS, "PNG"),
    "BMP": file(COLOURS, "BMP"),
    "16 bits, PNG": deep(GREY * np.uint16(257), "PNG"),
    "16 bits, times 256": deep(GREY * np.uint16(256), "PNG"),
    "16 bits, TIFF": deep(GREY * np.uint16(257), "TIFF"),
    "16 bits, zero is white": deep(65535 - GREY * np.uint16(257), "TIFF", tiffinfo={262: 0}),
    "16 bits, turned": deep(np.rot90(GREY, 2) * np.uint16(257), "PNG", exif=TURNED),
    "12 bits": twelve_bits(),
    "palette": file(Image.fromarray(GREY).convert("P"), "PNG"),
    "CMYK": file(COLOURS.convert("CMYK"), "TIFF"),
    "opaque": file(COLOURS.convert("RGBA"), "PNG"),
    "grey and opaque": file(Image.fromarray(GREY).convert("LA"), "PNG"),
    "turned": file(COLOURS.rotate(180), "PNG", exif=TURNED),
    "turned TIFF": file(COLOURS.rotate(180), "TIFF", tiffinfo={0x0112: 3}),
    "end mark lost": file(COLOURS, "PNG")[:-12],
}


@pytest.mark.parametrize("name", SEEN)
def test_a_picture_is_read_as_what_one_sees(name: str) -> None:
    pixels = np.asarray(decode(SEEN[name], name))

    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], GREY)
    assert fingerprint(SEEN[name], name) == fingerprint(SEEN["8 bits"], "8 bits")


def test_lossy_colours_of_printing_are_near(tmp_path: Path) -> None:
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB").convert("CMYK")

    read = np.asarray(decode(file(smooth, "JPEG", quality=100), "a"), int)

    assert np.abs(read - np.asarray(smooth.convert("RGB"), int)).max() < 8


def test_pictures_of_16_bits_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    """Clipped, all of one size were one white sheet, and one entry of the privacy account."""
    for number, label in enumerate(("left", "right")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(deep((GREY + np.uint8(number)) * np.uint16(257), "PNG"))

    rows = load_rows(str(tmp_path), ("left", "right"), "train", "image-classification")

    assert len(set(rows.texts)) == 2


def with_hole() -> Image.Image:
    picture = COLOURS.convert("RGBA")
    picture.putpixel((0, 0), (1, 2, 3, 128))
    return picture


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", COLOURS.size)]}
LONG = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8))

REFUSED: dict[str, tuple[bytes, str]] = {
    "float": (file(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), "mode F.*8 or 16 whole bits"),
    "32 bits": (file(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "mode I.*8 or 16 whole bits"),
    "LAB": (file(Image.new("LAB", (4, 4)), "TIFF"), "mode LAB"),
    "a hole": (file(with_hole(), "PNG"), "transparent in parts.*save it on a background"),
    "a hole in WebP": (file(with_hole(), "WEBP", lossless=True), "transparent in parts"),
    "a colour that is none": (file(Image.fromarray(GREY), "PNG", transparency=5), "transparent in parts"),
    "a palette entry that is none": (
        file(Image.fromarray(GREY).convert("P"), "PNG", transparency=0),
        "transparent in parts",
    ),
    "16 bits with a hole": (deep(GREY * np.uint16(257), "PNG", transparency=0), "transparent in parts"),
    "animated PNG": (file(COLOURS, "PNG", **FRAMES), "2 frames or pages"),
    "animated WebP": (file(COLOURS, "WEBP", **FRAMES), "2 frames or pages"),
    "pages": (file(COLOURS, "TIFF", **FRAMES), "2 frames or pages.*save each"),
    "GIF": (file(COLOURS, "GIF"), "cannot be read as a picture; write it again as one of"),
    **{
        f"cut {kind}": (file(LONG, kind)[:-100], "cannot be read as a picture")
        for kind in ("PNG", "JPEG", "TIFF", "BMP")
    },
    "cut WEBP": (file(LONG, "WEBP")[:-100], "cannot be read as a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_would_lose_something_is_refused(name: str) -> None:
    data, message = REFUSED[name]

    with pytest.raises(DataError, match=f"^the picture .*{message}"):
        decode(data, "the picture")


def test_what_a_phone_keeps_behind_a_jpeg_is_no_second_picture() -> None:
    picture = decode(file(COLOURS, "MPO", **FRAMES), "a")

    assert np.abs(np.asarray(picture, int)[..., 0] - GREY).mean() < 8
