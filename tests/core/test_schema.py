import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import SchemaError
from fedloom.core.limits import MAX_NAME_LENGTH, MAX_PAYLOAD_BYTES, MAX_SCHEMA_BYTES, MAX_TENSORS
from fedloom.core.schema import LORA, Pair, Role, Schema, TensorSpec

QUERY = "encoder.layer.0.attention.self.query"
SCHEMA = Schema(
    (
        TensorSpec(f"base_model.model.{QUERY}.lora_A.weight", QUERY, Role.LORA_A, (4, 32)),
        TensorSpec(f"base_model.model.{QUERY}.lora_B.weight", QUERY, Role.LORA_B, (16, 4)),
        TensorSpec("base_model.model.pooler.bias", "pooler", Role.BIAS, (16,)),
        TensorSpec("base_model.model.classifier.weight", "classifier", Role.HEAD, (2, 16)),
    ),
    scale=2.0,
)
# Written down once. Clients and coordinators of different releases compare this value, so a change of the
# canonical form needs a new schema version.
DIGEST = "c1f57fd17329c150429cfc3e744ee7e824568b0df0cf95029396c6eb1ce8a642"
ROW = ["a", "m", "lora_A", [2, 3]]

ROLES = sorted(SCHEMA.roles | {Role.BASE_A, Role.BASE_B, "scale"})

# A tensor that is named as a role of others is refused, and Hypothesis tries words that occur in our code.
names = st.text(min_size=1, max_size=40).filter(lambda name: name not in ROLES)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def spec(name: str, module: str, role: str, shape: tuple[int, ...]) -> TensorSpec:
    """A low-rank factor is a matrix at least; a role of one's own has its rank on the last axis."""
    return TensorSpec(name, module, role, (2, *shape[:3]), rank_axis=len(shape[:3]) if role == "scale" else None)


specs = st.builds(spec, names, names, st.sampled_from(ROLES), shapes)
schemas = st.builds(
    Schema,
    st.lists(specs, max_size=6, unique_by=lambda spec: spec.name).map(tuple),
    st.floats(1e-6, 1e4),
)


def document(**changes: object) -> str:
    return json.dumps({"version": 1, "scale": 1.0, "tensors": [ROW]} | changes, separators=(",", ":"))


def test_digest_is_the_one_written_down() -> None:
    assert SCHEMA.digest == DIGEST


@pytest.mark.parametrize(
    "other",
    [
        Schema(SCHEMA.tensors, 2.5),
        Schema(SCHEMA.tensors[::-1], 2.0),
        Schema(SCHEMA.tensors[:-1], 2.0),
        SCHEMA.with_rank(3),
        SCHEMA.with_base(1),
    ],
)
def test_digest_tells_schemas_apart(other: Schema) -> None:
    assert other.digest != SCHEMA.digest


def test_equal_schemas_have_equal_digests_whatever_the_type_of_the_scale() -> None:
    assert Schema(SCHEMA.tensors, 2) == SCHEMA
    assert Schema(SCHEMA.tensors, 2).digest == SCHEMA.digest


@given(schemas)
def test_json_round_trip_is_exact_and_canonical(schema: Schema) -> None:
    text = schema.to_json()

    again = Schema.from_json(text)

    assert again == schema
    assert again.to_json() == text
    assert again.digest == schema.digest


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_random_text_is_refused(text: str) -> None:
    with pytest.raises(SchemaError):
        Schema.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["version", "scale", "tensors", "row"]), json_values)
