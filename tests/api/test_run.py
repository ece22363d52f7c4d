"""A run as an object is a run file: both say the same, round-trip, and fail with the same words."""

import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import numpy as np
import pytest
import tomli_w
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import fedloom.api as fl
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.strategies.fedavg import FedAvg

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))

SMALL = """
[run]
name = "trial"
rounds = 3
seed = 7
[model]
base = "minilm-l6"
digest = "sha256:{digest}"
task = "token-classification"
labels = ["O", "PER"]
max_length = 32
head = "frozen"
[adapter]
kind = "lora"
rank = 4
targets = "all-linear"
[train]
steps = 5
sampling_rate = 0.25
optimizer = "adam"
[privacy]
epsilon = 3.0
delta = 1e-6
[strategy]
name = "fedsvd"
[strategy.options]
period = 2
[rounds]
min_clients = 3
[secure_aggregation]
enabled = true
""".format(digest="ab" * 32)


def small() -> fl.Run:
    return fl.Run(
        model=fl.Model(base="minilm-l6", digest="sha256:" + "ab" * 32, head="frozen"),
        task=fl.TokenClassification(labels=["O", "PER"], max_length=32),
        adapter=fl.LoRA(rank=4, targets="all-linear"),
        strategy=fl.FedSVD(period=2),
        privacy=fl.DP(epsilon=3, delta=1e-6),
        train=fl.Train(steps=5, sampling_rate=0.25, optimizer="adam"),
        rounds=3,
        name="trial",
        seed=7,
        round_rules=fl.RoundRules(min_clients=3),
        secure_aggregation=fl.SecureAggregation(),
    )


def test_an_object_says_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(SMALL)

    assert small() == fl.load(path)
    assert small().config == fl.load(path).config
    assert small() != small().replace({"run.seed": 8})


def test_a_table_among_the_options_of_a_strategy_is_kept(tmp_path: Path) -> None:
    run = small().replace({"strategy": fl.FlexLoRA(ranks={"phone-*": 2}), "secure_aggregation.enabled": False})

    run.to_toml(tmp_path / "run.toml")

    assert run.config.strategy.options == {"ranks": {"phone-*": 2}}
    assert fl.load(tmp_path / "run.toml") == run
    assert small().replace({"strategy": fl.FedEx()}).config.strategy.options == {}


def test_an_option_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(fl.FedloomError, match=r"the option energy of FLoRIST is .* a table of them"):
        small().replace({"strategy": fl.FLoRIST(energy=np.float32(0.5))})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_round_trip(path: Path, tmp_path: Path) -> None:
    run = fl.load(path)

    run.to_toml(tmp_path / "again.toml")

    assert fl.load(tmp_path / "again.toml") == run


def numbers(info: FieldInfo, kind: type) -> st.SearchStrategy[Any]:
    """Numbers within a field's bounds."""
    low: Any = None
    high: Any = None
    open_low, open_high = False, False
    for bound in info.metadata:
        if isinstance(bound, annotated_types.Ge | annotated_types.Gt):
            low = getattr(bound, "ge", None) if isinstance(bound, annotated_types.Ge) else bound.gt
            open_low = isinstance(bound, annotated_types.Gt)
        if isinstance(bound, annotated_types.Le | annotated_types.Lt):
            high = getattr(bound, "le", None) if isinstance(bound, annotated_types.Le) else bound.lt
            open_high = isinstance(bound, annotated_types.Lt)
    if kind is int:
        top = None if high is None else int(high) - open_high
        return st.integers(None if low is None else int(low) + open_low, 10**6 if top is None else min(top, 10**6))
    return st.floats(
        low, 1e9 if high is None else high, exclude_min=open_low, exclude_max=open_high, allow_subnormal=False
    )


def values(info: FieldInfo) -> st.SearchStrategy[Any]:
    """Values of a field, by its annotation."""
    kind: Any = info.annotation
    if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
        (kind,) = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind in (int, float):
        return numbers(info, kind)
    return st.nothing()


