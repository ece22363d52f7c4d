"""Pictures of clothes."""

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.records import Record
from fedloom.core.errors import DataError

__all__ = ["FashionMNIST"]

_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CLOTHES_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class FashionMNIST:
    """Pictures of clothes, 28 by 28 grey pixels, ten classes (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747)."""

    task: ClassVar[str] = "image-classification"

    def records(self, split: Split) -> Iterator[Record]:
        """Rows of one pair of files.

        Raises:
            DataError: The system package is not installed, or damaged.
        """
        from PIL import Image  # listing this source takes no picture library

        stem = "train" if split == "train" else "t10k"
        images = _idx(_CLOTHES_FOLDER / f"{stem}-images-idx3-ubyte.gz", 3)
        labels = _idx(_CLOTHES_FOLDER / f"{stem}-labels-idx1-ubyte.gz", 1)
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True), 1):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "BMP")
            yield Record(f"fashion-mnist {split} {number}", "", _CLOTHES[label], image=file.getvalue())


def _idx(path: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of an IDX file: a magic number, a size for each dimension, all big-endian, and the values."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, ">u4", 1 + dimensions)
        return np.frombuffer(content, np.uint8, offset=4 * len(sizes)).reshape(tuple(int(size) for size in sizes[1:]))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read; install the package dataset-fashion-mnist of Debian or Ubuntu, or copy its files "
            "there"
        ) from error
