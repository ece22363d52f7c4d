"""Tasks and adapters whose classes are defined where they are used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

import fedloom.api as fl
from fedloom.client.adapters.api import Host
from fedloom.client.adapters.lora import LoRA, with_pairs
from fedloom.client.component_policy import ComponentsPolicy, component_problems
from fedloom.core.codecs import codec
from fedloom.core.codecs.dense import FP32
from fedloom.core.config.run import ModelSection
from fedloom.core.errors import CodecError, ConfigError, ModelError
from fedloom.core.registry import entries, load, locally
from tests.api.conftest import LABELS, same

Make = Callable[..., fl.Run]
Go = Callable[..., fl.Result]


class Sentiment(fl.TextClassification):
    """Text classification under another name."""


class Smoothed(fl.TextClassification):
    """Cross-entropy with smoothed labels."""

    smoothing: float = 0.2
    """Share of a label that goes to all classes alike."""

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores, labels, reduction="none", label_smoothing=self.smoothing)


class Mean(fl.TextClassification):
    """The mean over the batch, as scripts write it."""

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores, labels)


class Balanced(fl.TextClassification):
    """Weights by how often a label is in the batch."""

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        share = torch.bincount(labels, minlength=2)[labels] / len(labels)
        return torch.nn.functional.cross_entropy(scores, labels, reduction="none") / share


class Contrast(fl.TextClassification):
    """The batch's other examples are what an example is told from."""

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores @ scores.T, torch.arange(len(scores)), reduction="none")


class Queries(LoRA):
    """Pairs on the queries alone."""

    def attach(self, host: Host) -> PeftModel:
        return with_pairs(host, ("query",), self.rank, self.alpha)


class Hollow(fl.Model):
    """A section that is no component."""


def test_a_local_task_works_without_being_packaged(tiny_run: Make, go: Go) -> None:
    theirs = go(tiny_run())
    ours = go(tiny_run(task=Sentiment(labels=LABELS, max_length=16)))
    other = go(tiny_run(task=Smoothed(labels=LABELS, max_length=16, smoothing=0.5)))

    assert same(ours.folder / "adapter", theirs.folder / "adapter")
    assert not same(other.folder / "adapter", theirs.folder / "adapter")
    assert 'task = "Smoothed"' in (other.folder / "run.toml").read_text()
    assert isinstance(other.adapter, PeftModel), "it loads outside of the run too"


@pytest.mark.parametrize("privacy", [None, fl.DP(noise_multiplier=1.0, epsilon=50)])
def test_a_loss_that_is_no_number_for_each_example_is_refused(tiny_run: Make, go: Go, privacy: fl.DP | None) -> None:
    with pytest.raises(ModelError, match=r"Mean\.loss gives shape \(\) for a batch of \d+; return one number for each"):
        go(tiny_run(task=Mean(labels=LABELS, max_length=16), privacy=privacy))


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Balanced, r"an example's gradient is not the one it has alone \([\d.]+; at most 0.01"),
        (Contrast, "an example alone has a gradient of norm 0; use a loss that does not compare the examples"),
    ],
)
def test_a_loss_that_looks_at_the_batch_is_for_runs_without_privacy(
    tiny_run: Make, go: Go, task: type[fl.TextClassification], why: str
) -> None:
    run = tiny_run(task=task(labels=LABELS, max_length=16))

    assert np.isfinite(go(run).score.loss)
    with pytest.raises(ModelError, match=f"sensitivity probe: .*{why}"):
        go(run.replace({"privacy": fl.DP(noise_multiplier=1.0, epsilon=50)}))


def test_a_local_adapter_works_in_a_private_run(tiny_run: Make, go: Go) -> None:
    run = tiny_run(adapter=Queries(rank=2, alpha=4), privacy=fl.DP(noise_multiplier=1.0, epsilon=50))

    result = go(run)

    assert set(result.epsilon) == {"clinic-a", "clinic-b"}
    assert isinstance(result.adapter, PeftModel)
    assert {name.rpartition(".")[2] for name in result.adapter.peft_config["default"].target_modules} == {"query"}


