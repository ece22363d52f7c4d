"""The work that every framework does, and how its script reports it. Needs no framework.

A script is given the folder of a `Work`, does it, and calls `report` once. What it trains begins at
`start.safetensors` and ends in `final.safetensors`, both under PEFT's names: the driver compares them, so a framework
that did less, or something else, is found out.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

__all__ = [
    "ALPHA",
    "LABELS",
    "RANK",
    "TARGETS",
    "Clock",
    "LoraModel",
    "Work",
    "all_rows",
    "changed",
    "empty_arrays",
    "flat",
    "given_work",
    "load_work",
    "report",
    "reported",
    "save_final",
    "unflat",
    "write_rows",
]

LABELS = ("negative", "positive")
RANK, ALPHA, TARGETS = 8, 16, ("query", "value")

_WORDS = (
    "film",
    "plot",
    "actor",
    "story",
    "scene",
    "music",
    "light",
    "sound",
    "very",
    "great",
    "awful",
    "slow",
    "loud",
)
"""Each is one token of MiniLM's vocabulary."""
_MARK = "PEER RESULT "


@dataclass(frozen=True)
class Work:
    """One piece of work."""

    kind: Literal["empty", "lora"]
    """empty: arrays go out and come back. lora: MiniLM's adapter and head are trained."""
    clients: int
    rounds: int
    """Rounds to commit; the first warms up and is not counted."""
    folder: str
    model: str = ""
    """Folder of the base model."""
    steps: int = 0
    """Of SGD, of each client in each round, each on all its rows."""
    batch: int = 0
    """Rows of each client."""
    tokens: int = 0
    """Of each row, its two special ones counted."""
    rate: float = 0.05
    """Learning rate of SGD."""
    cores: int = 1
    """How many cores the driver leaves: torch threads of all processes that train at a time."""
    private: bool = False
    """Whether steps are those of DP-SGD for each example, at a noise multiplier of 1."""

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def save(self) -> None:
        """Write work.json into the folder."""
        (self.path / "work.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def given_work() -> Work:
    """What the command line, a folder, says is to be done."""
    return load_work(sys.argv[1])


def load_work(folder: str) -> Work:
    """What is to be done in a folder."""
    return Work(**json.loads((Path(folder) / "work.json").read_text(encoding="utf-8")))


def write_rows(work: Work, seed: int = 0) -> None:
    """Write rows.json: for each client its texts and labels, each text of exactly `work.tokens` tokens."""
    rng = np.random.default_rng(seed)
    rows = [
        [
            {"text": " ".join(rng.choice(_WORDS, work.tokens - 2)), "label": LABELS[rng.integers(2)]}
            for _ in range(work.batch)
        ]
        for _ in range(work.clients)
    ]
    (work.path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


@lru_cache(maxsize=1)
def all_rows(folder: str) -> list[list[dict[str, str]]]:
    """What `write_rows` wrote, read once in a process."""
    rows: list[list[dict[str, str]]] = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    return rows


def empty_arrays() -> "dict[str, Array]":
    """786,432 float32 in 96 arrays: the pairs of rank 8 on query and value of a RoBERTa-large.

    Drawn, and sent back `changed`: Flower moves equal arrays only once.
    """
    rng = np.random.default_rng(0)
    names = [f"layer.{layer}.{target}" for layer in range(24) for target in TARGETS]
    shapes = {
        f"{name}.lora_{side}": shape for name in names for side, shape in (("A", (RANK, 1024)), ("B", (1024, RANK)))
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def changed(values: "Array", client: int) -> "Array":
    """What a client makes of values when nothing is trained."""
    return values * np.float32(0.5 + client / 16)


def flat(values: "Mapping[str, Array]") -> "Array":
    """All values in the order of their names."""
    return np.concatenate([np.ravel(values[name]) for name in sorted(values)])


def unflat(array: "Array", like: "Mapping[str, Array]") -> "dict[str, Array]":
    """The opposite of `flat`, with the names and shapes of `like`."""
    names = sorted(like)
    ends = np.cumsum([like[name].size for name in names])
    return {name: part.reshape(like[name].shape) for name, part in zip(names, np.split(array, ends[:-1]), strict=True)}


class LoraModel:
    """MiniLM with PEFT's pairs and a new head, in float32, resident; dropout is off, as in fedloom."""

    def __init__(self, work: Work, threads: int) -> None:
        """Load the base model and put the start in place; `threads` are torch's."""
        import torch
        from peft import LoraConfig, get_peft_model
        from safetensors.numpy import load_file
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(threads)
        self.work = work
        self.tokenizer: Any = AutoTokenizer.from_pretrained(work.model)
        base = AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=len(LABELS))
        pairs = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
        self.model: Any = get_peft_model(base, pairs).eval()
        trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        # As PEFT's files call them.
        self.parameters: dict[str, torch.nn.Parameter] = {
            name.replace(".modules_to_save.default", "").replace(".default", ""): each for name, each in trained.items()
        }
        self.show(load_file(work.path / "start.safetensors"))

    def batch(self, client: int) -> "dict[str, torch.Tensor]":
        """All rows of a client as the model's input."""
        import torch

        rows = all_rows(self.work.folder)[client]
        batch = dict(self.tokenizer([row["text"] for row in rows], return_tensors="pt"))
        assert batch["input_ids"].shape == (self.work.batch, self.work.tokens)
        return batch | {"labels": torch.tensor([LABELS.index(row["label"]) for row in rows])}

    def show(self, values: "Mapping[str, Array]") -> None:
        """Put values of the adapter in place."""
        import torch

        assert values.keys() == self.parameters.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(np.array(values[name])))

    def read(self) -> "dict[str, Array]":
        """The adapter's values."""
        return {name: each.detach().numpy().copy() for name, each in self.parameters.items()}

    def train(self, batch: "dict[str, torch.Tensor]") -> None:
        """A client's steps."""
        import torch

        optimizer = torch.optim.SGD(list(self.parameters.values()), lr=self.work.rate)
        for _ in range(self.work.steps):
            optimizer.zero_grad()
            self.model(**batch).loss.backward()
            optimizer.step()


class Clock:
    """When rounds were committed, in a file, since a framework may commit them in a process of its own."""

    def __init__(self, work: Work) -> None:
        self._path = work.path / "commits"

    def committed(self) -> None:
        """A round is committed now."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()!r}\n")

    def read(self) -> list[float]:
        """Seconds since 1970, one for each round."""
        return [float(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


def save_final(work: Work, values: "Mapping[str, Array]") -> None:
    """Write final.safetensors."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, work.path / "final.safetensors")


def report(packages: Sequence[str], commits: Sequence[float], **figures: Any) -> None:
    """Print what the driver reads: versions of the packages that did it, when rounds were committed, other figures."""
    found = {"commits": list(commits), "versions": dict(_versions(packages)), **figures}
    print(f"\n{_MARK}{json.dumps(found)}", flush=True)


def reported(output: str) -> dict[str, Any] | None:
    """What a script's output says it has done; None if it says nothing."""
    lines = [line for line in output.splitlines() if line.startswith(_MARK)]
    found: dict[str, Any] | None = json.loads(lines[-1].removeprefix(_MARK)) if lines else None
    return found


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in (*packages, "numpy", "torch", "transformers", "peft"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
