import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.config.parsing import parse, read_toml
from fedloom.core.config.run import RunConfig, Spec, load_run
from fedloom.core.errors import ConfigError
from fedloom.core.limits import MAX_SPEC_BYTES

TEXT = """
[run]
name = "demo"
rounds = 3

[model]
base = "minilm-l6"
labels = ["negative", "positive"]

[train]
steps = 10
sampling_rate = 0.05
learning_rate = 0.5

[strategy]
name = "fedsvd"
options = { refresh = 2 }

[data]
source = "sentiment"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def document(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run": {"name": "demo", "rounds": 3},
        "model": {"base": "x", "labels": ["a", "b"]},
        "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0},
    }
    return base | sections


def test_a_file_reads_with_its_defaults(file: Path) -> None:
    config = load_run(file)

    assert config.run.rounds == 3
    assert config.adapter.kind == "lora"
    assert config.strategy.options == {"refresh": 2}
    assert config.data is not None
    assert config.data.source == "sentiment"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.ruonds=3", r"unknown key 'run\.ruonds'; did you mean 'rounds'\?"),
        ("privcay.enabled=false", r"unknown key 'privcay'; did you mean 'privacy'\?"),
        ("data.partitoin='iid'", r"unknown key 'data\.partitoin'; did you mean 'partition'\?"),
        ("data.zzz=3", r"unknown key 'data\.zzz'; allowed with partition '\w+': .*clients, .*partition, source"),
        ("data.partition='idi'", r"unknown partitioner 'idi'; did you mean 'iid'\? available: dirichlet, "),
        (
            "data={source='x', partition='dirichlet', dirichlet_alpha=0}",
            r"option 'dirichlet_alpha' of partitioner '\w+' is 0 .*greater than 0",
        ),
        ("data.classes_per_client=3", r"unknown key 'data\.classes_per_client'; allowed with"),
        ("train.zzz=3", r"unknown key 'train\.zzz'; allowed: ema, head_learning_rate, .*steps, warmup"),
        ("run.rounds='many'", r"run\.rounds: .*valid integer.*received 'many'"),
        ("run.rounds=0", r"run\.rounds: .*greater than or equal to 1 \(received 0\)"),
        ("run.rounds=2.5", r"run\.rounds: .*integer.*received 2\.5"),
        ("run=4", r"run: .*"),
        ("run.name='../up'", r"run\.name: .*received '\.\./up'"),
        ("train.sampling_rate=1.5", r"train\.sampling_rate: .*less than or equal to 1"),
        ("train.optimizer='lion'", r"train: .*optimizer = 'lion': no such optimizer; allowed: adam, .*sgd"),
        ("train.learning_rate=inf", r"train\.learning_rate: .*finite.*received inf"),
        ("privacy.clip_norm=nan", r"privacy\.clip_norm: .*received nan"),
        ("privacy.clip_norm=inf", r"privacy\.clip_norm: .*finite.*received inf"),
        ("adapter.alpha=inf", r"adapter\.alpha: .*finite"),
        ("model.labels=['one']", r"model\.labels has 1 names; text-classification needs at least 2"),
        ("run.rounds.more=1", "'rounds' is a value, not a section"),
        ("run.rounds", r"override 'run\.rounds' must look like section\.key=value"),
        ("=3", "must look like"),
        ("run..rounds=3", "must look like"),
    ],
)
def test_a_wrong_value_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(file, (override,))


def test_the_message_names_the_file(file: Path) -> None:
    file.write_text(TEXT.replace("steps = 10\n", ""))

    with pytest.raises(ConfigError, match=r"run\.toml: 'train\.steps' is missing; add it"):
        load_run(file)


def test_overrides_are_toml_values_and_plain_text_otherwise(file: Path) -> None:
    config = load_run(
        file,
        (
            "run.rounds=7",
            "privacy.enabled=false",
            "adapter.targets=['query', 'key']",
            "strategy.name=fedavg",
            "strategy.options.refresh=5",
            "privacy.noise_multiplier=1.25",
            "run.rounds=8",
            "model.base=/models/a=b",
        ),
    )

    assert config.run.rounds == 8
    assert not config.privacy.enabled
    assert config.adapter.targets == ("query", "key")
    assert config.strategy.name == "fedavg"
    assert config.strategy.options == {"refresh": 5}
    assert config.privacy.noise_multiplier == 1.25
    assert config.model.base == "/models/a=b"


def test_a_head_adapter_needs_a_trained_head(file: Path) -> None:
    assert load_run(file, ("adapter.kind=head",)).adapter.kind == "head"
    with pytest.raises(ConfigError, match=r"no such adapter; did you mean 'head'"):
        load_run(file, ("adapter.kind=heads",))


def test_sections_are_frozen(file: Path) -> None:
    config = load_run(file)

    with pytest.raises(ValueError, match="frozen"):
        config.privacy.enabled = False  # type: ignore[misc]  # mypy knows it too


def test_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml does not exist"):
        read_toml(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("[run\nname = 3")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_toml(tmp_path / "latin.toml")


def test_the_spec_hides_everything_clients_need_not_see(file: Path) -> None:
    spec = load_run(file).spec

    assert type(spec) is Spec
    told = {"run", "model", "adapter", "train", "privacy", "wire", "secure_aggregation"}
    assert set(json.loads(spec.model_dump_json())) == told
    assert "sentiment" not in spec.model_dump_json()
    assert "fedsvd" not in spec.model_dump_json()


def test_spec_round_trips_through_json(file: Path) -> None:
    spec = load_run(file, ("privacy.noise_multiplier=0.737",)).spec

    assert Spec.from_json(spec.model_dump_json()) == spec


def test_whole_run_file_is_not_a_spec(file: Path) -> None:
    whole = load_run(file)
    assert isinstance(whole, RunConfig)

    with pytest.raises(ConfigError, match="unknown key 'strategy'"):
        Spec.from_json(whole.model_dump_json())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "\x00",
        "\ud800",
        "[" * 50_000,
        '{"run":' * 5000,
        json.dumps(document(run={"name": "../../etc/passwd", "rounds": 1})),
        json.dumps(document(run={"name": "demo", "rounds": 10**400})),
        json.dumps(document(run={"name": "demo\n", "rounds": 1})),
        json.dumps(document(train={"steps": 1, "sampling_rate": float("nan"), "learning_rate": 1.0})),
        json.dumps(document(train={"steps": 1, "sampling_rate": 0.1, "learning_rate": float("inf")})),
        json.dumps(document(privacy={"noise_multiplier": float("inf")})),
        json.dumps(document(privacy={"noise_multiplier": float("nan")})),
        json.dumps(document(privacy={"noise_multiplier": -1})),
        json.dumps(document(privacy={"clip_norm": float("inf")})),
        json.dumps(document(privacy={"enabled": "perhaps"})),
        json.dumps(document(model={"base": "x", "labels": ["a", "b"], "digest": "sha256:zz"})),
        json.dumps(document(callback="os.system")),
        json.dumps(document(run={"name": "demo", "rounds": 1, "__class__": "x"})),
    ],
    ids=lambda text: repr(text[-60:]),
)
def test_hostile_specs_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="run spec is not valid"):
        Spec.from_json(text)


def test_an_oversized_spec_is_refused_unread() -> None:
    with pytest.raises(ConfigError, match=f"at most {MAX_SPEC_BYTES} are allowed"):
        Spec.from_json(json.dumps(document()) + " " * MAX_SPEC_BYTES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [(section, key) for section, info in Spec.model_fields.items() for key in info.annotation.model_fields]  # type: ignore[union-attr]
)


@given(fields, json_values)
def test_a_field_of_any_json_value_gives_a_spec_or_a_config_error(field: tuple[str, str], value: object) -> None:
    section, key = field
    wire = document()
    wire[section] = wire.get(section, {}) | {key: value}

    try:
        spec = Spec.from_json(json.dumps(wire))
    except ConfigError:
        return

    assert Spec.from_json(spec.model_dump_json()) == spec


@given(st.text(max_size=200))
def test_random_text_is_not_a_spec(text: str) -> None:
    with pytest.raises(ConfigError):
        Spec.from_json(text)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"task": "causal-lm"}, r'causal-lm adds no head that could be trained; set model\.head = "frozen"'),
        (
            {"task": "causal-lm", "head": "frozen", "labels": ["a"]},
            r"has 1 names but causal-lm has none; remove",
        ),
        ({"task": "token-classification"}, r"has 0 names; token-classification needs at least 2"),
        ({}, r"has 0 names; text-classification needs at least 2"),
        (
            {"task": "summaries", "labels": ["a", "b"]},
            r"model: .*task = 'summaries': no such task; allowed: audio-classification",
        ),
    ],
)
def test_a_task_and_its_labels_and_head_must_fit(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RunConfig, document(model={"base": "x", **model}), source="run.toml")


def test_a_language_model_needs_no_labels() -> None:
    config = parse(RunConfig, document(model={"base": "x", "task": "causal-lm", "head": "frozen"}), source="run.toml")

    assert (config.model.labels, config.model.head) == ((), "frozen")


def test_a_codec_beside_a_secure_sum_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave wire\.upload out"):
        load_run(file, ("secure_aggregation.enabled=true", 'wire.upload="fp16"'))


def test_a_run_file_of_0_1_names_the_options_of_every_partitioner(file: Path) -> None:
    written = ("data.partition='iid'", "data.dirichlet_alpha=0.5", "data.classes_per_client=2", "data.shares=[]")

    loaded = load_run(file, (*written, "data.size_exponent=1.0")).data

    assert loaded is not None
    assert loaded.options == {}
    chosen = load_run(file, ("data.partition='size'", "data.size_exponent=2.0", "data.dirichlet_alpha=0.5")).data
    assert chosen is not None
    assert chosen.options == {"size_exponent": 2.0}
