"""Per-example losses against naive loops and against Hugging Face's own loss of one example."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedloom.client.data.rows import IGNORED, Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.training.losses import per_example

Build = Callable[..., AdapterModel]

TEXTS = ("the good film", "a very bad plot and a sad actor", "great", "poor awful plot")
ROWS = {
    "text-classification": Rows(TEXTS, np.array([0, 2, 1, 1]), ("",) * 4, ("O", "PER", "LOC")),
    "token-classification": Rows(
        TEXTS,
        np.zeros(4, np.int64),
        ("",) * 4,
        ("O", "PER", "LOC"),
        "token-classification",
        words=tuple(tuple(text.split()) for text in TEXTS),
        tags=tuple(np.arange(len(text.split())) % 3 for text in TEXTS),
    ),
    "causal-lm": Rows(
        TEXTS, np.zeros(4, np.int64), ("",) * 4, (), "causal-lm", prompts=("the ", "a very bad", "", "poor ")
    ),
}


def of(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scores and, of (batch, length), labels of which about a third are missing."""
    batch, length, classes = shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.35] = IGNORED
    return 3 * torch.randn(shape, generator=generator), labels


@given(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)), st.integers(0, 2**31))
def test_the_loss_is_the_mean_over_the_examples_own_labels(shape: tuple[int, int, int], seed: int) -> None:
    scores, labels = of(shape, seed)

    found = per_example(scores, labels)

    for row in range(shape[0]):
        own = [
            float(torch.logsumexp(scores[row, t], 0) - scores[row, t, labels[row, t]])
            for t in range(shape[1])
            if labels[row, t] != IGNORED
        ]
        assert float(found[row]) == pytest.approx(sum(own) / max(1, len(own)), rel=1e-5, abs=1e-6)


def test_one_label_a_row_is_plain_cross_entropy() -> None:
    scores, labels = of((6, 1, 4), 0)
    labels[labels == IGNORED] = 0

    found = per_example(scores[:, 0], labels[:, 0])

    torch.testing.assert_close(found, F.cross_entropy(scores[:, 0], labels[:, 0], reduction="none"))


@given(st.integers(0, 2**31))
def test_an_examples_loss_has_no_gradient_in_another_example(seed: int) -> None:
    scores, labels = of((3, 4, 3), seed)
    scores.requires_grad_(True)

    for row, loss in enumerate(per_example(scores, labels)):
        (gradient,) = torch.autograd.grad(loss, scores, retain_graph=True)

        others = [other for other in range(3) if other != row]
        assert not gradient[others].any()


@pytest.mark.parametrize("length", [0, 1, 5])
def test_an_example_without_labels_has_no_loss_and_a_zero_gradient(length: int) -> None:
    scores, labels = of((2, length, 3), 1)
    labels[:] = IGNORED
    scores.requires_grad_(True)

    loss = per_example(scores, labels)
    loss.sum().backward()  # type: ignore[no-untyped-call]  # torch's

    assert loss.tolist() == [0.0, 0.0]
    assert scores.grad is not None
    assert not scores.grad.any()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("bert", "text-classification"),
        ("bert", "token-classification"),
        ("gpt2", "token-classification"),
        ("gpt2", "causal-lm"),
        ("llama", "causal-lm"),
    ],
)
def test_alone_it_is_hugging_faces_loss_and_together_it_is_not_their_mean(
    architecture: str, task: str, build_task: Build
) -> None:
    model = build_task(architecture, task)
    encoded, pad = encode(ROWS[task], model.tokenizer, 24), model.tokenizer.pad_token_id
    together = collate(encoded, np.arange(4), pad)

    def theirs(batch: dict[str, torch.Tensor]) -> float:
        labels = batch["labels"]
        if task == "causal-lm":  # they shift, we have shifted
            labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, :-1]], 1)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return float(model.model(**inputs, labels=labels).loss)

    with torch.no_grad():
        found = per_example(model.logits(together), together["labels"])

    for row in range(4):
        assert float(found[row]) == pytest.approx(theirs(collate(encoded, np.array([row]), pad)), rel=1e-4)
    if task != "text-classification":
        # Theirs weighs every token of the batch the same, so a long example shrinks the others' part.
        assert abs(float(found.mean()) - theirs(together)) > 1e-3
