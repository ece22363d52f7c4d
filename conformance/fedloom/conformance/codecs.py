"""What every codec must do.

::

    from fedloom.conformance.codecs import CodecConformance

    class TestMine(CodecConformance):
        def codec(self):
            return Mine()
"""

import numpy as np
import pytest

from fedloom.core.codecs.api import Codec, seed_of
from fedloom.core.errors import CodecError, SchemaError
from fedloom.core.schema import Array, Role, Schema, TensorSpec

__all__ = ["CodecConformance"]

SHAPES: tuple[tuple[int, ...], ...] = ((1,), (3,), (8, 5), (7, 1), (2, 3, 5))
SHARES = 60
"""Updates over which a mean error is taken."""
DRAWS = 2000
"""Roundings from which a bias is told: its mean is off by more than 6 standard errors once in a billion tests."""


class CodecConformance:
    """The battery. Define `codec`."""

    def codec(self) -> Codec:
        """A fresh instance of the codec under test."""
        raise NotImplementedError("define codec() in the subclass and return the codec under test")

    def schema(self) -> Schema:
        """Tensors of one, two and three dimensions, of odd sizes."""
        return Schema(tuple(TensorSpec(f"t{i}", "m", Role.BIAS, shape) for i, shape in enumerate(SHAPES)))

    def values(self, stream: int = 0, scale: float = 1.0, kind: str = "normal") -> dict[str, Array]:
        """Values for `schema`, normal unless `kind` says otherwise; the same stream gives the same."""
        draw = np.random.Generator(np.random.Philox(key=[17, abs(stream)]))
        found = {spec.name: draw.normal(0, scale, spec.shape) for spec in self.schema().tensors}
        if kind == "heavy-tailed":
            found = {name: draw.standard_t(3, value.shape) for name, value in found.items()}
        elif kind == "mostly zeros":
            found = {name: np.where(draw.random(value.shape) < 0.1, value, 0) for name, value in found.items()}
            found["t0"][0] = scale  # never all zero
        elif kind == "of unlike sizes":
            found = {name: value * 10.0 ** draw.integers(-3, 4) for name, value in found.items()}
        return {name: value.astype(np.float32) for name, value in found.items()}

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_a_round_trip_is_within_the_stated_error(self, scale: float) -> None:
        """No value is off by more than `max_error` of the largest in its tensor, and zeros stay zeros."""
        codec, schema, values = self.codec(), self.schema(), self.values(scale=scale)

        decoded = codec.decode(schema, codec.encode(schema, values))

        schema.check(decoded)
        for name, value in values.items():
            assert decoded[name].dtype == np.float32
            if codec.traits.max_error is not None:
                most = codec.traits.max_error * float(np.abs(value).max()) * (1 + 1e-5)
                assert float(np.abs(decoded[name] - value).max()) <= most
        zeros = codec.decode(schema, codec.encode(schema, schema.zeros()))
        assert not any(value.any() for value in zeros.values())

    @pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "mostly zeros", "of unlike sizes"])
    def test_the_mean_error_is_what_is_stated(self, kind: str) -> None:
        """The squared error over the squared length, over many updates, is not above `mean_error`."""
        codec, schema = self.codec(), self.schema()
        if codec.traits.mean_error is None:
            pytest.skip("it does not state a mean error")

        shares = [self._share(codec, schema, self.values(stream, kind=kind), stream) for stream in range(SHARES)]

        spread = 5 * float(np.std(shares)) / SHARES**0.5
        assert float(np.mean(shares)) <= codec.traits.mean_error + spread + 1e-12

    def _share(self, codec: Codec, schema: Schema, values: dict[str, Array], stream: int) -> float:
        decoded = codec.decode(schema, codec.encode(schema, values, seed_of(stream)))
        lost = sum(float(np.square(decoded[n] - v, dtype=np.float64).sum()) for n, v in values.items())
        return lost / sum(float(np.square(v, dtype=np.float64).sum()) for v in values.values())

    def test_what_was_decoded_encodes_to_the_same_values(self) -> None:
        """Where `max_error` is stated, a decoded value goes through unchanged but for rounding of its scale."""
        codec, schema = self.codec(), self.schema()
        if codec.traits.max_error is None:
            pytest.skip("it rounds at random what it has rounded before")
        once = codec.decode(schema, codec.encode(schema, self.values()))

        twice = codec.decode(schema, codec.encode(schema, once))

        for name, value in once.items():
            np.testing.assert_allclose(twice[name], value, atol=float(np.abs(value).max()) * 1e-5)

    def test_the_length_follows_from_the_schema(self) -> None:
        """It is exact, whatever the values, and no tensor at all takes no more."""
        codec, schema = self.codec(), self.schema()
        sizes = {len(codec.encode(schema, self.values(stream, 10.0**stream))) for stream in range(-3, 4)}

        assert sizes == {codec.encoded_size(schema)}
        nothing = Schema(())
        assert len(codec.encode(nothing, {})) == codec.encoded_size(nothing)
        assert codec.decode(nothing, codec.encode(nothing, {})) == {}

    def test_equal_tensors_give_equal_bytes(self) -> None:
        """Also from another instance: a coordinator that resumes encodes its broadcast again."""
        schema, values, seed = self.schema(), self.values(), seed_of("again")

        assert self.codec().encode(schema, values, seed) == self.codec().encode(schema, values, seed)

    def test_another_length_is_refused(self) -> None:
        """By `CodecError`, before anything is read."""
        codec, schema = self.codec(), self.schema()
        size = codec.encoded_size(schema)

        for wrong in (0, 1, size - 1, size + 1, 2 * size):
            with pytest.raises(CodecError):
                codec.decode(schema, bytes(wrong))

    def test_hostile_bytes_decode_to_the_schema_or_are_refused(self) -> None:
        """Nothing but `CodecError` comes of them, and never a tensor of another shape."""
        codec, schema = self.codec(), self.schema()
        draw = np.random.Generator(np.random.Philox(3))
        size = codec.encoded_size(schema)
        payloads = [bytes(size), b"\xff" * size, b"\x7f" * size, b"\x80" * size]
        payloads += [draw.bytes(size) for _ in range(200)]

        for payload in payloads:
            try:
                with np.errstate(all="ignore"):
                    decoded = codec.decode(schema, payload)
            except CodecError:
                continue
            schema.check(decoded)
            assert all(value.dtype == np.float32 for value in decoded.values())

    def test_tensors_of_another_schema_are_refused(self) -> None:
        """By `SchemaError`."""
        codec, schema, values = self.codec(), self.schema(), self.values()

        for wrong in ({"t0": values["t0"]}, values | {"t1": np.zeros(4, np.float32)}):
            with pytest.raises(SchemaError):
                codec.encode(schema, wrong)

    def test_what_is_not_a_number_is_refused_or_stays_one(self) -> None:
        """NaN and infinities never come out as ordinary numbers: the other side refuses them by what they are."""
        codec, schema = self.codec(), self.schema()

        for strange in (np.nan, np.inf, -np.inf):
            values = self.values()
            values["t2"][0, 0] = strange
            try:
                with np.errstate(all="ignore"):
                    decoded = codec.decode(schema, codec.encode(schema, values))
            except CodecError:
                continue
            assert not np.isfinite(decoded["t2"]).all()

    def test_the_largest_value_can_be_sent(self) -> None:
        """And comes out finite."""
        codec = self.codec()
        schema = Schema((TensorSpec("t", "m", Role.BIAS, (2,)),))
        most = np.float32(min(codec.largest, float(np.finfo(np.float32).max)))

        decoded = codec.decode(schema, codec.encode(schema, {"t": np.array([most, -most], np.float32)}))

        assert np.isfinite(decoded["t"]).all()

    def test_an_unbiased_codec_has_no_bias(self) -> None:
        """The mean error over many seeds is within 6 standard errors of 0, and 2^-14 of the largest value."""
        codec = self.codec()
        if not codec.traits.unbiased:
            pytest.skip("it does not say that it is unbiased")
        schema = Schema((TensorSpec("t", "m", Role.BIAS, (5,)),))
        fixed = np.array([1.0, -0.7312, 0.3337, 0.01234, -0.5], np.float32)

        errors = np.empty((DRAWS, len(fixed)))
        for row in range(DRAWS):
            decoded = codec.decode(schema, codec.encode(schema, {"t": fixed}, seed_of(row)))
            errors[row] = decoded["t"].astype(np.float64) - fixed

        assert (np.abs(errors.mean(0)) <= 6 * errors.std(0) / np.sqrt(DRAWS) + 2.0**-14).all()
        if codec.traits.max_error is not None:
            assert (errors.std(0) <= codec.traits.max_error + 1e-7).all()

    def test_a_linear_codec_adds_up(self) -> None:
        """What is decoded from a sum is the sum of what is decoded."""
        codec, schema = self.codec(), self.schema()
        if not codec.traits.linear:
            pytest.skip("it does not say that it is linear")

        def through(tensors: dict[str, Array]) -> dict[str, Array]:
            return codec.decode(schema, codec.encode(schema, tensors))

        ours, theirs = self.values(1), self.values(2)
        together = through({name: ours[name] + theirs[name] for name in ours})
        for name, value in together.items():
            np.testing.assert_allclose(value, through(ours)[name] + through(theirs)[name], rtol=1e-6, atol=1e-6)
