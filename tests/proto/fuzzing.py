"""Inputs for every decoder, made by changing sound ones; run as a script it reports errors and the lines reached."""

import argparse
import ast
import dataclasses
import hashlib
import inspect
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError, Message

from fedloom.client import policy as policy_module
from fedloom.client.session import outbox as spool_module
from fedloom.core import schema as schema_module
from fedloom.core.codecs import changes as changes_module
from fedloom.core.codecs import codec
from fedloom.core.codecs import dense as dense_module
from fedloom.core.codecs import packing as packing_module
from fedloom.core.codecs import rotated as rotated_module
from fedloom.core.codecs import rotation as rotation_module
from fedloom.core.codecs import rows as rows_module
from fedloom.core.codecs import top as top_module
from fedloom.core.codecs import uniform as uniform_module
from fedloom.core.codecs.changes import Change
from fedloom.core.config import parsing as tables_module
from fedloom.core.config import run as run_module
from fedloom.core.errors import FedloomError
from fedloom.core.registry import entries
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.secagg import fixed_point as fixed_module
from fedloom.core.secagg import keys as keys_module
from fedloom.core.secagg import lattice as lattice_module
from fedloom.core.secagg import shamir as shamir_module
from fedloom.core.secagg.keys import Advert, Place
from fedloom.core.secagg.steps import Step
from fedloom.flower.messages import Request, from_head
from fedloom.proto import checks as checks_module
from fedloom.proto import frames as frames_module
from fedloom.proto import message_codec as codec_module
from fedloom.proto import wire as wire_module
from fedloom.proto.messages import (
    Assignment,
    Finished,
    Joined,
    Link,
    RoundStatus,
    StepMessage,
    StepResult,
    UpdateHeader,
    Wait,
)
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.server.rounds import state as rounds_module
from fedloom.strategies import state as state_module
from fedloom.strategies.api import State
from tests.proto.mutating import as_json, as_toml, bent, garbled, of_bytes, of_messages, sized

DIGEST = "ab" * 32
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (4, 2))), 2.0)
RUN = {
    "run": {"name": "trial", "rounds": 3},
    "model": {"base": "tiny", "labels": ["no", "yes"]},
    "train": {"steps": 5, "sampling_rate": 0.1, "learning_rate": 0.5},
    "rounds": {"min_clients": 2},
}
POLICY = {
    "client": {"name": "a", "state": "s"},
    "data": {"source": "none", "declared_examples": 10},
    "secure_aggregation": {"peers": {"b": "0" * 64, "c": "1" * 64}},
}
SPEC = run_module.Spec.model_validate({name: RUN[name] for name in ("run", "model", "train")})


def parsed(kind: type[Message], use: Callable[[Any], object]) -> Callable[[bytes], object]:
    """What gRPC does with a message before anything of ours sees it, and then what ours does."""

    def decode(content: bytes) -> object:
        try:
            message = kind.FromString(content)
        except DecodeError as error:
            raise FedloomError(str(error)) from error
        return use(message)

    return decode


Decoder = tuple[str, Callable[[random.Random], bytes], Callable[[bytes], object]]
"""Name, maker of inputs, and what reads them."""


def from_peers() -> Iterator[Decoder]:
    """What reads messages."""
    kept, sent = frozenset({Role.HEAD}), frozenset({Role.LORA_A})
    assignment = Assignment(7, sent | kept, sent, DIGEST, 99, "fp16", "fp32", kept, 2, 16, {"learning_rate": 0.25})
    linked = dataclasses.replace(
        assignment, adapter=DIGEST, links=(Link(DIGEST, DIGEST, sent, kept, "fp16", DIGEST, 5),)
    )
    orders = (assignment, linked, Wait(1.5), Finished(9, "fp32", DIGEST, 56))
    answers = [wire_module.answer_to_wire(each) for each in orders]
    yield "work reply", of_messages(*answers), parsed(pb.WorkReply, wire_module.answer_from_wire)
    joined = wire_module.to_wire(pb.JoinReply, Joined(run="4f", epoch=3, spec=SPEC, schema=SCHEMA))
    yield "join reply", of_messages(joined), parsed(pb.JoinReply, partial(wire_module.from_wire, Joined))
    header = wire_module.header_to_wire(UpdateHeader("ward-3", 7, DIGEST, "fp16", 24, "cd" * 32), "4f", 3)
    yield "update header", of_messages(header), parsed(pb.UpdateHeader, wire_module.header_from_wire)
    step = wire_module.to_wire(
        pb.ExchangeRequest, StepMessage(7, Step.SHARE, {"": b"abc", "ann": b"x"}, 2), client="ben", run="4f", epoch=3
    )
    yield "step", of_messages(step), parsed(pb.ExchangeRequest, partial(wire_module.from_wire, StepMessage))
    result = wire_module.result_to_wire(StepResult(2, {"ann": b"abc"}))
    yield "step result", of_messages(result), parsed(pb.ExchangeReply, wire_module.result_from_wire)
    standing = wire_module.to_wire(pb.HeartbeatReply, RoundStatus(7, True, 3))
    yield (
        "heartbeat reply",
        of_messages(standing),
        parsed(pb.HeartbeatReply, partial(wire_module.from_wire, RoundStatus)),
    )
    head = codec_module.to_json(Request(Joined("4f", 3, SPEC, SCHEMA), assignment)).decode()
    yield "request in JSON", as_json(head), partial(from_head, Request)
    framed = [frames_module.framed(2, bytes(size)) for size in (0, 1, 200, 20_000)]
    yield "frame", of_bytes(*framed), lambda content: frames_module.unframed(2, content)


