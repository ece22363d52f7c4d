"""Random and extreme numbers in runs, assignments and adapters, through the client as it is up to the charge.

Each is refused with one of fedloom's errors, or is accepted: then every number of it is within its range, and a step
with these numbers releases noise of at least sigma times C in the units of what is released. `FEDLOOM_PROVE=1` tries
100,000.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from torch import nn

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import System
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.participant import Participant
from fedloom.client.training.local_eval import released
from fedloom.client.training.trainer import Trainer
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError
from fedloom.core.schema import Array, Role, Schema
from fedloom.proto.message_codec import checked
from fedloom.proto.messages import Answer, Assignment, Joined, RoundStatus, UpdateHeader

CASES = 100_000 if os.environ.get("FEDLOOM_PROVE") == "1" else 1_500
ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})
WIDTH = 256
"""Values of the step whose noise is measured. Its spread is then within a third of the truth, but for one in 10^12."""

NUMBERS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-9, 1e-6, 1e-5, 1e-3, 1e4, 1e6, 0.9999, 1.0 + 2**-52, 1.0 - 2**-53, 1e-45),
    *(
        2.0**-149,
        0.55 * 2.0**-149,
        2.0**-126,
        2.0**-1074,
        1e-300,
        1e-38,
        3.4e38,
        3e38,
        1e38,
        1e308,
        math.inf,
        -math.inf,
    ),
    *(math.nan, 2.0**31, 2.0**31 - 1, 2.0**53, 2.0**63, 5000.0, 65504.0, 65520.0, 100.0, 1000.0, 1e30),
)

RANGES: dict[tuple[str, str], tuple[float, float]] = {
    ("run", "rounds"): (1, 10_000),
    ("model", "max_length"): (8, 8192),
    ("adapter", "rank"): (1, 512),
    ("adapter", "alpha"): (1e-4, 1e4),
    ("train", "steps"): (1, 1000),
    ("train", "sampling_rate"): (1e-9, 0.5),
    ("train", "learning_rate"): (1e-9, 1000),
    ("train", "head_learning_rate"): (1e-9, 1000),
    ("train", "momentum"): (0, 0.9999),
    ("train", "proximal_mu"): (0, 1e4),
    ("train", "microbatch"): (1, 1024),
    ("train", "warmup"): (0, 9_999),
    ("train", "ema"): (0, 0.9999),
    ("privacy", "epsilon"): (1e-3, 1e4),
    ("privacy", "delta"): (1e-15, 1e-3),
    ("privacy", "clip_norm"): (1e-3, 1e3),
    ("privacy", "noise_multiplier"): (0.3, 1000),
    ("privacy", "noise_bands"): (1, 64),
    ("secure_aggregation", "threshold"): (0.5, 1),
    ("secure_aggregation", "max_change"): (1e-6, 1e6),
    ("secure_aggregation", "max_clients"): (3, 1000),
    ("secure_aggregation", "max_norm"): (1e-6, 1e6),
    ("secure_aggregation", "step_deadline_s"): (0, 1e8),
    ("federated_evaluation", "every"): (1, 100_000),
    ("federated_evaluation", "noise_multiplier"): (0.3, 1000),
    ("federated_evaluation", "max_loss"): (1e-3, 1e4),
}
"""What a client with the default policy and 1,000 declared examples accepts, written out here once more by hand: a
range that is lost elsewhere is missed."""


class Charged(Exception):
    """The client accepted the round and would now charge it."""


@dataclass
class Script:
    """A coordinator that tells one run and asks for one round."""

    joined: Joined
    work_: Answer
    payload: bytes

    def join(self, client: str, declared_examples: int) -> Joined:
        return self.joined

    def work(self, held: str = "") -> Answer:
        return self.work_

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        return self.payload

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        raise AssertionError("nothing is trained here")

    def exchange(self, message: object) -> None:
        raise AssertionError("nothing is summed here")

    def heartbeat(self) -> RoundStatus:
        raise AssertionError("nobody is waited for here")

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None: ...


@dataclass
class Fields:
    """An assignment as a peer may write it, with numbers that protobuf would not even carry."""

    round: int = 0
    rank: int = 0
    base_rank: int = 0
    broadcast_codec: str = "fp32"
    broadcast_digest: str = "0" * 64
    broadcast_bytes: int = 0
    upload_codec: str = "fp32"
    train: tuple[str, ...] = tuple(sorted(ALL))
    personal: tuple[str, ...] = ()
    broadcast_roles: tuple[str, ...] = tuple(sorted(ALL))
    linear: tuple[str, ...] = ()
    local: dict[str, float] = field(default_factory=dict)


def numeric(model: type[BaseModel]) -> Iterator[tuple[str, bool, list[float]]]:
    """Name, whether it is whole, and the ends of the range of every numeric key of a section."""
    for name, info in model.model_fields.items():
        kinds = {info.annotation, *get_args(info.annotation)}
        if kinds & {int, float} and bool not in kinds:
            ends = [
                float(getattr(each, key))
                for each in info.metadata
                for kind, key in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt"))
                if isinstance(each, kind)
            ]
            yield name, int in kinds, ends


NUMERIC = [
    (section, *each)
    for section, info in Spec.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    for each in numeric(info.annotation)
]


def test_every_number_of_a_spec_has_two_ends_and_is_watched() -> None:
    """Watched are all but three, which change nothing private: the seed, and the sizes of pictures and recordings."""
    unwatched = {("run", "seed"), ("model", "image_size"), ("model", "audio_seconds")}
    assert all(len(ends) == 2 for section, name, _, ends in NUMERIC)
    assert {(section, name) for section, name, _, _ in NUMERIC} - unwatched == RANGES.keys()


def number(rng: np.random.Generator, whole: bool, ends: list[float]) -> float:
    """A number that is extreme, near an end of its range, within it, or anything at all."""
    way = rng.integers(4)
    if way == 0:
        value = float(rng.choice(NUMBERS))
    elif way == 1 and ends:
        end = float(rng.choice(ends))
        value = float(rng.choice([end, end * (1 + 1e-9), end * (1 - 1e-9), np.nextafter(end, math.inf)]))
    elif way == 2 and len(ends) == 2:
        low, high = max(ends[0], 1e-12), ends[1]
        value = float(np.exp(rng.uniform(math.log(low), math.log(high))))
    else:
        value = float(10 ** rng.uniform(-45, 38) * rng.choice([1, 1, 1, -1]))
    if whole and math.isfinite(value) and rng.random() < 0.9:
        return int(value)
    return value


def hostile_spec(rng: np.random.Generator, base: dict[str, Any]) -> str:
    tables = json.loads(json.dumps(base))
    for _ in range(rng.integers(0, 5)):
        section, name, whole, ends = NUMERIC[rng.integers(len(NUMERIC))]
        tables.setdefault(section, {})[name] = number(rng, whole, ends)
    if rng.random() < 0.2:
        tables["federated_evaluation"] = {**tables.get("federated_evaluation", {}), "enabled": True}
    if rng.random() < 0.05:
        tables["privacy"]["enabled"] = False
    return json.dumps(tables)


def hostile_fields(rng: np.random.Generator, schema: Schema) -> Fields:
    fields = Fields(broadcast_bytes=4 * schema.size)
    if rng.random() < 0.5:
        return fields
    ranges: dict[str, list[float]] = {"learning_rate": [1e-9, 1e4], "momentum": [0, 0.9999], "proximal_mu": [0, 1e4]}
    for _ in range(rng.integers(1, 3)):
        match rng.integers(7):
            case 0:
                fields = replace(fields, round=int(rng.choice([-1, 1, 2, 5000, 2**31 - 1, 2**32, 10**30])))
            case 1:
                rank = int(rng.choice([-1, 1, 2, 3, 4, 5, 512, 2**31]))
                size = 4 * schema.with_rank(rank).size if rank > 0 else 0
                fields = replace(fields, rank=rank, broadcast_bytes=size)
            case 2:
                fields = replace(fields, base_rank=int(rng.choice([-1, 1, 2**20, 2**62, 10**40])))
            case 3:
                fields = replace(fields, broadcast_bytes=int(rng.choice([-1, 0, 1, 2**32, 2**63])))
            case 4:
                fields = replace(fields, broadcast_codec=str(rng.choice(["fp16", "masked", "fp64", ""])))
            case 5:
                words = tuple(str(each) for each in rng.choice([*sorted(ALL), "linear", ""], rng.integers(1, 3)))
                size = 4 * schema.with_linear(words).size
                fields = replace(fields, linear=words, broadcast_bytes=size)
            case _:
                name = str(rng.choice([*ranges, "clip_norm", "steps", ""]))
                fields.local[name] = number(rng, False, ranges.get(name, []))
    return fields


def hostile_payload(rng: np.random.Generator, adapter: dict[str, Array], fields: Fields, schema: Schema) -> bytes:
    """A broadcast of the announced length: honest, with one value or a whole tensor changed, or any bits."""
    if not 0 <= fields.broadcast_bytes <= 8 * schema.size:
        return b""
    if fields.broadcast_bytes != 4 * schema.size or rng.random() < 0.1:
        return rng.bytes(fields.broadcast_bytes)
    values = {name: tensor.copy() for name, tensor in adapter.items()}
    if rng.random() < 0.4:
        name = str(rng.choice(list(values)))
        with np.errstate(over="ignore"):
            value = np.float32(number(rng, False, [-100.0, 100.0]))
        if rng.random() < 0.5:
            values[name][...] = value
        else:
            values[name].flat[rng.integers(values[name].size)] = value
    return codec("fp32").encode(schema, values)


@dataclass
class Noise:
    """Squares of released noise over what it must be at least, for the cases of a test together."""

    squares: float = 0.0
    values: int = 0
    figures: list[float] = field(default_factory=list)

    def step(self, spec: Spec, local: dict[str, float], declared: int) -> None:
        """A step on no data with the numbers that were accepted."""
        layer = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(layer.weight)
        parameters = list(layer.parameters())
        batch = spec.train.sampling_rate * declared
        rate = local.get("learning_rate", spec.train.learning_rate)
        sigma, clip = spec.privacy.noise_multiplier, spec.privacy.clip_norm
        assert sigma is not None
        with recording(layer, parameters) as tape:
            base = torch.optim.SGD(parameters, lr=rate)
            PrivateOptimizer(
                base, tape, System(), noise_multiplier=sigma, clip_norm=clip, expected_batch=batch
            ).release()
        assert layer.weight.grad is not None
        least = sigma * clip
        gradient = layer.weight.grad.double().numpy().ravel() * batch / least
        change = layer.weight.detach().double().numpy().ravel() * batch / rate / least
        for noise in (gradient, change):
            assert np.isfinite(noise).all()
            assert noise.std() > 2 / 3, f"noise of {noise.std():g} times sigma C in {spec}"
            assert len(np.unique(noise)) > WIDTH * 0.98, f"noise with few values in {spec}"
        self.squares += float(np.square(gradient).sum())
        self.values += WIDTH

    def evaluation(self, spec: Spec) -> None:
        """An evaluation of no rows with the noise that was accepted."""
        sigma = spec.federated_evaluation.noise_multiplier
        self.figures += [each / sigma for each in released([np.zeros((0, 2))], sigma, System())]

    def check(self) -> None:
        """Five standard errors below 1, and no more, over all cases."""
        mean = self.squares / self.values
        assert mean > 1 - 5 * math.sqrt(2 / self.values)
        if self.figures:
            spread = float(np.square(self.figures).mean())
            assert spread > 1 - 5 * math.sqrt(2 / len(self.figures))


def check_ranges(spec: Spec, local: dict[str, float]) -> None:
    for (section, name), (low, high) in RANGES.items():
        values = getattr(spec, section)
        value, off = getattr(values, name), section == "federated_evaluation" and not values.enabled
        if value is not None and not off:
            assert low <= value <= high, f"{section}.{name} = {value!r}"
    assert spec.privacy.noise_bands <= spec.train.steps
    assert spec.privacy.noise_bands * spec.train.sampling_rate <= 0.5
    for name, value in local.items():
        low, high = RANGES["train", name]
        assert low <= value <= high, f"local {name} = {value!r}"


@pytest.fixture
def site(tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Any) -> Iterator[Trainer]:
    """A site with the default policy, whose trainer stops where it would charge a round."""
    data = {"source": "x", "labels": spec.model.labels, "declared_examples": 1000, "held_out": 0.1}
    strict = Policy.model_validate({"client": {"name": "a", "state": str(tmp_path)}, "data": data})
    scored = spec.federated_evaluation.model_copy(update={"enabled": True})
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        yield Trainer(tiny_model, rows, spec.model_copy(update={"federated_evaluation": scored}), strict, ledger)
        assert ledger.charges() == []


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_whatever_is_sent_is_refused_uncharged_or_keeps_its_noise(
    site: Trainer, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def charged(*_: object) -> None:
        raise Charged

    monkeypatch.setattr(Trainer, "_reserve", charged)
    rng, outcomes, noise = np.random.default_rng(0), Counter[str](), Noise()
    base = json.loads(spec.model_dump_json()) | {"train": {**spec.train.model_dump(), "sampling_rate": 0.1}}
    adapter = site.model.read(site.model.schema)
    for _ in range(CASES):
        text = hostile_spec(rng, base)
        fields = hostile_fields(rng, site.schema)
        payload = hostile_payload(rng, adapter, fields, site.schema)
        fields.broadcast_digest = hashlib.sha256(payload).hexdigest()
        try:
            site.spec = told = Spec.from_json(text)
            line = Script(Joined("run", 1, told, site.schema), checked(Assignment, asdict(fields)), payload)
            client = Participant(line, site.policy, lambda _: site)
            client.join()
            client.step()
        except FedloomError as error:
            outcomes[type(error).__name__] += 1
        except Charged:
            outcomes["accepted"] += 1
            check_ranges(told, fields.local)
            noise.step(told, fields.local, 1000)
            if told.federated_evaluation.enabled:
                noise.evaluation(told)
        else:
            raise AssertionError(f"neither refused nor accepted: {text} {fields}")

    noise.check()
    print(f"{CASES} cases: {outcomes['accepted']} accepted and with their noise, the others refused before a charge")
    assert outcomes["accepted"] > 0.05 * CASES, outcomes
    for kind in ("ConfigError", "PolicyError", "ProtocolError", "CodecError"):
        assert outcomes[kind] > 0, outcomes