def tables(section: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Some keys of a section with values it takes by themselves."""
    fields = {name: values(info) for name, info in section.model_fields.items()}
    return st.fixed_dictionaries({}, optional={name: each for name, each in fields.items() if not each.is_empty})


SECTIONS = ("adapter", "privacy", "wire", "secure_aggregation", "federated_evaluation", "strategy", "user_level")
LOCAL = ("rounds", "evaluation", "engine")


def part(name: str) -> st.SearchStrategy[dict[str, Any]]:
    section = RunConfig.model_fields[name].annotation
    assert isinstance(section, type)
    return tables(section)


MODELS: list[dict[str, Any]] = [
    {"base": "b", "labels": ["a", "b"]},
    {"base": "b", "labels": ["ä", "\\"], "task": "image-classification", "image_size": 28},
    {"base": "C:/models/x", "task": "instruct", "head": "frozen", "max_length": 99},
]
NEEDED: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "run": part("run").map(lambda table: {"name": "x", "rounds": 2} | table),
    "model": st.sampled_from(MODELS),
    "train": part("train").map(lambda table: {"steps": 1, "sampling_rate": 0.5} | table),
}
runs = st.fixed_dictionaries(NEEDED, optional={name: part(name) for name in (*SECTIONS, *LOCAL)})


@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(runs)
def test_load_and_to_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("trip") / "run.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    try:
        run = fl.load(path)
    except ConfigError:
        assume(False)

    text = run.to_toml(path)

    assert fl.load(path) == run
    assert fl.load(path).config.spec == run.config.spec
    assert fl.load(path).to_toml() == text


MISTAKES: list[tuple[dict[str, Any], Any]] = [
    ({"train.steps": 0}, lambda: fl.Train(steps=0, sampling_rate=0.25)),
    ({"train.learning_rat": 1}, lambda: small().replace({"train.learning_rat": 1})),
    ({"privacy.epsilon": -1}, lambda: fl.DP(epsilon=-1)),
    ({"adapter.rank": 0}, lambda: small().replace({"adapter": fl.LoRA(rank=0)})),
    ({"model.labels": ["O"]}, lambda: small().replace({"task": fl.TokenClassification(labels=["O"])})),
    ({"run.name": "a b"}, lambda: small().replace({"run.name": "a b"})),
]


@pytest.mark.parametrize(
    ("changes", "make"), MISTAKES, ids=lambda each: next(iter(each)) if isinstance(each, dict) else ""
)
def test_an_object_fails_with_the_words_of_the_file(changes: dict[str, Any], make: Any, tmp_path: Path) -> None:
    """But for where the mistake is: a file has sections, an object its own name."""
    (path, value), *_ = changes.items()
    document = tomllib.loads(SMALL)
    section, key = path.split(".")
    document[section][key] = value
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document))

    with pytest.raises(ConfigError) as from_file:
        fl.load(tmp_path / "run.toml")
    with pytest.raises(ConfigError) as from_object:
        make()

    said = str(from_file.value).partition(": ")[2]
    assert str(from_object.value).partition(": ")[2] in (said, said.replace(f"{section}.{key}", key))


def test_a_name_that_is_nearly_right_is_told() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'train.learning_rat'; did you mean 'learning_rate'"):
        small().replace({"train": fl.Train(steps=1, sampling_rate=0.1, learning_rat=1)})
    with pytest.raises(ConfigError, match=r"unknown key 'train.stepz'; did you mean 'steps'"):
        small().replace({"train.stepz": 1})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"task": "text-classification"}, r"task is 'text-classification'; give an object such as fl\.TextClass"),
        ({"adapter": fl.LoRA}, r"adapter is the class LoRA; give an object such as fl\.LoRA\(rank=8\)"),
        ({"strategy": FedAvg}, "strategy is the class FedAvg; give an object of a subclass"),
        ({"strategy": 3}, "strategy is a int, which lacks init, plan, fold, commit, traits; give an object"),
    ],
)
def test_what_is_no_component_is_refused(argument: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": "x", "task": fl.TextClassification(labels=["a", "b"])}
    arguments |= {"train": fl.Train(steps=1, sampling_rate=0.1)}

    with pytest.raises(ConfigError, match=message):
        fl.Run(**(arguments | argument))


def test_a_section_that_can_be_off_is_on_where_it_is_given() -> None:
    on = small().config
    off = small().replace({"secure_aggregation": fl.SecureAggregation(enabled=False)}).config

    assert on.secure_aggregation.enabled
    assert not off.secure_aggregation.enabled
    assert on.privacy.enabled
    assert not on.user_level.enabled


def test_a_run_has_virtual_time_where_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for section in (fl.VirtualTime(), fl.VirtualTime(step_s=2, mean_on_s=60, mean_off_s=30)):
        run = small().replace({"virtual_time": section})
        run.to_toml(path)
        assert fl.load(path) == run
        assert fl.load(path).config.virtual_time == section
    assert small().config.virtual_time is None
    assert "virtual_time" not in small().to_toml()


@dataclass(frozen=True)
class Mine(FedAvg):
    """A strategy that no package brings."""

    pull: float = 0.5


def test_an_installed_strategy_is_named_and_a_local_one_is_kept() -> None:
    named, local = small(), small().replace({"strategy": Mine(pull=0.25)})

    assert named.local_strategy is None
    assert named.config.strategy.options == {"period": 2}
    assert local.local_strategy == Mine(pull=0.25)
    assert local.replace({"train.steps": 9}).local_strategy == Mine(pull=0.25)
    assert local.replace({"strategy.options.pull": 1.0}).local_strategy == Mine(pull=1.0)
    assert local.replace({"strategy.name": "ffa", "strategy.options": {}}).local_strategy is None
    with pytest.raises(ConfigError, match="Mine has no field 'push'"):
        local.replace({"strategy.options.push": 1.0})


def test_a_local_strategy_goes_into_no_file_and_over_no_grpc() -> None:
    run = small().replace({"strategy": Mine()})
    advice = "Mine is defined in this process only; install it at both ends"

    with pytest.raises(ConfigError, match=advice):
        run.to_toml()
    with pytest.raises(ConfigError, match=f'engine.kind = "grpc" needs what is installed, and {advice}'):
        fl.simulate(run.replace({"engine.kind": "grpc"}), {"a": [], "b": []})
