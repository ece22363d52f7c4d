"""Records as an MLflow run."""

import os
import time
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from fedloom.core.config.run import RunConfig
from fedloom.server.monitoring.recorders.api import RoundRecord, figures

__all__ = ["MLflow"]

_EXPERIMENT = "fedloom"


class MLflow:
    """A run in the experiment "fedloom" of mlflow.db in the run's folder, with the run file as its parameters.

    Where MLFLOW_TRACKING_URI names a tracking server, it is there instead.
    """

    def open(self, folder: Path, config: RunConfig) -> None:
        """Begin another MLflow run."""
        database = (folder / "mlflow.db").absolute()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}")
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
        self._run = self._client.create_run(experiment, run_name=config.run.name).info.run_id
        tables = config.model_dump(mode="json", exclude_none=True)
        params = [Param(f"{name}.{key}", str(value)) for name, keys in tables.items() for key, value in keys.items()]
        self._client.log_batch(self._run, params=params)

    def record(self, record: RoundRecord) -> None:
        """Write the figures of one round."""
        at_ms = round(1e3 * time.time())
        metrics = [Metric(name, value, at_ms, record.round) for name, value in figures(record).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)
