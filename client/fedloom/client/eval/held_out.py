"""Scores of an adapter on held-out rows that lie here: what the starting adapter and what a run's adapter make of them.

The rows are never private data: a score is computed without noise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from fedloom.client.data.load import Split, load_rows
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import Encoded, encode
from fedloom.client.eval.score import Score, evaluate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.models.exports.adapter_folder import is_folder
from fedloom.client.models.exports.loading import is_merged, load_exported
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy
from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.schema import Tensors
from fedloom.strategies.start import starting_adapter

__all__ = ["HeldOut", "drawn", "held_out"]


def held_out(config: RunConfig, source: str, split: Split = "test") -> Rows:
    """At most evaluation.max_examples rows of a data set, drawn by the run's seed: the same in every process.

    Args:
        config: The run file; its [data] section, if there is one, says how the files are read.
        source: A packaged data set, or a file or folder, see docs/data.md.
        split: Which part of it.

    Raises:
        DataError: See `load_rows`.
    """
    return drawn(load_rows(source, config.model.labels, split, config.model.task, config.data), config)


def drawn(rows: Rows, config: RunConfig) -> Rows:
    """At most evaluation.max_examples of these rows, drawn by the run's seed."""
    rng = np.random.default_rng([config.run.seed, 1])
    return rows.take(np.sort(rng.permutation(len(rows))[: config.evaluation.max_examples]))


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows and the run's model, loaded once for any number of scores."""

    config: RunConfig
    model: AdapterModel
    rows: Encoded

    @classmethod
    def load(cls, config: RunConfig, source: str, split: Split = "test") -> Self:
        """Load both, the rows first, in which more can be wrong.

        Raises:
            DataError: See `held_out`.
            ModelError: See `load_model`.
        """
        rows = held_out(config, source, split)
        model = load_model(config.model, config.adapter, ComputePolicy.of(config.engine))
        return cls(config, model, model.prepared(encode(rows, model.tokenizer, config.model.max_length)))

    def score(self, adapter: Tensors) -> Score:
        """Score a result of a run, see `fedloom.strategies.result`."""
        self.model.show(adapter)
        return evaluate(self.model, self.rows, generate=self.config.evaluation.generate)

    def score_start(self) -> Score:
        """Score the adapter that the run begins with."""
        return self.score(starting_adapter(self.model.schema, self.config.run.seed))

    def score_exported(self, folder: Path) -> Score:
        """Score a PEFT adapter or a merged model that a run left, as its user has it.

        Raises:
            ModelError: See `exported`.
        """
        return evaluate(self.exported(folder), self.rows, generate=self.config.evaluation.generate)

    def exported(self, folder: Path) -> AdapterModel:
        """A PEFT adapter or a merged model that a run left, as its user has it; its tensors have no schema.

        Raises:
            ModelError: The folder has none, or one of another base model, task or labels.
        """
        section, known = self.config.model, _facts(folder)
        base, compute = resolve_base(section.base), ComputePolicy.of(self.config.engine)
        ours = {
            "task": section.task,
            "labels": list(section.labels),
            "base_digest": section.digest or base_digest(base),
            "audio_seconds": section.audio_seconds,
        }
        for key, here in ours.items():
            if known.get(key) != here:
                raise ModelError(
                    f"the adapter in {folder} was trained with {key} {known.get(key)!r}, the run file has {here!r}; "
                    "give the run file that it was trained with"
                )
        try:
            count, side, seconds = len(section.labels), section.image_size, section.audio_seconds
            plain = load_exported(base, folder, count, section.task, side, compute, seconds)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"the adapter in {folder} cannot be loaded: {error}; export it again") from error
        return AdapterModel(plain, self.model.tokenizer, [], 1.0, self.model.device, self.model.task)


def _facts(folder: Path) -> dict[str, object]:
    """What fedloom.json says of an adapter."""
    whole = is_merged(folder) or is_folder(folder) or (folder / "adapter_config.json").is_file()
    if not (whole and (folder / "fedloom.json").is_file()):
        raise ModelError(
            f"{folder} holds no adapter that a run left: fedloom.json and adapter_config.json are needed, or the "
            "config.json of a merged model; give the folder `adapter` or `merged` of a run, or what `fedloom export` "
            "wrote with format peft, merged or fedloom"
        )
    try:
        return read_json(folder / "fedloom.json")
    except ConfigError as error:
        raise ModelError(f"{error}; export the adapter again") from error
