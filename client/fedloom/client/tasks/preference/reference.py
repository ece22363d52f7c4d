"""What the base model says of answers before anything is trained."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fedloom.client.data.tokens import Encoded
    from fedloom.client.models.adapter_model import AdapterModel

__all__ = ["reference_scores"]

_TOGETHER = 8


def reference_scores(model: "AdapterModel", encoded: "Encoded") -> npt.NDArray[Any]:
    """What `Task.scores` says of each row with the model as it is.

    A row is read in a shape that depends on itself alone, so that no other row changes what is found for it.

    Returns:
        float32, shape (n, outputs).
    """
    import torch

    from fedloom.client.data.tokens import collate, uniform_microbatches

    if len(encoded) == 0:
        return np.zeros((0, encoded.sequences), np.float32)
    rows = np.arange(len(encoded), dtype=np.int64)
    longest = max(encoded.length(int(row)) for row in rows)
    found: dict[int, npt.NDArray[Any]] = {}
    with torch.inference_mode():
        for part in uniform_microbatches(rows, encoded, _TOGETHER, 1 << (longest - 1).bit_length()):
            scores = model.logits(collate(encoded, part.rows, model.tokenizer.pad_token_id, part.length))
            found |= zip(part.rows[: part.real].tolist(), scores.cpu().numpy(), strict=False)
    return np.stack([found[int(row)] for row in rows])
