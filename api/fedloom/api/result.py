"""What a simulation leaves: its adapter, its metrics and what it cost."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedloom.api.run import Run
from fedloom.core import registry
from fedloom.core.config.parsing import read_json
from fedloom.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedloom.client.eval.score import Score
    from fedloom.client.models.exports.gguf_files import Weights
    from fedloom.core.privacy.accounting import Statement
    from fedloom.server.monitoring.recorders.api import RoundRecord
    from fedloom.simulation.simulate import Result as Simulated

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """A finished simulation, see `simulate`."""

    run: Run
    """The run as it was asked for."""
    simulated: "Simulated"
    """What the simulation says of itself."""

    @property
    def folder(self) -> Path:
        """The run folder: run.toml, metrics.jsonl, summary.json, adapter/ and the clients' ledgers."""
        return self.simulated.folder

    @property
    def records(self) -> "list[RoundRecord]":
        """One for each round; round 0 is the starting adapter."""
        return self.simulated.records

    @cached_property
    def metrics(self) -> "pandas.DataFrame":
        """One row a round, by the round's number; round 0 is the starting adapter.

        Columns: accuracy (0 to 1) and loss (nats) on the held-out rows, the largest epsilon of the clients, clients,
        bytes_up, bytes_down and seconds since the start, and virtual_seconds where there are any. A round that was not
        evaluated has NaN.

        Raises:
            ConfigError: pandas is not installed.
        """
        from fedloom.simulation.run_folder import metrics_frame

        return metrics_frame(self.records)

    @property
    def accuracy(self) -> float:
        """Held-out accuracy of the result, 0 to 1."""
        return self.score.accuracy

    @property
    def score(self) -> "Score":
        """Accuracy, loss and confusion matrix of the result on the held-out rows."""
        return self.simulated.final

    @property
    def privacy(self) -> "dict[str, Statement]":
        """What each client has spent, by name, as its own ledger says; empty without privacy."""
        return self.simulated.privacy

    @property
    def epsilon(self) -> dict[str, float]:
        """Epsilon by client; empty without privacy."""
        return self.simulated.epsilon

    @property
    def user_epsilon(self) -> float | None:
        """Epsilon of a whole client, by the coordinator's noise; None without user-level privacy."""
        return self.simulated.user_epsilon

    @cached_property
    def adapter(self) -> "PeftModel | PreTrainedModel":
        """The base model with the adapter, loaded from the run folder as its user would, in evaluation mode.

        A PeftModel, or a model of transformers: merged, or with the layers of a kind that cannot be merged.
        """
        return self._load()

    def merged(self) -> Any:
        """The base model with the adapter folded into its weights, a plain model of transformers.

        Raises:
            ValueError: A merged weight would not be finite.
            ModelError: The kind of adapter cannot be merged.
        """
        from fedloom.client.models.exports.adapter_folder import is_folder

        if is_folder(self.simulated.exported):
            raise ModelError(f"{self.simulated.exported} cannot be merged; use `adapter`, the model with its layers")
        model = self._load()
        return model.merge_and_unload(safe_merge=True) if hasattr(model, "merge_and_unload") else model

    def export(self, format: Literal["onnx", "gguf"], folder: str | Path, weights: "Weights" = "f32") -> Path:
        """Write the whole model for other programs, as `fedloom export` does, and return the folder.

        Args:
            format: onnx for onnxruntime, of models that classify; gguf for llama.cpp, of language models like Llama.
            folder: Where to; what an earlier export left there is replaced.
            weights: Of gguf: f32 is exact, f16 half as large.

        Raises:
            ModelError: The model cannot be written so, or the kind of adapter cannot be merged.
            ConfigError: A package is missing, or the folder holds other files or cannot be written.
        """
        from fedloom.client.models.base_folder import resolve_base
        from fedloom.client.models.exports.gguf_files import write_gguf
        from fedloom.client.models.exports.onnx_graph import write_onnx

        if format not in ("onnx", "gguf"):
            raise ConfigError(f"format is {format!r}; give onnx or gguf, and for others see `adapter` and `merged`")
        folder, exported = Path(folder), self.simulated.exported
        with registry.locally(self.run.local):
            task = self.run.config.model.built()
            plain, reader = self.merged(), task.reader(resolve_base(self.run.config.model.base))
        known = read_json(exported / "fedloom.json")
        if format == "onnx":
            write_onnx(plain, reader, task, folder, known)
        else:
            adapter = exported if (exported / "adapter_config.json").is_file() else None
            write_gguf(plain, reader, task, folder, known, adapter, weights)
        return folder

    def plot(self) -> "Figure":
        """Accuracy and loss, and in a private run the largest epsilon, against the round."""
        from fedloom.simulation.run_folder import draw

        if "IPython" in sys.modules:
            with suppress(ImportError):  # a notebook then shows the figure rather than its name
                import matplotlib_inline.backend_inline  # noqa: F401
        return draw(self.folder.name, self.records)

    def _load(self) -> "PeftModel | PreTrainedModel":
        from fedloom.client.models.base_folder import resolve_base
        from fedloom.client.models.exports.loading import load_exported

        model = self.run.config.model
        base = resolve_base(model.base)
        with registry.locally(self.run.local):
            folder, count, seconds = self.simulated.exported, len(model.labels), model.audio_seconds
            return load_exported(base, folder, count, model.task, model.image_size, audio_seconds=seconds)

    def __repr__(self) -> str:
        """The figures that matter, in one line."""
        spent = f", epsilon {max(self.epsilon.values()):.2f}" if self.epsilon else ", not private"
        return f"fl.Result({str(self.folder)!r}: {self.records[-1].round} rounds, accuracy {self.accuracy:.1%}{spent})"
