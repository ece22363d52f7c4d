"""What liars do to a federation under each way of aggregating: held-out accuracy by rule and attack.

Eighteen clients judge the sentiment of real sentences. Their sentences are read once by the real base model, whose
layers below the pooler stay frozen; what is trained is a LoRA pair on the pooler and the head, in numpy with exact
gradients. Assignments, updates and commits go through the real coordinator in this process, so that an update is
decoded, checked and refused as it would be over a socket. There is no privacy noise. Prints the table
of docs/robustness.md and writes benchmarks/attacks.json.

    python benchmarks/attacks.py
"""

import argparse
import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from fedloom.client.data.partitioners.api import partition
from fedloom.client.data.partitioners.group import Group
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import Encoded, collate, encode, microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import UpdateRejected
from fedloom.core.schema import Array, Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import PROTOCOL_VERSION, Assignment, UpdateHeader, broadcast_schema, upload_schema
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import build, completed
from fedloom.simulation.in_process.engine import standing_clock
from fedloom.strategies.start import starting_adapter

HERE = Path(__file__).resolve().parent
RUN_FILE = HERE.parent / "examples" / "sentiment.toml"
Float32 = npt.NDArray[np.float32]

CLIENTS, LIARS, RING = 18, 3, 6
"""Clients; how many of them attack each by itself; and how many collude."""
ROUNDS, STEPS, BATCH, RATE, RANK, SCALE = 20, 10, 32, 0.5, 16, 2.0
MAX_LENGTH, SKEW, NORM_BOUND = 32, 5.0, 0.4
SEEDS = (0, 1)

COMMON = (
    *("privacy.enabled=false", f"run.rounds={ROUNDS}", "rounds.min_clients=15", 'strategy.weighting="uniform"'),
    *("data.max_examples=3000", "evaluation.max_examples=1500", f"model.max_length={MAX_LENGTH}"),
)
RULES: dict[str, tuple[str, ...]] = {
    "fedavg": ("strategy.name=fedavg",),
    "ffa": ("strategy.name=ffa",),
    "ffa, norm bound": ("strategy.name=ffa", f"strategy.norm_bound={NORM_BOUND}"),
    "median": ("strategy.name=median", "strategy.options={num_byzantine=6}"),
    "trimmed-mean": ("strategy.name=trimmed-mean", "strategy.options={num_byzantine=6}"),
    "krum": ("strategy.name=krum", "strategy.options={num_byzantine=6}"),
    "krum on fedavg": ("strategy.name=krum", 'strategy.options={num_byzantine=6, inner="fedavg"}'),
    "multi-krum": ("strategy.name=multi-krum", "strategy.options={num_byzantine=6}"),
    "multi-krum on fedavg": ("strategy.name=multi-krum", 'strategy.options={num_byzantine=6, inner="fedavg"}'),
    "bulyan": ("strategy.name=bulyan", "strategy.options={num_byzantine=3}"),
}
"""Each rule bears six liars, a third; Bulyan three, the most it can among the fifteen updates that a round may have."""

Forge = Callable[[Sequence[Tensors], Sequence[Tensors]], list[Tensors]]


@dataclass(frozen=True)
class Attack:
    """What liars send in place of what they were asked for."""

    liars: int
    forge: Forge
    """From the changes that honest training gave each of them, in this round and in the first, to what they send."""
    flipped: bool = False
    """Whether they train on the opposite labels."""


@dataclass(frozen=True)
class Site:
    """One client's rows as the trained part of the model sees them."""

    features: Float32
    """What enters the pooler, shape (n, width)."""
    frozen: Float32
    """What leaves its frozen weight and bias, shape (n, width)."""
    labels: npt.NDArray[np.int64]


def times(factor: float) -> Forge:
    return lambda now, first: [{n: np.float32(factor) * t for n, t in each.items()} for each in now]


def blended(now: Sequence[Tensors], blend: Callable[[Float32], Array]) -> list[Tensors]:
    """The same forged change from every liar."""
    one = {name: blend(np.stack([each[name] for each in now])).astype(np.float32) for name in now[0]}
    return [one] * len(now)


def _reversed(now: Sequence[Tensors], first: Sequence[Tensors]) -> list[Tensors]:
    """All of them the opposite of their mean."""
    return blended(now, lambda values: -values.mean(axis=0))


def _little(now: Sequence[Tensors], first: Sequence[Tensors]) -> list[Tensors]:
    """A little is enough (Baruch et al., NeurIPS 2019): as far off their mean as the spread of the honest hides."""
    supporters = CLIENTS // 2 + 1 - RING
    z = NormalDist().inv_cdf((CLIENTS - RING - supporters) / (CLIENTS - RING))
    return blended(now, lambda values: values.mean(axis=0) - z * values.std(axis=0))


