"""What a private step does to a tiny model of each family, beside a loop over the examples by plain autograd.

`python -m tests.family_gradients` measures every family and writes families.json, from which docs/families.md is made.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedloom.client.data.tokens import collate
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.probe import made_up, probe
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.tasks.api import task_named
from fedloom.client.training.gradients import batch_loss
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.privacy.gaussian import deviation, longest
from tests.families import FAMILIES, LANGUAGE_MODELS, PICTURES, SOUNDS, SPEECH, save_family

__all__ = ["CASES", "MEASURED", "TARGETS", "TOLERANCE", "Case", "Result", "measured", "recorded"]

MEASURED = Path(__file__).with_name("families.json")
TARGETS = ("auto", "all-linear")
TOLERANCE = 1e-4
"""Most that a gradient, or a step, may be from the loop's, relative to its length, in float32."""

_LENGTH, _RATE, _NOISE = 16, 0.5, 0.8
_DECODERS = ("bart", "t5")
_WAVES = ("wav2vec2", "hubert")

Losses = Callable[[list[int]], torch.Tensor]
"""The sum of the losses of these examples, as they would be together in a batch of their own."""


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    family: str
    task: str
    """fedloom's name of it."""
    targets: str


@dataclass(frozen=True)
class Result:
    """What came of it: distances, or the reason for which fedloom refuses it."""

    layers: tuple[str, ...] = ()
    """Last names of the layers that got a pair."""
    values: int = 0
    """Trained values."""
    gradient: float = 0.0
    """Largest distance of an example's gradient to the loop's, relative to the length of the latter."""
    step: float = 0.0
    """Distance of a private step to the one of the loop's clipped gradients and the same noise, likewise."""
    refused: str = ""


def _heard(family: str) -> bool:
    """Whether it is one of sounds."""
    return family in SPEECH or family in SOUNDS


def _cases() -> Iterator[Case]:
    for family in (*FAMILIES, *PICTURES, *SPEECH, *SOUNDS):
        tasks = ["image-classification"] if family in PICTURES else ["text-classification"]
        tasks = ["speech-recognition"] * (family in SPEECH) + ["audio-classification"] if _heard(family) else tasks
        tasks += ["causal-lm"] * (family in LANGUAGE_MODELS) + ["seq2seq"] * (family in _DECODERS)
        for task in tasks:
            yield from (Case(family, task, targets) for targets in TARGETS)


CASES = tuple(_cases())


def measured(case: Case, base: Path, kind: str = "lora") -> Result:
    """Load the model of a folder as a private run does, probe it, and take one private step.

    Args:
        case: What to do with it.
        base: Where `save_family` has written it.
        kind: What is trained.
    """
    try:
        return _through_fedloom(case, base, kind)
    except ModelError as error:
        return Result(refused=_reason(str(error).replace(f" in {base}", "")))


def _reason(message: str) -> str:
    """A refusal without its remedy, and without the name of the layer that it met first."""
    what = message.partition("; ")[0]
    return what.partition(": ")[2] if what.startswith("trained layer") else what


def _through_fedloom(case: Case, base: Path, kind: str) -> Result:
    values: dict[str, Any] = {"base": str(base), "task": case.task, "max_length": _LENGTH}
    values |= {"head": "frozen"} if task_named(case.task).traits.generates else {"labels": ("a", "b", "c")}
    values |= {"audio_seconds": 1} if case.family in _WAVES else {}
    adapter = AdapterSection.model_validate({"kind": kind, "rank": 2, "alpha": 4, "targets": case.targets})
    model = load_model(ModelSection.model_validate(values), adapter)
    probe(model, lambda batch: batch_loss(model, batch), _LENGTH)
    rng = np.random.default_rng(1)
    model.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in model.schema.tensors})
    examples, pad = made_up(model, _LENGTH), getattr(model.tokenizer, "pad_token_id", 0)

    def losses(chosen: list[int]) -> torch.Tensor:
        return batch_loss(model, collate(examples, np.array(chosen), pad))

    layers = tuple(sorted({pair.module.rpartition(".")[2] for pair in model.schema.pairs}))
    return _compared(model.model, model.trainable(model.schema.roles), losses, len(examples), layers)


def _compared(
    model: nn.Module, parameters: list[nn.Parameter], losses: Losses, count: int, layers: tuple[str, ...]
) -> Result:
    """The examples together on fedloom's path, and each alone by autograd, without padding."""
    loop = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(losses([i]), parameters)]) for i in range(count)]
    )
    norms, width = loop.norm(dim=1), loop.shape[1]
    clip, before = float(norms.median()), torch.cat([each.detach().flatten() for each in parameters])
    with recording(model, parameters) as tape:
        descent = torch.optim.SGD(parameters, lr=_RATE)
        optimizer = PrivateOptimizer(
            descent, tape, Seeded(3), noise_multiplier=_NOISE, clip_norm=clip, expected_batch=count
        )
        tape.begin(count)
        torch.autograd.backward(losses(list(range(count))))
        together = tape.flat.clone()
        optimizer.accumulate()
        optimizer.release()
    moved = torch.cat([each.detach().flatten() for each in parameters]) - before
    noise = torch.from_numpy(Seeded(3).normal(deviation(_NOISE), width) / longest(width)).float() * clip
    expected = -_RATE * ((loop * (clip / norms).clamp(max=1)[:, None]).sum(0) + noise) / count
    return Result(
        layers,
        width,
        float(((together - loop).norm(dim=1) / norms).max()),
        float((moved - expected).norm() / expected.norm()),
    )


def recorded() -> dict[Case, Result]:
    """What families.json has."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))
    names = Case.__dataclass_fields__.keys()
    found = {}
    for row in rows:
        case = Case(**{name: row[name] for name in names})
        found[case] = Result(**{name: value for name, value in row.items() if name not in names})
    return {case: Result(**asdict(result) | {"layers": tuple(result.layers)}) for case, result in found.items()}


def main() -> None:
    """Measure all cases and write what came of them."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            base = Path(folder) / case.family
            result = measured(case, base if base.exists() else save_family(case.family, base))
            rows.append({**asdict(case), **{name: value for name, value in asdict(result).items() if value}})
            print(json.dumps(rows[-1]))
    MEASURED.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
