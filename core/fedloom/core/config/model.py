"""[model] of a run file: the base model and the task."""

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedloom.core import registry
from fedloom.core.config.parsing import FileName, OpenSection
from fedloom.core.errors import ConfigError

__all__ = ["ModelSection", "task_traits"]


def task_traits(task: str) -> Any:
    """What holds for the installed task of this name, see `fedloom.client.tasks.api.Traits`.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    try:
        return registry.load("tasks", task).traits  # type: ignore[attr-defined]  # what is registered is a class
    except ConfigError as error:
        raise ValueError(str(error)) from error


class ModelSection(OpenSection):
    """[model]: the frozen base model every client holds, and its task. Other keys are options of the task."""

    component: ClassVar[tuple[str, str]] = ("tasks", "task")
    base: FileName
    """Local folder in Hugging Face format, a name from `fedloom assets` such as minilm-l6, or ORG/NAME in this
    machine's hub cache."""
    digest: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")
    """Pin of the base model's files; a client whose folder differs refuses. None accepts what is found."""
    task: str = "text-classification"
    """Name of an installed task: what the model is trained for; see `fedloom components list tasks`."""
    labels: tuple[str, ...] = Field(default=(), max_length=10_000)
    """Label names, at least 2, which the labels in the data are, or the positions of. causal-lm and instruct have
    none."""
    max_length: int = Field(default=64, ge=8, le=8192)
    """Tokens kept of each text; its end is cut off."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side in pixels to which pictures are brought. None is the base model's own; many can read no other."""
    audio_seconds: int | None = Field(default=None, ge=1, le=3600)
    """Whole seconds of a recording that the model reads, for which it is cut down; what is longer is cut off. None is
    the base model's own, 30 with Whisper: of commands of 5 it would mostly read silence."""
    head: Literal["train", "frozen"] = "train"
    """Whether the classification head is trained (inside the clipped set) or stays at its start value. causal-lm and
    instruct add no head and need "frozen"."""

    @model_validator(mode="after")
    def _check(self) -> "ModelSection":
        # Another package's task is not imported because a peer names it; `check` has the rest.
        if registry.entries("tasks")[self.task].ours:
            self._check_task()
        return self

    def check(self, table: str) -> None:
        """As for every open section, and the rules of the task.

        Raises:
            ConfigError: Names the key.
        """
        super().check(table)
        try:
            self._check_task()
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check_task(self) -> None:
        traits = task_traits(self.task)
        if self.image_size is not None and not traits.images:
            raise ValueError(f"model.image_size is for images, not {self.task}; remove it")
        if (
            self.audio_seconds is not None
            and "audio_seconds" not in registry.options_model("tasks", self.task).model_fields
        ):
            raise ValueError(f"model.audio_seconds is for recordings, not {self.task}; remove it")
        if (traits.generates or traits.headless) and self.head == "train":
            raise ValueError(f'{self.task} adds no head that could be trained; set model.head = "frozen"')
        if self.labels and not traits.labels:
            raise ValueError(f"model.labels has {len(self.labels)} names but {self.task} has none; remove model.labels")
        if traits.labels and len(self.labels) < 2:
            raise ValueError(f"model.labels has {len(self.labels)} names; {self.task} needs at least 2: name them")

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run that does without a key is told and stored as by builds that do not know it: they would refuse it."""
        found: dict[str, Any] = plain(self)
        for name in ("image_size", "audio_seconds"):
            if found.get(name) is None:
                found.pop(name, None)
        return found