ATTACKS: dict[str, Attack] = {
    "none": Attack(0, lambda now, first: list(now)),
    "sign flip": Attack(LIARS, times(-1.0)),
    "scaling": Attack(LIARS, times(-100.0)),
    "label flip": Attack(LIARS, lambda now, first: list(now), flipped=True),
    "NaN": Attack(LIARS, times(math.nan)),
    "replay": Attack(LIARS, lambda now, first: list(first)),
    "free rider": Attack(LIARS, times(0.0)),
    "third, reversed": Attack(RING, _reversed),
    "third, little": Attack(RING, _little),
}


def run_file(seed: int, overrides: Iterable[str] = ()) -> RunConfig:
    return completed(load_run(RUN_FILE, (*COMMON, f"run.seed={seed}", *overrides)))


def pooler(model: AdapterModel) -> torch.nn.Linear:
    """The layer the pair goes on."""
    found = dict(model.model.named_modules())
    (layer,) = [m for n, m in found.items() if n.endswith("pooler.dense") and isinstance(m, torch.nn.Linear)]
    return layer


def site(model: AdapterModel, encoded: Encoded) -> Site:
    """Read every row once with the frozen base model; token vectors are averaged."""
    layer = pooler(model)
    encoder = model.model.base_model.model.base_model
    features = np.zeros((len(encoded), layer.in_features), np.float32)
    with torch.inference_mode():
        for part in microbatches(np.arange(len(encoded)), encoded, 128):
            batch = collate(encoded, part, model.tokenizer.pad_token_id)
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            features[part] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        frozen = layer(torch.from_numpy(features)).numpy()
    return Site(features, frozen, np.asarray(encoded.labels, np.int64))


def read() -> tuple[Rows, Site, Site]:
    """The training rows of all clients together, and what the trained part sees of them and of the held-out rows."""
    with tempfile.TemporaryDirectory(prefix="fedloom-attacks-") as folder:
        federation = build(run_file(0, ("data.clients=1", 'data.partition="iid"')), Path(folder))
    model = federation.model
    (rows,) = federation.clients.values()
    return rows, site(model, encode(rows, model.tokenizer, MAX_LENGTH)), site(model, federation.held_out)


def shared_out(rows: Rows, everything: Site, seed: int) -> dict[str, Site]:
    """Each client's part: sentences of one kind of source, with labels a little skewed."""
    parts = partition(rows, CLIENTS, Group(dirichlet_alpha=SKEW), seed)
    at = everything
    return {
        f"client-{index:02d}": Site(at.features[part], at.frozen[part], at.labels[part])
        for index, part in enumerate(parts)
    }


def schema_of(width: int) -> Schema:
    """A pair on the pooler, and the head."""
    return Schema(
        (
            TensorSpec("pooler.dense.lora_A", "pooler.dense", Role.LORA_A, (RANK, width)),
            TensorSpec("pooler.dense.lora_B", "pooler.dense", Role.LORA_B, (width, RANK)),
            TensorSpec("classifier.weight", "classifier", Role.HEAD, (2, width)),
            TensorSpec("classifier.bias", "classifier", Role.HEAD, (2,)),
        ),
        SCALE,
    )


def forward(values: Tensors, at: Site, rows: Any) -> tuple[Array, Array, Array]:
    """Logits, pooled output and the pair's inner values of some rows."""
    inner = at.features[rows] @ values["pooler.dense.lora_A"].T
    pooled = np.tanh(at.frozen[rows] + SCALE * inner @ values["pooler.dense.lora_B"].T)
    return pooled @ values["classifier.weight"].T + values["classifier.bias"], pooled, inner


def trained(start: Tensors, names: Iterable[str], at: Site, stream: Sequence[int], *, flipped: bool) -> Tensors:
    """The change of the tensors in `names` after a round of SGD on the mean cross-entropy."""
    values, draw = dict(start), np.random.default_rng(stream)
    labels = 1 - at.labels if flipped else at.labels
    for _ in range(STEPS):
        rows = draw.choice(len(labels), min(BATCH, len(labels)), replace=False)
        logits, pooled, inner = forward(values, at, rows)
        exps = np.exp(logits - logits.max(axis=1, keepdims=True))
        off = (exps / exps.sum(axis=1, keepdims=True) - np.eye(2, dtype=np.float32)[labels[rows]]) / len(rows)
        through = (off @ values["classifier.weight"]) * (1 - pooled**2)
        gradients = {
            "classifier.weight": off.T @ pooled,
            "classifier.bias": off.sum(axis=0),
            "pooler.dense.lora_B": SCALE * through.T @ inner,
            "pooler.dense.lora_A": SCALE * (through @ values["pooler.dense.lora_B"]).T @ at.features[rows],
        }
        values |= {name: (values[name] - RATE * gradients[name]).astype(np.float32) for name in names}
    return {name: values[name] - start[name] for name in names}


def accuracy(values: Tensors, at: Site) -> float:
    logits, _, _ = forward(values, at, slice(None))
    return float(np.mean(logits.argmax(axis=1) == at.labels))


