"""What one example adds to a private step is its own to the last bit, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import Encoded, collate, encode, uniform_microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.training.losses import per_example
from tests.client.rounds import ALL, start

LONGEST = 16


def summed(model: AdapterModel, encoded: Encoded, chosen: list[int], size: int) -> torch.Tensor:
    """The clipped sum of a step over these rows in steps of the grid, shape (P,), int64."""
    parameters = model.trainable(ALL)
    with recording(model.model, parameters) as tape:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters), tape, Seeded(0), noise_multiplier=0.0, clip_norm=0.1, expected_batch=1.0
        )
        for part in uniform_microbatches(np.array(chosen, np.int64), encoded, size, LONGEST):
            batch = collate(encoded, part.rows, model.tokenizer.pad_token_id, part.length)
            tape.begin(len(part.rows))
            torch.autograd.backward(per_example(model.logits(batch), batch["labels"]).sum())
            optimizer.accumulate(part.real)
        return optimizer._total.clone()


@pytest.mark.parametrize(("size", "added"), [(8, 0), (64, 23)])
def test_an_example_more_adds_the_same_whole_numbers_to_every_batch(
    tiny_model: AdapterModel, rows: Rows, size: int, added: int
) -> None:
    tiny_model.load(start(tiny_model))
    encoded = encode(rows, tiny_model.tokenizer, LONGEST)
    alone = summed(tiny_model, encoded, [added], size)
    others = [each for each in range(len(rows)) if each != added]

    for count in (1, 9, len(others)):
        batch = others[:count]
        more = summed(tiny_model, encoded, [*batch, added], size) - summed(tiny_model, encoded, batch, size)
        torch.testing.assert_close(more, alone, rtol=0, atol=0)


lengths = st.lists(st.integers(1, 40), max_size=60)


@given(lengths, st.integers(1, 40), st.sampled_from([40, 48, 512]))
def test_the_shape_of_a_microbatch_is_its_rows_own(tokens: list[int], size: int, longest: int) -> None:
    encoded = Encoded(tuple(np.ones(each, np.int32) for each in tokens), np.zeros(len(tokens), np.int64))

    parts = list(uniform_microbatches(np.arange(len(tokens)), encoded, size, longest))

    assert sorted(int(row) for part in parts for row in part.rows[: part.real]) == list(range(len(tokens)))
    for part in parts:
        assert 1 <= part.real <= len(part.rows) <= size
        assert len(part.rows) % min(8, size) == 0
        for row in part.rows:
            own = min(longest, max(8, 1 << (tokens[row] - 1).bit_length()))
            assert part.length == own >= tokens[row]


def test_pictures_are_of_one_size_and_an_empty_batch_has_no_part() -> None:
    pictures = Encoded((), np.zeros(11, np.int64))

    assert [
        (len(each.rows), each.real, each.length) for each in uniform_microbatches(np.arange(11), pictures, 64, 8)
    ] == [(16, 11, None)]
    assert list(uniform_microbatches(np.arange(0), pictures, 64, 8)) == []


def test_what_fills_a_microbatch_up_adds_nothing(tiny_model: AdapterModel, rows: Rows) -> None:
    encoded = encode(rows, tiny_model.tokenizer, LONGEST)
    tiny_model.load(start(tiny_model))

    total = sum(summed(tiny_model, encoded, [each], 8) for each in range(5))

    torch.testing.assert_close(summed(tiny_model, encoded, list(range(5)), 8), total, rtol=0, atol=0)
