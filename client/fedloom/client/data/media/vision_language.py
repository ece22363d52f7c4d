"""Pictures with a text beside them, as a vision-language model reads both."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedloom.client.data.media.images import decode
from fedloom.client.data.media.with_tokenizer import WithTokenizer
from fedloom.core.errors import ModelError

__all__ = ["VisionLanguageReader", "vision_language_reader"]

_SIDE = 64
"""Pixels of a made-up picture."""


@dataclass(frozen=True)
class VisionLanguageReader(WithTokenizer):
    """How a model's pictures and texts are prepared: by transformers' processor, one picture before each text.

    Args:
        tokenizer: The model's; what it has is found here too.
        processor: The same model's.
    """

    processor: Any

    def save_pretrained(self, folder: str) -> None:
        """Write the files that transformers reads the processor from."""
        self.processor.save_pretrained(folder)

    @cached_property
    def prefix(self) -> npt.NDArray[np.int32]:
        """Ids of what stands before a text: the places of the picture, and what begins every text."""
        blank = Image.new("RGB", (_SIDE, _SIDE))
        found = self.processor(images=blank, text=self.processor.image_token, return_tensors="np")["input_ids"][0]
        ids = np.asarray(found, np.int32)
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def prepared(self, data: bytes, where: str) -> npt.NDArray[Any]:
        """The picture's values as the model reads them, float32, shape (channels, height, width)."""
        return self._values(decode(data, where))

    def _values(self, picture: Image.Image) -> npt.NDArray[Any]:
        found = self.processor.image_processor(images=picture, return_tensors="np")["pixel_values"]
        return np.asarray(found[0], np.float32)

    def inputs(self, prepared: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """What the model reads beside the text: pixel_values, shape (n, channels, height, width)."""
        return {"pixel_values": np.stack(prepared)}

    def drawn(self, generator: np.random.Generator) -> npt.NDArray[Any]:
        """A picture of noise, as `prepared` leaves one."""
        noise = generator.integers(256, size=(_SIDE, _SIDE, 3), dtype=np.uint8)
        return self._values(Image.fromarray(noise))


def vision_language_reader(folder: Path) -> VisionLanguageReader:
    """How the base model in `folder` wants its pictures and texts.

    Raises:
        ModelError: It has no processor that can be used, or one that brings pictures to different shapes.
    """
    from transformers import AutoProcessor

    from fedloom.client.models.loading_context import LOCAL_ONLY
    from fedloom.client.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    try:
        reader = VisionLanguageReader(tokenizer, AutoProcessor.from_pretrained(folder, **LOCAL_ONLY))
        shapes = {reader._values(Image.new("RGB", size)).shape for size in ((64, 64), (90, 40), (40, 90))}
        if len(reader.prefix) == 0:
            raise ValueError("it gives a picture no token")
    except Exception as error:  # whatever another's code makes of another's files
        raise ModelError(
            f"{folder} does not say how pictures and texts are read together ({type(error).__name__}: {error}); it "
            "needs a processor whose pictures take places in the text, as LLaVA has"
        ) from error
    if len(shapes) > 1 or len(shapes.pop()) != 3:
        raise ModelError(
            f"the processor in {folder} cuts a picture into several, or leaves it its own shape; pictures of one shape "
            "are needed: set do_image_splitting = false and a fixed size in its preprocessor_config.json"
        )
    return reader