def play(config: RunConfig, attack: Attack, clients: dict[str, Site], held_out: Site) -> tuple[float, int]:
    """One whole run; its accuracy, and how many updates the coordinator refused."""
    schema = schema_of(held_out.features.shape[1])
    starting, seed, refused = starting_adapter(schema, config.run.seed), config.run.seed, 0
    liars = set(np.random.default_rng([seed, 77]).permutation(sorted(clients))[: attack.liars].tolist())
    first: list[Tensors] = []
    with tempfile.TemporaryDirectory(prefix="fedloom-attacks-") as folder, Store(Path(folder), durable=False) as store:
        strategy = build_strategy(config)
        coordinator = Coordinator(
            config, schema, strategy, store, starting=starting, clock=standing_clock, expect=len(clients)
        )
        joined = {name: coordinator.join(name, PROTOCOL_VERSION, 0) for name in clients}
        address = next(iter(joined.values())).run, coordinator.epoch
        for name in clients:
            coordinator.work(name, *address)
        while not coordinator.finished:
            orders = {name: coordinator.work(name, *address) for name in sorted(clients)}
            changes: dict[str, Tensors] = {}
            for index, (name, order) in enumerate(orders.items()):
                assert isinstance(order, Assignment), f"{name} is not asked in round {coordinator.state.round}"
                payload = coordinator.blob(name, order.broadcast_digest, *address)
                start = codec(order.broadcast_codec).decode(broadcast_schema(schema, order), payload)
                names = [spec.name for spec in upload_schema(schema, order).tensors]
                stream = (seed, order.round, index)
                lies = attack.flipped and name in liars
                changes[name] = trained(start, names, clients[name], stream, flipped=lies)
            forging = sorted(liars)
            now = [changes[name] for name in forging]
            first = first or now
            changes |= zip(forging, attack.forge(now, first), strict=True)
            for name, order in orders.items():
                assert isinstance(order, Assignment)
                refused += not submitted(coordinator, schema, name, order, changes[name], address)
        return accuracy(coordinator.state.adapter, held_out), refused


def submitted(
    coordinator: Coordinator, schema: Schema, name: str, order: Assignment, change: Tensors, address: tuple[str, int]
) -> bool:
    """Send an update as a client does; False when it is refused."""
    upload = upload_schema(schema, order)
    body = codec(order.upload_codec).encode(upload, change)
    digest = hashlib.sha256(body).hexdigest()
    header = UpdateHeader(name, order.round, upload.digest, order.upload_codec, len(body), digest)
    try:
        coordinator.submit(header, body, *address)
    except UpdateRejected:
        return False
    return True


def study(seeds: Sequence[int], path: Path) -> list[dict[str, Any]]:
    """Every rule under every attack with every seed; the figures so far are kept after each."""
    began = time.monotonic()
    runs: list[dict[str, Any]] = []
    rows, everything, held_out = read()
    for seed in seeds:
        clients = shared_out(rows, everything, seed)
        for rule, overrides in RULES.items():
            config = run_file(seed, overrides)
            for name, attack in ATTACKS.items():
                score, refused = play(config, attack, clients, held_out)
                runs.append({"rule": rule, "attack": name, "seed": seed, "accuracy": score, "refused": refused})
            shown = " ".join(f"{run['accuracy']:.3f}" for run in runs[-len(ATTACKS) :])
            Console(stderr=True).print(f"seed {seed} {rule}: {shown}")
        write(path, runs, time.monotonic() - began)
    return runs


def write(path: Path, runs: list[dict[str, Any]], seconds: float) -> None:
    """Save every run and what it depends on."""
    settings = {
        **{"clients": CLIENTS, "liars": LIARS, "ring": RING, "rounds": ROUNDS, "steps": STEPS, "batch": BATCH},
        **{"rate": RATE, "rank": RANK, "scale": SCALE, "skew": SKEW, "norm_bound": NORM_BOUND},
        **{"rules": RULES, "run_file": COMMON},
    }
    document = {"seconds": round(seconds), "settings": settings, "runs": runs}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def cell(runs: Sequence[dict[str, Any]], rule: str, attack: str) -> float:
    """Mean accuracy over the seeds."""
    return mean(float(run["accuracy"]) for run in runs if (run["rule"], run["attack"]) == (rule, attack))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The table of docs/robustness.md, in percent."""
    lines = [["rule", *ATTACKS], ["---"] * (1 + len(ATTACKS))]
    lines += [[f"`{rule}`", *(f"{100 * cell(runs, rule, attack):.1f}" for attack in ATTACKS)] for rule in RULES]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run the study and show its table."""
    parser = argparse.ArgumentParser(description="attacks on each rule of aggregation")
    parser.add_argument("--json", type=Path, default=HERE / "attacks.json", help="where the figures go")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of partition, start and liars")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("fedloom").setLevel(logging.ERROR)  # every refused update is a warning
    runs = study(arguments.seeds, arguments.json)
    print(table(runs))


if __name__ == "__main__":
    main()