def from_files(folder: Path) -> Iterator[Decoder]:
    """What reads documents and files, some of which also come in messages."""
    yield "schema", as_json(SCHEMA.to_json()), lambda content: Schema.from_json(_text(content))
    yield "spec", as_json(SPEC.model_dump_json()), lambda content: run_module.Spec.from_json(_text(content))
    run_file, policy_file = folder / "run.toml", folder / "policy.toml"
    yield "run file", as_toml(RUN), _from_file(run_file, run_module.load_run)
    yield "policy file", as_toml(POLICY), _from_file(policy_file, policy_module.load_policy)
    yield "JSON file", as_json('{"model":{"a":1},"digest":"x"}'), _from_file(folder / "a.json", tables_module.read_json)


def from_payloads() -> Iterator[Decoder]:
    """What reads payloads."""
    zeros = SCHEMA.zeros()
    values = {name: np.linspace(-1, 1, zero.size, dtype=np.float32).reshape(zero.shape) for name, zero in zeros.items()}
    for name in entries("codecs"):
        payload = codec(name).encode(SCHEMA, values)
        yield name, sized(payload), partial(codec(name).decode, SCHEMA)
    change = Change({"m.A"}, {"m.B"}, "eden2")
    payload = changes_module.changed(SCHEMA, zeros, values, change, bytes(16))
    yield "change", sized(payload), lambda content: changes_module.followed(SCHEMA, zeros, content, change)
    fixed = fixed_module.FixedPoint(4.0, 16)
    masked = fixed.encode(SCHEMA, zeros)
    yield (
        "masked update",
        sized(masked),
        lambda content: fixed.mean(SCHEMA, fixed_module.words(content, "<u4"), b"", [b""] * 3),
    )
    lattice = lattice_module.Lattice(8, 4.0, 16)
    coded = lattice.encode(SCHEMA, values, bytes(16), bytes(16))
    yield (
        "masked update of 8 bits",
        sized(coded),
        lambda content: lattice.mean(SCHEMA, fixed_module.words(content, lattice.word), bytes(16), [bytes(16)] * 3),
    )
    share = shamir_module.share_to_bytes(5)
    yield (
        "share",
        sized(share),
        lambda content: shamir_module.secret_bytes(
            shamir_module.combine({1: shamir_module.share_from_bytes(content), 2: 7})
        ),
    )
    mine, peer = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    place, public = Place("4f", 1, 2), peer.public_key().public_bytes_raw()
    sealed = keys_module.seal_shares(peer, mine.public_key().public_bytes_raw(), place, "b", "a", bytes(66))
    yield (
        "sealed shares",
        sized(sealed),
        lambda content: keys_module.open_shares(mine, public, place, "b", "a", content),
    )
    advert = Advert(public, public, bytes(32), bytes(64)).to_bytes()

    def read_advert(content: bytes) -> object:
        found = Advert.from_bytes("b", content)
        keys_module.confirms(found.signature, found.mask_key, place, DIGEST, ["a", "b"])
        return keys_module.pair_key(mine, found.mask_key, place, "a", "b")

    yield "advert", sized(advert), read_advert


def from_disk(folder: Path) -> Iterator[Decoder]:
    """What reads state that was stored."""
    state = State(SCHEMA, SCHEMA.zeros(), 3, 2, {"moment": np.arange(3.0)})
    stored = state_module.state_to_bytes(state)
    yield "state", _state_like(stored), lambda content: state_module.state_from_bytes(content, SCHEMA)
    events: list[rounds_module.Event] = [
        rounds_module.RunCreated("4f", DIGEST, DIGEST, DIGEST),
        rounds_module.UpdateAccepted(3, "ann", DIGEST, 2.5),
        rounds_module.RoundClosed(3, ("ann", "ben"), "complete"),
    ]
    rows = [as_json(rounds_module.event_to_json(event)) for event in events]
    yield "event", lambda rng: rng.choice(rows)(rng), lambda content: rounds_module.event_from_json(_text(content))

    payload = b"\n payload \0"
    ready = UpdateHeader("a", 4, "f" * 64, "fp32", len(payload), hashlib.sha256(payload).hexdigest())
    outbox = folder / "outbox"
    spool_module.keep(outbox, spool_module.OutboxEntry("run-1", 7, ready, payload, None))
    (waiting,) = outbox.iterdir()
    note = {"run": "run-1", "charge": 7, "header": dataclasses.asdict(ready)}

    def resealed(rng: random.Random) -> bytes:
        """A note that was changed before it got its digest, as only its writer could do."""
        changed = json.dumps(bent(note, rng)).encode()
        sealed_note = hashlib.sha256(changed).hexdigest().encode()
        return b"\n".join((b"fedloom update 1", sealed_note, changed, payload))

    whole = waiting.read_bytes()
    yield (
        "outbox",
        lambda rng: resealed(rng) if rng.random() < 0.7 else garbled(whole, rng),
        _from_file(waiting, lambda path: spool_module.kept(path.parent, "run-1", "a")),
    )