def test_a_class_that_is_defined_anew_takes_the_place_of_the_old_one(tiny_run: Make, go: Go) -> None:
    def defined(smoothing: float) -> fl.Run:
        class Anew(Smoothed):
            """As a cell of a notebook that is run again."""

            def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                return Smoothed(labels=self.labels, smoothing=smoothing).loss(scores, labels)

        return tiny_run(task=Anew(labels=LABELS, max_length=16))

    first, second = defined(0.0), defined(0.6)

    one, two, again = go(first), go(second), go(first)

    assert same(one.folder / "adapter", again.folder / "adapter")
    assert not same(one.folder / "adapter", two.folder / "adapter")
    assert first != second


def test_a_change_keeps_local_classes_until_it_names_another(tiny_run: Make) -> None:
    run = tiny_run(task=Smoothed(labels=LABELS), adapter=Queries(rank=2))

    assert set(run.local) == {("tasks", "Smoothed"), ("adapters", "Queries")}
    assert run.replace({"adapter.rank": 4, "train.steps": 3}).local == run.local
    assert set(run.replace({"adapter": fl.LoRA(rank=2)}).local) == {("tasks", "Smoothed")}
    assert run.replace({"task": fl.TextClassification(labels=LABELS), "adapter.kind": "lora"}).local == {}
    with pytest.raises(ConfigError, match=r"no option 'ranks'|unknown key 'adapter.ranks'; did you mean 'rank'"):
        run.replace({"adapter.ranks": 4})


@pytest.mark.parametrize(
    ("changes", "group", "name"),
    [({"task": Smoothed(labels=LABELS)}, "tasks", "Smoothed"), ({"adapter": Queries()}, "adapters", "Queries")],
)
def test_they_go_into_no_file_and_over_no_grpc(tiny_run: Make, changes: dict[str, Any], group: str, name: str) -> None:
    run = tiny_run(**changes)
    advice = (
        f"{name} is defined in this process only; install it at both ends, in a package that registers it under the "
        f"entry-point group fedloom.{group}, see `fedloom components new {group} NAME`"
    )

    with pytest.raises(ConfigError, match=advice):
        run.to_toml()
    with pytest.raises(ConfigError, match=f'engine.kind = "grpc" needs what is installed, and {advice}'):
        fl.simulate(run.replace({"engine.kind": "grpc"}), {"a": [], "b": []})


def test_a_name_alone_reaches_no_local_class(tiny_run: Make) -> None:
    tiny_run(task=Smoothed(labels=LABELS), adapter=Queries())

    assert "Smoothed" not in entries("tasks")
    with pytest.raises(ConfigError, match="no such task"):
        ModelSection(base="x", task="Smoothed", labels=tuple(LABELS))
    with locally({("tasks", "Smoothed"): Smoothed}):
        refused = component_problems(ComponentsPolicy(), {"tasks": ["Smoothed"]})
    assert "task 'Smoothed' of this process (components.tasks = [\"fedloom\"]" in refused[0]


def test_a_block_ends_and_takes_no_name_that_is_installed() -> None:
    class Plain(FP32):
        """Plain values under another name."""

        name = "plain"

    with locally({("codecs", "plain"): Plain}):
        assert load("codecs", "plain") is Plain
        assert isinstance(codec("plain"), Plain)
        assert entries("codecs")["plain"].distribution == "this process"
    with pytest.raises(CodecError, match="unknown codec 'plain'"):
        codec("plain")
    refused = "there is an installed codec 'fp32', of fedloom; rename the class"
    with pytest.raises(ConfigError, match=refused), locally({("codecs", "fp32"): Plain}):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Hollow(base="x")}, "Hollow is no task: it lacks read, encode, loss, right, traits; see"),
        ({"adapter": Hollow(base="x")}, "Hollow is no adapter: it lacks attach, slots, merge, traits; see"),
        ({"task": Smoothed}, r"task is the class Smoothed; give an object such as fl.TextClassification"),
        ({"adapter": {"rank": 8}}, r"adapter is \{'rank': 8\}; give an object such as fl.LoRA"),
    ],
)
def test_what_is_no_component_is_refused(tiny_run: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(**changes)
