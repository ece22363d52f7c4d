"""Noise and private steps on a CUDA device, held against the CPU's and against published figures."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode, uniform_microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.attacks import LIMIT, dependence, rehearse
from fedloom.client.privacy.dp_sgd import noise as module
from fedloom.client.privacy.dp_sgd.chacha import blocks, words
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.noise import check_device, noise, rounded_normal
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded, System
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.gradients import batch_loss
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.privacy import gaussian
from fedloom.core.privacy.gaussian import LARGEST_DEVIATION, UNITS
from tests.client.rounds import assignment, start
from tests.support.ciphers import PUBLISHED, known_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("section", PUBLISHED)
def test_the_stream_is_the_published_one(section: str) -> None:
    key, counter, nonce, digits = PUBLISHED[section]
    expected, sent = bytes.fromhex(digits), bytes.fromhex(nonce)
    first = counter | int.from_bytes(sent[:4], "little") << 32

    found = blocks(key, first, -(-len(expected) // 64), CUDA, sent[4:])

    assert found.cpu().numpy().tobytes()[: len(expected)] == expected


def test_the_stream_is_another_implementations() -> None:
    key, first = bytes(range(7, 39)), (1 << 32) - 5

    assert blocks(key, first, 10_000, CUDA).cpu().numpy().tobytes() == known_stream(key, first, 10_000)


@pytest.mark.parametrize("deviation", [1, 1000, UNITS, LARGEST_DEVIATION])
def test_it_draws_the_integers_of_the_cpu(deviation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1 << 17)
    for key in (bytes(32), bytes(range(32))):
        there, here = (
            rounded_normal(partial(words, key, device=each), deviation, 300_000, each).cpu() for each in (CUDA, CPU)
        )

        assert torch.equal(there, here)


def test_what_is_open_is_decided_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "UNSURE", 2.0**-8)
    there, here = (
        rounded_normal(partial(words, bytes(32), device=each), UNITS, 3000, each).cpu() for each in (CUDA, CPU)
    )

    assert torch.equal(there, here)


def test_the_device_passes_its_check_and_its_noise_is_independent() -> None:
    check_device(CUDA)
    draws = torch.cat([noise(System(), LARGEST_DEVIATION, 1 << 16, CUDA) for _ in range(2)])

    assert draws.is_cuda
    values = draws.cpu().numpy() / LARGEST_DEVIATION
    assert dependence(values) < LIMIT
    assert values.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(values)))


def test_attacks_on_the_private_step_fail_here_too() -> None:
    rehearse(0.7, 1.0, device=CUDA)


@pytest.fixture
def cuda_model(spec: Spec, policy: Policy) -> AdapterModel:
    return load_model(spec.model, spec.adapter, policy.compute.model_copy(update={"device": "cuda"}))


def test_a_private_round_is_the_cpus(
    tiny_model: AdapterModel, cuda_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    """With the noise of the test seam, whose integers are the same."""
    deltas = []
    for model in (tiny_model, cuda_model):
        with Ledger(tmp_path / str(model.device), "sha256:" + "0" * 64) as ledger:
            trainer = Trainer(model, rows, spec, policy, ledger, entropy_for=lambda number: Seeded(7, number))
            deltas.append(trainer.train("run", assignment(), start(tiny_model)).delta)

    for name, value in deltas[0].items():
        np.testing.assert_allclose(deltas[1][name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_a_step_waits_for_the_device_once_for_its_noise(cuda_model: AdapterModel, rows: Rows, spec: Spec) -> None:
    """CUDA itself says what waits: batches, backward passes and sums do not, and a draw does once."""
    encoded = encode(rows, cuda_model.tokenizer, spec.model.max_length)
    parameters = cuda_model.trainable(cuda_model.schema.roles)
    with recording(cuda_model.model, parameters) as tape:
        base = torch.optim.SGD(parameters, lr=0.1)
        optimizer = PrivateOptimizer(base, tape, System(), noise_multiplier=1.0, clip_norm=1.0, expected_batch=40)

        def accumulate() -> None:
            for part in uniform_microbatches(np.arange(40), encoded, 16, spec.model.max_length):
                tape.begin(len(part.rows))
                batch = collate(encoded, part.rows, cuda_model.tokenizer.pad_token_id, part.length)
                torch.autograd.backward(batch_loss(cuda_model, batch))
                optimizer.accumulate(part.real)

        accumulate()  # libraries set themselves up, and the noise is checked
        optimizer.release()
        try:
            torch.cuda.set_sync_debug_mode("error")
            accumulate()
            torch.cuda.set_sync_debug_mode("warn")
            with pytest.warns(UserWarning, match="synchronizing") as waits:
                optimizer.release()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert len(waits) == 1
