"""What a strategy is told of an update's noise: its standard deviation, kept through restarts, or a refusal."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.gaussian import UNITS
from fedloom.core.schema import LORA
from fedloom.server.build import build_strategy
from fedloom.server.rounds.state import UpdateAccepted, event_from_json, event_to_json
from fedloom.server.rounds.update_norm import noise_std
from fedloom.server.storage.local import Store
from fedloom.server.validate_config import check_config
from fedloom.strategies.alternating.as_lora import ASLoRA
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.transforms.average import Average, Sum, select
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.schedule import Schedule
from tests.server.conftest import SCHEMA, Federation, config


@dataclass(frozen=True)
class Reading(Average):
    """Notes what it is told of noise."""

    traits = Traits(reads_noise=True)
    seen: list[tuple[str, float]] = field(default_factory=list)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        self.seen.append((update.client, update.noise_std))
        return super().fold(state, acc, update)


def private(**train: object) -> RunConfig:
    known: dict[str, object] = {"steps": 9, "sampling_rate": 0.1, "learning_rate": 2.0}
    return config(3, privacy={"noise_multiplier": 0.7, "clip_norm": 0.5}, train={**known, **train})


def test_it_is_that_of_the_sum_of_the_steps() -> None:
    """Rate 2, 9 steps, 0.7 times 0.5 over an expected batch of 20."""
    assert noise_std(private(), 0, {}, 200) == pytest.approx(2 * 3 * 0.7 * 0.5 / 20)
    assert noise_std(private(), 0, {"learning_rate": 0.5}, 200) == pytest.approx(0.5 * 3 * 0.7 * 0.5 / 20)
    linear = private(schedule="linear")
    assert noise_std(linear, 2, {}, 200) == pytest.approx(noise_std(linear, 0, {}, 200) / 3)
    assert noise_std(config(3, privacy={"enabled": False}), 0, {}, 200) == 0
    # The definition, by draws of nine steps: 30,000 values, a standard error of 0.4 %.
    steps = Seeded(4).normal(UNITS, 270_000).reshape(9, -1) / UNITS * 0.7 * 0.5 / 20
    assert float(np.std(2.0 * steps.sum(0))) == pytest.approx(noise_std(private(), 0, {}, 200), rel=0.02)


@pytest.mark.parametrize(("ema", "momentum"), [(0.5, 0.0), (0.9, 0.0), (0.7, 0.8)])
def test_it_is_that_of_the_mean_of_the_iterates(ema: float, momentum: float) -> None:
    """By draws of nine steps, each followed and averaged as it is defined."""
    noise = Seeded(5).normal(UNITS, 270_000).reshape(9, -1) / UNITS * 0.7 * 0.5 / 20
    value = velocity = mean = np.zeros(noise.shape[1])
    for step in noise:
        velocity = momentum * velocity + step
        value = value - 2.0 * velocity
        mean = ema * mean + (1 - ema) * value

    found = noise_std(private(ema=ema, momentum=momentum), 0, {}, 200)

    assert found == pytest.approx(float(np.std(mean / (1 - ema**9))), rel=0.02)


SIZES = {"ann": 200, "ben": 800, "cat": 400}


@pytest.mark.parametrize("sent", [1, 2])
def test_a_coordinator_that_comes_back_tells_the_same(tmp_path: Path, sent: int) -> None:
    """What a client declares after a restart says nothing of the update that it had sent before."""
    run = private().model_copy(update={"rounds": config(rounds={"min_clients": 3}).rounds})
    strategy, after = Reading(select(*LORA)), Reading(select(*LORA))

    def joined(store: Store, strategy: Reading, sizes: dict[str, int]) -> Federation:
        federation = Federation(store, run, strategy, expect=3)
        for client, examples in sizes.items():
            federation.join(client, examples=examples)
        for client in sizes:
            federation.work(client)
        return federation

    with Store(tmp_path / "state", durable=False) as store:
        federation = joined(store, strategy, SIZES)
        for client in list(SIZES)[:sent]:
            federation.send(*federation.update(client))
    with Store(tmp_path / "state", durable=False) as store:
        others = {client: 1 if number < sent else size for number, (client, size) in enumerate(SIZES.items())}
        federation = joined(store, after, others)
        for client in list(SIZES)[sent:]:
            federation.send(*federation.update(client))
        assert federation.coordinator.progress.round == 1

    expected = 2 * 3 * 0.7 * 0.5
    assert [client for client, _ in after.seen] == list(SIZES)
    assert [std for _, std in after.seen] == pytest.approx([expected / (0.1 * size) for size in SIZES.values()])
    assert not strategy.seen


def test_others_are_told_nothing_and_their_log_is_as_before(tmp_path: Path) -> None:
    with Store(tmp_path / "state", durable=False) as store:
        federation = Federation(store, private(), build_strategy(private()), expect=2)
        federation.begin("ann", "ben")
        federation.send(*federation.update("ann"))
        (accepted,) = [event for event in store.events() if isinstance(event, UpdateAccepted)]
    assert accepted.noise_std == 0
    assert "noise_std" not in event_to_json(accepted)
    told = UpdateAccepted(0, "ann", "d", 1.0, noise_std=0.25)
    assert event_from_json(event_to_json(told)) == told


@pytest.mark.parametrize(
    "train",
    [{"optimizer": "adam"}, {"optimizer": "spectrum"}, {"smoothing": True}, {"proximal_mu": 0.1}],
    ids=str,
)
def test_a_run_that_leaves_the_noise_open_is_refused_before_it_begins(train: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"\[train\] leaves open how far noise moves a value; set train.optimizer"):
        check_config(private(**train), ASLoRA())
    open_run = config(3, privacy={"enabled": False}, train={"steps": 9, "sampling_rate": 0.1, **train})
    check_config(open_run, ASLoRA())


@pytest.mark.parametrize("section", ["secure_aggregation", "user_level"])
def test_sums_that_hide_an_update_or_add_other_noise_are_refused(section: str) -> None:
    sections: dict[str, dict[str, object]] = {"rounds": {"min_clients": 3}, section: {"enabled": True}}
    run = config(3, **sections)

    with pytest.raises(ConfigError, match="looks at the noise of each update by itself"):
        check_config(run, ASLoRA())


def test_transforms_pass_the_trait_on_and_scale_the_noise_with_the_update() -> None:
    inner = Reading(select(*LORA))
    bound = NormBound(inner, 0.5)
    assert bound.traits.reads_noise
    assert Schedule((Average(select()), inner), turn=lambda commits: commits % 2).traits.reads_noise
    state = inner.init(SCHEMA, SCHEMA.zeros(), 0)
    ones = {spec.name: np.ones(spec.shape, np.float32) for spec in SCHEMA.tensors}
    length = float(np.sqrt(SCHEMA.size))

    bound.fold(state, None, Update("ann", 1.0, SCHEMA.zeros(), ones, noise_std=0.2))

    assert [std for _, std in inner.seen] == pytest.approx([0.2 * 0.5 / length])
