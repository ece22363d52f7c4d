"""[data] of a run file: what a simulated federation learns from, and how it is split."""

from typing import Any

from pydantic import Field, model_validator

from fedloom.core.config.file_format import Form
from fedloom.core.config.parsing import FileName
from fedloom.core.errors import ConfigError
from fedloom.core.limits import MAX_CLIENTS
from fedloom.core.registry import check_options, options_model
from fedloom.core.spelling import meant

__all__ = ["DataSection"]

_OPTIONS_OF_0_1 = {"dirichlet_alpha": 0.5, "classes_per_client": 2, "size_exponent": 1.0, "shares": []}
"""What every run file that 0.1 wrote says of its partitioners, used or not, at their defaults."""


class DataSection(Form, extra="allow"):
    """[data]: the simulated federation's data; a real client's data is named in its own policy."""

    source: FileName
    """Name of a data source, see `fedloom components list data`, or a folder; see data.md for its layouts."""
    clients: int = Field(default=4, ge=1, le=MAX_CLIENTS)
    """Number of simulated clients."""
    partition: str = "iid"
    """Name of a partitioner, see `fedloom components list partitioners`; its options are keys of this section too."""
    max_examples: int | None = Field(default=None, ge=1)
    """Use at most this many training examples in all."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_0_1_wrote(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        unused = [key for key, default in _OPTIONS_OF_0_1.items() if values.get(key) == default]
        if not unused:
            return values
        own = _options_of(str(values.get("partition", "iid")))
        return {key: value for key, value in values.items() if key not in unused or key in own}

    @model_validator(mode="after")
    def _known(self) -> "DataSection":
        own = _options_of(self.partition)
        for key in self.options.keys() - own:
            allowed = sorted({*DataSection.model_fields, *own})
            hint = meant(key, allowed) or f"allowed with partition {self.partition!r}: {', '.join(allowed)}"
            raise ValueError(f"unknown key 'data.{key}'; {hint}")
        try:
            check_options("partitioners", self.partition, self.options)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The partitioner's options."""
        return dict(self.model_extra or {})


def _options_of(partition: str) -> frozenset[str]:
    try:
        return frozenset(options_model("partitioners", partition).model_fields)
    except ConfigError as error:
        raise ValueError(str(error)) from error