def test_a_field_of_any_json_value_gives_a_schema_or_a_schema_error(field: str, value: object) -> None:
    text = document(tensors=[value]) if field == "row" else document(**{field: value})

    try:
        schema = Schema.from_json(text)
    except SchemaError:
        return

    assert schema.to_json() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a schema document"),
        ("null", "not a schema document"),
        ("[1, 2]", "not a schema document"),
        ("[" * 100_000, "not a schema document"),
        ("{" * 1000, "not a schema document"),
        (document(version=2), "schema version 2; this build reads version 1"),
        (document(version=True), "not in canonical form"),
        ("{}", "'version'"),
        (document(scale=float("nan")), "scale nan"),
        (document(scale=float("inf")), "scale inf"),
        (document(scale=10**400), "not a schema document"),
        (document(scale=-1.0), "scale -1.0"),
        (document(scale=0.0), "scale 0.0"),
        (document(scale="1.0"), "not in canonical form"),
        (document(scale=None), "not a schema document"),
        (document(tensors=3), "not a schema document"),
        (document(tensors=["abcd"]), "not a schema document"),
        (document(tensors=[["a", "m", "lora_A"]]), "not a schema document"),
        (document(tensors=[["a", "m", "ro ot", [1]]]), "has role"),
        (document(tensors=[["a", "m", "lora_A", "23"]]), "not in canonical form"),
        (document(tensors=[["a", "m", "lora_A", [2.5]]]), "not in canonical form"),
        (document(tensors=[[7, "m", "lora_A", [2]]]), "not in canonical form"),
        (document(tensors=[["a", "m", "lora_A", [float("inf")]]]), "not a schema document"),
        (document(tensors=[["a", "m", "lora_A", [float("nan")]]]), "not a schema document"),
        (document(tensors=[["a", "m", "lora_A", [2, 0]]]), "1 to 4 positive sizes"),
        (document(tensors=[["a", "m", "lora_A", [-2, -2]]]), "1 to 4 positive sizes"),
        (document(tensors=[["a", "m", "lora_A", []]]), "1 to 4 positive sizes"),
        (document(tensors=[["a", "m", "lora_A", [1] * 5]]), "1 to 4 positive sizes"),
        (document(tensors=[["a", "m", "lora_A", [10**30, 10**30]]]), f"exceeds {MAX_PAYLOAD_BYTES} bytes"),
        (document(tensors=[["b", "m", "bias", [9]], ["b", "m", "bias", [1]]]), "twice"),
        (document(tensors=[["b", "m", "bias", [MAX_PAYLOAD_BYTES // 4]], ROW]), f"exceeds {MAX_PAYLOAD_BYTES} bytes"),
        (document(tensors=[["", "m", "lora_A", [2]]]), "1 to 256 characters"),
        (document(tensors=[["n" * (MAX_NAME_LENGTH + 1), "m", "lora_A", [2]]]), "1 to 256 characters"),
        (document(tensors=[["n", "m" * (MAX_NAME_LENGTH + 1), "lora_A", [2]]]), "1 to 256 characters"),
        (document(tensors=[[str(i), "m", "bias", [1]] for i in range(MAX_TENSORS + 1)]), f"at most {MAX_TENSORS}"),
        (document() + " " * MAX_SCHEMA_BYTES, f"at most {MAX_SCHEMA_BYTES} are allowed"),
        (document() + " ", "not in canonical form"),
        (document(extra=1), "not in canonical form"),
    ],
    ids=lambda value: value[:40],
)
def test_hostile_documents_are_refused(text: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        Schema.from_json(text)


def test_pairs_join_the_factors_of_a_module() -> None:
    lone = TensorSpec("other.lora_A.weight", "other", Role.LORA_A, (4, 8))

    pairs = Schema((*SCHEMA.tensors, lone)).pairs

    assert pairs == (Pair(QUERY, f"base_model.model.{QUERY}.lora_A.weight", f"base_model.model.{QUERY}.lora_B.weight"),)


def test_select_keeps_order_and_scale() -> None:
    chosen = SCHEMA.select({Role.HEAD, Role.LORA_B})

    assert [spec.role for spec in chosen.tensors] == [Role.LORA_B, Role.HEAD]
    assert chosen.scale == 2.0
    assert SCHEMA.select(LORA).rank == 4
    assert SCHEMA.select([]).size == 0
    assert SCHEMA.select([Role.HEAD]).rank == 0


def test_with_rank_cuts_the_ranked_axis_only() -> None:
    cut = SCHEMA.with_base(7).with_rank(3)

    assert [spec.shape for spec in cut.tensors] == [(3, 32), (16, 3), (16,), (2, 16), (3, 32), (16, 3)]
    assert SCHEMA.with_rank(9) == SCHEMA
    assert SCHEMA.with_rank(4).digest == SCHEMA.digest
    with pytest.raises(SchemaError, match="rank 0 must be at least 1"):
        SCHEMA.with_rank(0)


def test_with_base_adds_both_factors_of_every_pair() -> None:
    added = SCHEMA.with_base(5).tensors[len(SCHEMA.tensors) :]

    assert added == (
        TensorSpec(f"{QUERY}.base_A", QUERY, Role.BASE_A, (5, 32)),
        TensorSpec(f"{QUERY}.base_B", QUERY, Role.BASE_B, (16, 5)),
    )
    assert SCHEMA.select([Role.HEAD]).with_base(5) == SCHEMA.select([Role.HEAD])


def test_zeros_fit_and_size_counts_every_value() -> None:
    zeros = SCHEMA.zeros()

    SCHEMA.check(zeros)
    assert sum(tensor.size for tensor in zeros.values()) == SCHEMA.size == 4 * 32 + 16 * 4 + 16 + 32
    assert all(tensor.dtype == np.float32 and not tensor.any() for tensor in zeros.values())


def test_check_names_what_does_not_fit() -> None:
    zeros = SCHEMA.zeros()
    bias, head = "base_model.model.pooler.bias", "base_model.model.classifier.weight"

    with pytest.raises(SchemaError, match=f"1 tensors missing, 0 unexpected .{bias}"):
        SCHEMA.check({name: value for name, value in zeros.items() if name != bias})
    with pytest.raises(SchemaError, match=r"0 tensors missing, 1 unexpected \(stranger\)"):
        SCHEMA.check(zeros | {"stranger": np.zeros(3, np.float32)})
    with pytest.raises(SchemaError, match=rf"'{head}' has shape \(16, 2\); the schema says \(2, 16\)"):
        SCHEMA.check(zeros | {head: np.zeros((16, 2), np.float32)})


def test_a_selection_is_made_once_and_few_are_remembered() -> None:
    schema = Schema(tuple(TensorSpec(f"t{number}", "m", f"role{number}", (2,)) for number in range(100)))
    first = schema.select(["role3", "t4"])
    assert schema.select(iter(["t4", "role3"])) is first
    assert schema.select(["role3"], but=["t3"]).tensors == ()
    for number in range(100):
        assert [spec.name for spec in schema.select([f"t{number}"]).tensors] == [f"t{number}"]
    assert len(schema._selected) <= 64
    assert schema.select(["role3", "t4"]) == first
