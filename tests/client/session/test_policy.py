import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.client.policy import Policy, check_spec, load_policy
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError, PolicyError

TEXT = """
[client]
name = "hospital-a"
state = "state"

[data]
source = "train.csv"
labels = ["a", "b"]
declared_examples = 1000
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT)
    return path


def policy(**sections: dict[str, Any]) -> Policy:
    tables: dict[str, dict[str, Any]] = {
        "client": {"name": "hospital-a"},
        "data": {"source": "train.csv", "labels": ["a", "b"], "declared_examples": 1000},
        "privacy": {
            "min_noise_multiplier": 0.8,
            "max_sampling_rate": 0.1,
            "min_clip_norm": 0.5,
            "max_clip_norm": 0.5,
        },
        "limits": {
            "adapter_kinds": ["lora"],
            "max_steps_per_round": 20,
            "max_rounds": 30,
            "max_learning_rate": 1.0,
        },
    }
    return Policy.model_validate({name: tables.get(name, {}) | sections.get(name, {}) for name in tables | sections})


def spec(**sections: dict[str, Any]) -> Spec:
    """A run that sits on every limit of `policy` exactly."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "demo", "rounds": 30},
        "model": {"base": "x", "labels": ["a", "b"]},
        "adapter": {"kind": "lora"},
        "train": {"steps": 20, "sampling_rate": 0.1, "learning_rate": 1.0},
        "privacy": {"noise_multiplier": 0.8, "clip_norm": 0.5},
        "wire": {},
    }
    return Spec.model_validate({name: tables[name] | sections.get(name, {}) for name in tables})


def test_a_run_on_every_limit_is_allowed() -> None:
    check_spec(policy(), spec())


