"""A round that hands over the mean of its iterates."""

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.optimizers.adam import Adam
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import CheckCancelled
from fedloom.client.training.averaging import averaged
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.schema import Array
from tests.client.rounds import assignment, changed, start


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_it_is_the_weighted_mean_of_the_values_after_each_step(decay: float) -> None:
    """On gradients that do not depend on the values: w_t = -t r g, so the mean has a closed form."""
    value, gradient, steps = nn.Parameter(torch.full((3,), 2.0)), torch.tensor([1.0, 0.0, -4.0]), 7
    optimizer = torch.optim.SGD([value], lr=0.1)

    with averaged(optimizer, [value], decay):
        for _ in range(steps):
            value.grad = gradient.clone()
            optimizer.step()
        assert torch.allclose(value, 2 - 0.1 * steps * gradient), "steps go on from the last values"

    weights = decay ** np.arange(steps - 1, -1, -1)
    mean = np.sum(weights * np.arange(1, steps + 1)) / np.sum(weights)
    np.testing.assert_allclose(value.detach().numpy(), 2 - 0.1 * mean * gradient.numpy(), rtol=1e-6)
    assert value[1] == 2.0, "what does not move stays"


def test_an_optimizer_of_our_own_is_averaged_too() -> None:
    ends = []
    for decay in (0.0, 0.9):
        value = nn.Parameter(torch.zeros(3))
        optimizer = Adam().make([{"params": [value], "lr": 0.1}], 0.0)
        with averaged(optimizer, [value], decay):
            for _ in range(5):
                value.grad = torch.ones(3)
                optimizer.step()
        ends.append(float(value[0].detach()))

    assert ends[0] < ends[1] < 0


def test_no_step_leaves_the_start() -> None:
    value = nn.Parameter(torch.ones(2))

    with averaged(torch.optim.SGD([value], lr=1.0), [value], 0.9):
        pass

    assert torch.equal(value, torch.ones(2))


def test_a_round_that_is_cancelled_leaves_no_hook() -> None:
    value = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([value], lr=1.0)

    with pytest.raises(KeyError), averaged(optimizer, [value], 0.9):
        raise KeyError

    value.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(value, torch.zeros(2))
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("private", [True, False])
def test_a_round_sends_the_mean_of_its_iterates(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, plain: Spec, policy: Policy, ledger: Ledger
) -> None:
    """Of those that the same round without averaging goes through, read before each step and after the last."""
    values, steps, decay = start(tiny_model), 4, 0.6
    run = changed(spec if private else plain, train={"steps": steps, "sampling_rate": 0.5})
    seen: list[dict[str, Array]] = []

    def delta(ema: float, watch: CheckCancelled) -> dict[str, Array]:
        chosen, account = changed(run, train={"ema": ema}), ledger if private else None
        trainer = Trainer(tiny_model, rows, chosen, policy, account, entropy_for=lambda _: Seeded(5))
        return dict(trainer.train("run", assignment(), values, watch).delta)

    last = delta(0.0, lambda: seen.append(tiny_model.read(tiny_model.schema)))
    mean = delta(decay, lambda: None)

    weights = decay ** np.arange(steps - 1, -1, -1)
    for name, value in mean.items():
        iterates = [each[name] - values[name] for each in seen[1:]] + [last[name]]
        expected = np.tensordot(weights / weights.sum(), np.array(iterates), 1)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        assert np.abs(value - last[name]).max() > 1e-4
