"""qsgd passes fedloom's battery."""

import pytest
from fedloom_qsgd import Qsgd

from fedloom.client.policy import Policy, check_spec
from fedloom.conformance.codecs import CodecConformance
from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError
from fedloom.core.registry import faults


class TestQsgd(CodecConformance):
    """What holds for every codec."""

    def codec(self) -> Qsgd:
        """The codec under test."""
        return Qsgd()


def test_it_is_found_by_name() -> None:
    assert faults("codecs", "qsgd") == []


def test_a_site_that_does_not_name_it_refuses_the_run() -> None:
    tables = {"client": {"name": "ada"}, "data": {"source": "rows"}, "privacy": {"allow_non_private": True}}
    spec = Spec.model_validate(
        {
            "run": {"name": "demo", "rounds": 1},
            "model": {"base": "x", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "wire": {"upload": "qsgd"},
        }
    )

    with pytest.raises(PolicyError, match=r"codec 'qsgd' of the package fedloom-qsgd .*add .qsgd. to allow it"):
        check_spec(Policy.model_validate(tables), spec)
    check_spec(Policy.model_validate(tables | {"components": {"codecs": ["fedloom", "qsgd"]}}), spec)