def _text(content: bytes) -> str:
    """As protobuf hands a string over: it has refused what is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FedloomError(str(error)) from error


def _from_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def decode(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return decode


def _state_like(stored: bytes) -> Callable[[random.Random], bytes]:
    """A safetensors document whose header, or the text of scalars in it, is changed as JSON."""
    size = int.from_bytes(stored[:8], "little")
    head, body = json.loads(stored[8 : 8 + size]), stored[8 + size :]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return garbled(stored, rng)
        new = json.loads(json.dumps(head))
        scalars = json.loads(new["__metadata__"]["fedloom.state"])
        new["__metadata__"]["fedloom.state"] = json.dumps(bent(scalars, rng) if rng.random() < 0.5 else scalars)
        if rng.random() < 0.5:
            new = bent(new, rng)
        text = json.dumps(new).encode()
        return len(text).to_bytes(8, "little") + text + body

    return make


MODULES: tuple[ModuleType, ...] = (
    wire_module, frames_module, schema_module, tables_module, dense_module, rotated_module, rotation_module,
    rows_module, top_module, uniform_module, packing_module, changes_module, fixed_module, lattice_module,
    shamir_module, state_module, spool_module, checks_module, codec_module,
)  # fmt: skip


class Lines:
    """Lines of functions that raise or return something read from outside, and which of them have run."""

    def __init__(self) -> None:
        self.all: dict[str, set[int]] = {}
        self.reached: dict[str, set[int]] = {}
        for module in MODULES:
            path = str(inspect.getsourcefile(module))
            source = Path(path).read_text(encoding="utf-8")
            wanted = [
                node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and _reads(node)
            ]
            lines: set[int] = set()
            for code in _codes(compile(source, path, "exec")):
                if any(code.co_firstlineno in _starts(node) and code.co_name == node.name for node in wanted):
                    lines |= {line for each in _codes(code) for _, _, line in each.co_lines() if line is not None}
            self.all[path], self.reached[path] = lines, set()

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        lines = self.reached.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return self.trace


def _reads(node: ast.FunctionDef) -> bool:
    """Whether a function is on the way in: by its name, or because it is called there."""
    inward = (
        "from_", "decode", "unframed", "read_", "parse", "_parts", "_digest", "_size", "_roles", "_upload_codec",
        "words", "mean", "checked", "_score", "_local", "_step", "_oldest", "_epoch", "_wait", "combine",
        "secret_bytes", "_scalars", "_read", "kept", "explain", "_keys_at", "__post_init__",
        "unpack", "followed", "_check", "turned_back", "taken", "_moved",
    )  # fmt: skip
    return any(part in node.name for part in inward)


def _starts(node: ast.FunctionDef) -> range:
    """A decorated function's code begins at its first decorator."""
    return range(min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.lineno + 1)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs for each decoder of messages and files")
    parser.add_argument("--payloads", type=int, default=100_000, help="inputs for each decoder of payloads")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    lines, rows, found = Lines(), [], []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        payloads = [(each, given.payloads) for each in from_payloads()]
        others = [(each, given.inputs) for each in (*from_peers(), *from_files(home), *from_disk(home))]
        total_inputs = sum(inputs for _, inputs in (*others, *payloads))
        for (name, make, decode), inputs in (*others, *payloads):
            rng = random.Random(f"{given.seed} {name}")
            counts = {"accepted": 0, "refused": 0}
            for number in range(inputs):
                content = make(rng)
                # Tracing costs more than decoding, and the first inputs reach nearly all there is to reach.
                sys.settrace(lines.trace if number < 2000 else None)
                try:
                    decode(content)
                    counts["accepted"] += 1
                except FedloomError:
                    counts["refused"] += 1
                except Exception as error:
                    found.append(f"{name}: input {number} {content[:200]!r}: {error!r}")
                finally:
                    sys.settrace(None)
            rows.append({"decoder": name, **counts})
            print(f"{name:23} {counts['accepted']:8} accepted {counts['refused']:8} refused")
    wanted = {path: lines.all[path] for path in lines.all}
    missed = {Path(path).name: sorted(wanted[path] - lines.reached[path]) for path in wanted}
    total = sum(map(len, wanted.values()))
    reached = total - sum(map(len, missed.values()))
    # What getrusage says is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    report = {"inputs": total_inputs, "seed": given.seed, "decoders": rows, "lines": total, "lines_reached": reached,
              "missed": missed, "peak_rss_mib": round(peak_mib, 1), "errors": found[:20]}  # fmt: skip
    given.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{reached} of {total} lines of the decoders reached; peak {peak_mib:.0f} MiB")
    if found:
        sys.exit("\n".join(found[:20]))


if __name__ == "__main__":
    main()
