"""The codec of a run that names none."""

import pytest

from fedloom.core.codecs import codec
from fedloom.core.codecs.auto import AUTO, chosen, possible
from fedloom.core.registry import entries
from fedloom.core.schema import Role, Schema, TensorSpec


def of(size: int) -> Schema:
    return Schema((TensorSpec("m.B", "m", Role.BIAS, (size,)),))


@pytest.mark.parametrize(("size", "name"), [(1, "fp32"), (262_144, "fp32"), (262_145, "eden4"), (50_000_000, "eden4")])
def test_one_message_is_sent_as_it_is_and_more_in_four_bits(size: int, name: str) -> None:
    assert chosen(AUTO, of(size)) == name
    assert name in possible(AUTO)


def test_a_name_stays_one() -> None:
    for name in entries("codecs"):
        assert chosen(name, of(50_000_000)) == name
        assert possible(name) == (name,)


def test_what_is_chosen_is_there_and_unbiased() -> None:
    assert all(codec(name).traits.unbiased or codec(name).traits.max_error == 0 for name in possible(AUTO))