# Each breaks one rule only, so that a rule that is dropped from the check fails its own line here.
BROKEN: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "no privacy": ({"privacy": {"enabled": False}}, "training without privacy (privacy.allow_non_private = false)"),
    "no noise": ({"privacy": {"noise_multiplier": None}}, "a private run without a noise multiplier"),
    "little noise": ({"privacy": {"noise_multiplier": 0.79}}, "noise multiplier 0.79 (at least 0.8)"),
    "high rate": ({"train": {"sampling_rate": 0.11}}, "sampling rate 0.11 (at most 0.1)"),
    "delta": ({"privacy": {"delta": 1e-3}}, "delta 0.001 (below 1/declared_examples = 0.001)"),
    "steps": ({"train": {"steps": 21}}, "21 steps a round (at most 20)"),
    "rounds": ({"run": {"rounds": 31}}, "31 rounds (at most 30)"),
    "learning rate": ({"train": {"learning_rate": 1.1}}, "learning rate 1.1 (at most 1)"),
    "head learning rate": ({"train": {"head_learning_rate": 1.2}}, "learning rate 1.2 (at most 1)"),
    "small clip norm": ({"privacy": {"clip_norm": 0.4}}, "clip norm 0.4 (0.5 to 0.5)"),
    "large clip norm": ({"privacy": {"clip_norm": 0.6}}, "clip norm 0.6 (0.5 to 0.5)"),
    "task": (
        {"model": {"task": "token-classification"}},
        "task token-classification (data.task = text-classification)",
    ),
    "labels": (
        {"model": {"labels": ["b", "a"]}},
        "model.labels ['b', 'a'] (data.labels = ['a', 'b']; name and order must be the same)",
    ),
    "kind": ({"adapter": {"kind": "bias"}}, "adapter kind bias (allowed: lora)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_limit_refuses_by_itself(case: str) -> None:
    sections, expected = BROKEN[case]

    with pytest.raises(PolicyError) as refusal:
        check_spec(policy(), spec(**sections))

    assert str(refusal.value) == f"this site's policy refuses run 'demo': {expected}"


def test_a_private_run_needs_a_declared_size() -> None:
    undeclared = policy(data={"declared_examples": None})

    with pytest.raises(PolicyError, match=r"refuses run 'demo': a private run without data\.declared_examples"):
        check_spec(undeclared, spec())


def test_a_budget_at_a_delta_that_gives_examples_away_allows_no_private_run() -> None:
    careless = policy(privacy={"delta": 0.01})

    with pytest.raises(PolicyError, match=r"this policy's privacy\.delta 0\.01 \(below 1/declared_examples = 0\.001\)"):
        check_spec(careless, spec())


def test_a_run_without_privacy_is_held_to_the_caps_on_work_only() -> None:
    open_site = policy(privacy={"allow_non_private": True}, data={"declared_examples": None})
    public = spec(privacy={"enabled": False, "noise_multiplier": None}, train={"sampling_rate": 1.0})

    check_spec(open_site, public)

    with pytest.raises(PolicyError, match="21 steps"):
        check_spec(open_site, spec(privacy={"enabled": False}, train={"steps": 21}))


def test_permission_to_train_without_privacy_loosens_nothing_in_a_private_run() -> None:
    with pytest.raises(PolicyError, match=r"noise multiplier 0\.1 "):
        check_spec(policy(privacy={"allow_non_private": True}), spec(privacy={"noise_multiplier": 0.1}))


def test_all_problems_are_listed_at_once() -> None:
    everything = spec(
        run={"rounds": 31},
        train={"steps": 21, "sampling_rate": 0.11},
        adapter={"kind": "bias"},
        privacy={"noise_multiplier": 0.79},
    )

    with pytest.raises(PolicyError) as refusal:
        check_spec(policy(data={"declared_examples": None}), everything)

    listed = str(refusal.value)
    for case in ("little noise", "high rate", "steps", "rounds", "kind"):
        assert BROKEN[case][1] in listed
    assert "declared_examples" in listed
    assert listed.count(";") == 6  # five between the six problems, one inside the last


def test_a_spec_that_nobody_has_checked_is_held_to_the_ranges_of_run_files() -> None:
    unchecked = spec().model_copy(update={"privacy": spec().privacy.model_copy(update={"clip_norm": 2.0**-150})})

    with pytest.raises(PolicyError, match=r"privacy\.clip_norm: Input should be greater than or equal to 0\.000001"):
        check_spec(policy(privacy={"min_clip_norm": 1e-6}), unchecked)


def test_the_shipped_policy_is_strict(file: Path) -> None:
    shipped = load_policy(file)

    assert not shipped.privacy.allow_non_private
    assert shipped.privacy.epsilon <= 10
    with pytest.raises(PolicyError, match="without privacy"):
        check_spec(shipped, spec(privacy={"enabled": False}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.epsilom=3", r"unknown key 'privacy\.epsilom'; did you mean 'epsilon'\?"),
        ("limts.max_rounds=3", r"unknown key 'limts'; did you mean 'limits'\?"),
        ("data.declared_examples=0", r"data\.declared_examples: .*received 0"),
        ("privacy.epsilon=0", r"privacy\.epsilon: .*received 0"),
        ("privacy.epsilon=inf", r"privacy\.epsilon: .*finite.*received inf"),
        ("privacy.delta=1.0", r"privacy\.delta: .*less than 1"),
        ("privacy.max_sampling_rate=1.01", r"privacy\.max_sampling_rate: .*less than or equal to 1"),
        ("privacy.min_noise_multiplier=0", r"privacy\.min_noise_multiplier: .*greater than or equal to 0\.01"),
        ("privacy.min_clip_norm=1e-7", r"privacy\.min_clip_norm: .*greater than or equal to 0\.000001"),
        ("limits.max_learning_rate=1e5", r"limits\.max_learning_rate: .*less than or equal to 10000"),
        ("limits.max_weight=1e7", r"limits\.max_weight: .*less than or equal to 1000000"),
        ("limits.adapter_kinds='prompt'", r"limits\.adapter_kinds: .*received 'prompt'"),
        ("components.adapters='prompt'", r"components\.adapters: .*received 'prompt'"),
        ("client.name='../x'", r"client\.name"),
    ],
)
def test_a_wrong_policy_is_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(file, (override,))


def test_overrides_apply(file: Path) -> None:
    assert load_policy(file, ("privacy.epsilon=2.5",)).privacy.epsilon == 2.5


def test_relative_paths_count_from_the_policys_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    loaded = load_policy(Path("..") / file.name)

    assert loaded.client.state == tmp_path / "state"
    assert Path(loaded.data.source) == tmp_path / "train.csv"


def test_absolute_paths_and_packaged_names_stay(file: Path) -> None:
    loaded = load_policy(file, ("client.state=/var/lib/fedloom", "data.source=sentiment"))

    assert loaded.client.state == Path("/var/lib/fedloom")
    assert loaded.data.source == "sentiment"


def test_a_source_that_no_path_can_be_is_left_to_whoever_loads_it(file: Path) -> None:
    assert load_policy(file, (f'data.source="{"x" * 300}"',)).data.source == "x" * 300
    with pytest.raises(ConfigError, match="a path has a control character"):
        load_policy(file, ('data.source="a\\u0000b"',))


CODEC = """
from fedloom.core.codecs.dense import FP16

class Half(FP16):
    '''Half precision.'''
    name = "half"
"""


def test_a_third_party_component_needs_a_site_that_names_it(install: Callable[..., None]) -> None:
    install("half-precision", "half", "slow_federation:Half", "codecs", code=CODEC)
    asked = spec(wire={"upload": "half"})

    said = re.escape(
        """codec 'half' of the package half-precision (components.codecs = ["fedloom"]; add "half" to allow it)"""
    )
    with pytest.raises(PolicyError, match=f"this site's policy refuses run 'demo': {said}$"):
        check_spec(policy(), asked)
    assert "slow_federation" not in sys.modules, "what is not allowed is not imported"
    for names in (["fedloom", "half"], ["*"]):
        check_spec(policy(components={"codecs": names}), asked)


def test_a_site_may_allow_less_than_what_comes_with_fedloom() -> None:
    said = re.escape("""codec 'fp16' of the package fedloom (components.codecs = ["fp32"]; add""")
    with pytest.raises(PolicyError, match=said):
        check_spec(policy(components={"codecs": ["fp32"]}), spec(wire={"broadcast": "fp16"}))
    with pytest.raises(PolicyError, match=said.replace("fp16", "eden4")):
        check_spec(policy(components={"codecs": ["fp32"]}), spec())  # which may be eden4
    check_spec(policy(components={"codecs": ["fp32"]}), spec(wire={"upload": "fp32", "broadcast": "fp32"}))


def test_a_codec_that_is_not_here_is_refused_before_the_run() -> None:
    with pytest.raises(PolicyError, match=r"codec 'half', which is not installed here \(installed: .*fp16, fp32"):
        check_spec(policy(components={"codecs": ["*"]}), spec(wire={"upload": "half"}))


def test_a_data_source_of_another_package_needs_a_word(file: Path, install: Callable[..., None]) -> None:
    install("rows", "train", "slow_federation:Rows", "data")
    source = ('data.source="train"',)

    with pytest.raises(ConfigError, match=r"data source 'train' of the package rows .* or write \./train for a file"):
        load_policy(file, source)
    assert load_policy(file, (*source, 'components.data=["train"]')).data.source == "train"
