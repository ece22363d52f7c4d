"""int8 passes fedloom's battery."""

import pytest
from fedloom_int8 import Int8

from fedloom.client.policy import Policy, check_spec
from fedloom.conformance.codecs import CodecConformance
from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError
from fedloom.core.registry import faults


class TestInt8(CodecConformance):
    """What holds for every codec."""

    def codec(self) -> Int8:
        """The codec under test."""
        return Int8()


def test_it_is_found_by_name() -> None:
    assert faults("codecs", "int8") == []


def test_a_site_that_does_not_name_it_refuses_the_run() -> None:
    tables = {"client": {"name": "ada"}, "data": {"source": "rows"}, "privacy": {"allow_non_private": True}}
    spec = Spec.model_validate(
        {
            "run": {"name": "demo", "rounds": 1},
            "model": {"base": "x", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "wire": {"upload": "int8"},
        }
    )

    with pytest.raises(PolicyError, match=r"codec 'int8' of the package fedloom-int8 .*add .int8. to allow it"):
        check_spec(Policy.model_validate(tables), spec)
    check_spec(Policy.model_validate(tables | {"components": {"codecs": ["fedloom", "int8"]}}), spec)
