"""Files of tables, run files and policies alike: read, overridden and checked, with errors that name the key."""

import json
import math
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from fedloom.core import registry
from fedloom.core.errors import ConfigError
from fedloom.core.spelling import meant

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _Metaclass
else:
    _Metaclass = type(BaseModel)  # pydantic has it in a private module, whose place may change

__all__ = ["FileName", "FilePath", "OpenSection", "Section", "explain", "parse", "put", "read_json", "read_toml"]

M = TypeVar("M", bound=BaseModel)
P = TypeVar("P", str, Path)


class _Checked(_Metaclass):
    """Constructors that raise what a file with the same mistake raises."""

    if not TYPE_CHECKING:  # the fields alone are the signature that editors and type checkers show

        def __call__(cls, /, **values):
            """An instance of these values.

            Raises:
                ConfigError: A value is wrong, unknown or missing.
            """
            try:
                return super().__call__(**values)
            except ValidationError as error:
                raise ConfigError(f"{cls.__name__}: {explain(error, cls)}") from error


class Section(BaseModel, metaclass=_Checked):
    """One table of a file: frozen, numbers are finite, and strangers are refused.

    Raises:
        ConfigError: A value is wrong, unknown or missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class OpenSection(Section):
    """One table that names a component: keys beyond its own are that component's options."""

    component: ClassVar[tuple[str, str]]
    """The component's group, and the key that names it."""
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        group, key = self.component
        name, installed = getattr(self, key), registry.entries(group)  # a list of names: nothing is imported
        if name not in installed:
            raise ValueError(f"{key} = {name!r}: no such {registry.noun(group)}; {_nearest(name, installed)}")
        return self

    @model_validator(mode="after")
    def _plain(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            values = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(each, bool | int | float | str) for each in values):
                raise ValueError(f"{key} must be a number, a text, true or false, or a list of those")
            if any(isinstance(each, float) and not math.isfinite(each) for each in values):
                raise ValueError(f"{key} must be finite")
        return self

    def built(self) -> Any:
        """The component that this table names, with its options: keys beyond the table's own, and those they share.

        Raises:
            ConfigError: There is no such component here, or it refuses its options.
        """
        group, key = self.component
        name = getattr(self, key)
        shared = type(self).model_fields.keys() & registry.options_model(group, name).model_fields.keys()
        return registry.build(group, name, {each: getattr(self, each) for each in shared} | (self.model_extra or {}))

    def check(self, table: str) -> None:
        """Refuse keys that neither this table nor its component has.

        Nothing is imported for a table with keys of its own alone.

        Raises:
            ConfigError: Names the key by its `table`.
        """
        if not self.model_extra:
            return
        group, key = self.component
        allowed = [*type(self).model_fields, *registry.options_model(group, getattr(self, key)).model_fields]
        for extra in self.model_extra:
            if extra not in allowed:
                raise ConfigError(f"unknown key '{table}.{extra}'; {_nearest(extra, allowed)}")
        self.built()


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, with or without a byte-order mark.

    Raises:
        ConfigError: The file is missing or not TOML in UTF-8.
    """
    try:
        # utf-8-sig and the line ends: as editors and shells of Windows leave them.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as TOML: it is not in UTF-8; save it as UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        said = str(error)
        hint = f". {_BACKSLASHES}" if "\\" in said or "hex value" in said else ""
        raise ConfigError(f"{path} cannot be read as TOML: {said}{hint}") from error


_BACKSLASHES = (
    "A backslash between double quotes begins an escape: write a path of Windows with / or between single quotes, "
    "'C:\\data\\train.csv'"
)


def _plain(value: P) -> P:
    """Refuse what an escape made of a path of Windows, such as a line break of the beginning of new.csv.

    Raises:
        ValueError: It has control characters.
    """
    if any(character < " " or character == "\x7f" for character in str(value)):
        raise ValueError(f"a path has a control character. {_BACKSLASHES}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: The file is missing or is not a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds a JSON {type(document).__name__}; an object is needed")
    return document


FileName = Annotated[str, AfterValidator(_plain)]
"""A file or folder, or the name of one that is fetched."""

FilePath = Annotated[Path, AfterValidator(_plain)]
"""A file or folder."""


def parse(model: type[M], tables: dict[str, Any], overrides: tuple[str, ...] = (), *, source: str) -> M:
    """Tables plus overrides as a checked `model`.

    Raises:
        ConfigError: A key is unknown, missing or has a wrong value.
    """
    for override in overrides:
        _apply(tables, override)
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, model)}") from error


def _apply(tables: dict[str, Any], override: str) -> None:
    """Set one `a.b=value`; the value is read as TOML, and as a plain string when it is not."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise ConfigError(f"override {override!r} must look like section.key=value, e.g. run.rounds=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    put(tables, path.strip(), value)


def put(tables: dict[str, Any], path: str, value: object) -> None:
    """Set the value of one `section.key` in place; what is missing on the way is made.

    Raises:
        ConfigError: A part of the way is a value.
    """
    *sections, key = path.split(".")
    table = tables
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path!r} cannot be set: {section!r} is a value, not a section")
    table[key] = value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one sentence, with a did-you-mean for an unknown key."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(model, first["loc"][:-1])
        return f"unknown key {where!r}; {_nearest(str(first['loc'][-1]), allowed)}"
    if first["type"] == "missing":
        return f"{where!r} is missing; add it"
    received = first.get("input")
    shown = "" if isinstance(received, dict) else f" (received {received!r})"
    return f"{where or 'file'}: {first['msg']}{shown}"


def _nearest(word: str, allowed: Collection[str]) -> str:
    return meant(word, allowed) or f"allowed: {', '.join(sorted(set(allowed))) or 'none'}"


def _keys_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Valid keys of the section that `path` leads to."""
    for part in path:
        annotation: Any = model.model_fields[part].annotation if part in model.model_fields else None
        choices = [annotation, *getattr(annotation, "__args__", ())]
        nested = [each for each in choices if isinstance(each, type) and issubclass(each, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
