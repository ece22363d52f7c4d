"""Components by name: whatever is installed under the entry-point groups `fedloom.GROUP`, ours like anyone's.

A component is an object whose fields are its options and whose methods do the work. What is registered is what makes
it: a class (a dataclass or a pydantic model) or a function with annotated parameters. The first line of its docstring
is its summary, and the "Args:" part of the docstring describes its options.

Listing imports nothing. A name in a file or from a peer is only ever looked up among what is installed, and what this
process has let in by itself for a while, see `locally`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticSerializationError, to_json

from fedloom.core.docstrings import arguments
from fedloom.core.errors import ConfigError
from fedloom.core.spelling import meant

__all__ = [
    "GROUPS",
    "HERE",
    "OURS",
    "Entry",
    "build",
    "check_options",
    "entries",
    "faults",
    "lacking",
    "load",
    "locally",
    "name_of",
    "noun",
    "options_model",
    "refresh",
]

OURS = "fedloom"
"""The distribution of what comes with fedloom."""

HERE = "this process"
"""What stands for the distribution of a component that `locally` has let in; no package's name has spaces."""


class _Group(NamedTuple):
    noun: str
    methods: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


_GROUPS = {
    "strategies": _Group("strategy", ("init", "plan", "check", "fold", "commit", "result"), ("traits",)),
    "adapters": _Group("adapter", ("attach", "slots", "merge"), ("traits",)),
    "tasks": _Group("task", ("read", "encode", "loss", "right"), ("traits",)),
    "optimizers": _Group("optimizer", ("make", "longest_move")),
    "codecs": _Group("codec", ("encoded_size", "encode", "decode"), ("name", "largest", "traits")),
    "data": _Group("data source", ("records",), ("task",)),
    "partitioners": _Group("partitioner", ("split",)),
    "recorders": _Group("recorder", ("open", "record", "close")),
}

GROUPS: tuple[str, ...] = tuple(_GROUPS)
"""Groups of components, by the last part of their entry-point group: "codecs" is `fedloom.codecs`."""

_local: list[Mapping[tuple[str, str], Callable[..., Any]]] = []

# The annotations of plain scalars: a value of another type needs no more explanation than the list of options.
_WRONG_TYPE = frozenset({"bool_type", "float_type", "int_from_float", "int_type", "literal_error", "string_type"})


@dataclass(frozen=True)
class Entry:
    """One installed component, not imported."""

    name: str
    distribution: str
    """The package that brings it, as an installer names it."""
    version: str
    """Version of that package."""
    value: str
    """What is registered, as `module:object`."""

    @property
    def ours(self) -> bool:
        """Whether it comes with fedloom."""
        return self.distribution == OURS


class _Options(BaseModel):
    """Options of a component that is no pydantic model itself."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )


def refresh() -> None:
    """Look again at what is installed, in a process in which a package has just been."""
    _found.cache_clear()


@contextmanager
def locally(components: Mapping[tuple[str, str], Callable[..., Any]]) -> Iterator[None]:
    """Until the block ends, these classes are looked up as installed ones are, in every thread.

    It takes the classes themselves: nothing that a file or a peer says can open the block. A site's policy does not
    allow them unless it names them.

    Args:
        components: Classes by group and name, such as ("tasks", "MyTask").

    Raises:
        ConfigError: There is no such group, or an installed component has the name.
    """
    for group, name in components:
        if name in (taken := _points(group)):
            raise ConfigError(
                f"there is an installed {noun(group)} {name!r}, of {taken[name][0].distribution}; rename the class"
            )
    _local.append(components)
    try:
        yield
    finally:
        # By identity: another thread's block may hold equal ones.
        del _local[next(index for index, each in enumerate(_local) if each is components)]


def noun(group: str) -> str:
    """What one component of a group is called in messages: "strategy", "data source".

    Raises:
        ConfigError: There is no such group.
    """
    return _group(group).noun


def entries(group: str) -> dict[str, Entry]:
    """Every installed component of a group by name, in order, and local ones. Nothing is imported.

    Raises:
        ConfigError: There is no such group, or two distributions register the same name.
    """
    here = {name: Entry(name, HERE, "0", _value(make)) for name, make in _here(group).items()}
    return {name: entry for name, (entry, _) in _points(group).items()} | here


def name_of(group: str, component: object) -> str | None:
    """The name under which an object's class is installed; None if it is not.

    Raises:
        ConfigError: See `entries`.
    """
    home = _value(type(component))
    return next((name for name, entry in entries(group).items() if entry.value == home), None)


def load(group: str, name: str) -> Callable[..., Any]:
    """What makes the component called `name`: its class, or a function.

    Raises:
        ConfigError: The group or name is unknown, the name is taken twice, or what is registered cannot be imported
            or called.
    """
    kind, points, here = _group(group), _points(group), _here(group)
    if name in here:
        return here[name]
    if name not in points:
        raise ConfigError(f"unknown {kind.noun} {name!r}; {_nearest(name, [*points, *here])}")
    entry, point = points[name]
    try:
        made_by = point.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"{kind.noun} {name!r} of {entry.distribution} cannot be imported: {error}; {_remedy(point, error)}"
        ) from error
    if not callable(made_by):
        raise ConfigError(f"{kind.noun} {name!r} of {entry.distribution} is not callable; register its class")
    return cast(Callable[..., Any], made_by)


def build(group: str, name: str, options: Mapping[str, Any]) -> Any:
    """The component called `name` with its options.

    Args:
        group: One of `GROUPS`.
        name: Name of its entry point.
        options: Values as TOML or JSON has them; types are not converted, but for lists to tuples.

    Raises:
        ConfigError: See `load`; an option is unknown, missing, of the wrong type or out of range; or what is built
            lacks a method that its group needs.
    """
    make, checked = load(group, name), check_options(group, name, options)
    if isinstance(checked, _Options):
        given = {key: getattr(checked, key) for key in checked.model_fields_set}
        try:
            made = make(**given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{noun(group)} {name!r} refuses its options {dict(options)}: {error}") from error
    else:
        made = checked
    if lacks := lacking(group, made):
        value = entries(group)[name].value
        raise ConfigError(f"{value} is no {noun(group)}: it lacks {', '.join(lacks)}; implement them")
    return made


def options_model(group: str, name: str) -> type[BaseModel]:
    """The options of a component as a pydantic model: its own class, or one made of its parameters.

    Raises:
        ConfigError: See `load`; or its parameters cannot be options.
    """
    make = load(group, name)
    if isinstance(make, type) and issubclass(make, BaseModel):
        return make
    what = f"{noun(group)} {name!r}"
    try:
        parameters = inspect.signature(make, eval_str=True).parameters.values()
        loose = [each.name for each in parameters if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        if loose:
            raise ConfigError(f"{what} takes *{loose[0]}; name every option")
        about = arguments(inspect.getdoc(make) or "")
        found = {each.name: (_annotation(each), _field(make, each, about.get(each.name))) for each in parameters}
        model: type[BaseModel] = create_model(make.__name__, __base__=_Options, **cast(Any, found))
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"the options of {what} cannot be read: {error}; annotate its parameters") from error
    model.__doc__ = inspect.getdoc(make)
    return model


def check_options(group: str, name: str, options: Mapping[str, Any]) -> BaseModel:
    """The options as their model has them, without making the component.

    Raises:
        ConfigError: See `build`.
    """
    model, what = options_model(group, name), f"{noun(group)} {name!r}"
    try:
        # By way of JSON: strict about scalars, and a list may become a tuple.
        return model.model_validate_json(to_json(dict(options), inf_nan_mode="constants"), strict=True)
    except PydanticSerializationError as error:
        raise ConfigError(f"{what} got options that no run file can hold: {error}; give plain values") from error
    except ValidationError as error:
        raise ConfigError(_explained(what, model, options, error.errors(include_url=False))) from error


def faults(group: str, name: str) -> list[str]:
    """What is wrong with an installed component, as far as it shows without a model or data; none when all is well."""
    try:
        make, model = load(group, name), options_model(group, name)
        if not (inspect.getdoc(make) or "").strip():
            return [f"{noun(group)} {name!r} has no docstring; its first line is the summary"]
        model.model_json_schema()
        if not any(field.is_required() for field in model.model_fields.values()):
            build(group, name, {})
        elif isinstance(make, type) and (lacks := lacking(group, make)):
            return [f"{noun(group)} {name!r} lacks {', '.join(lacks)}; implement them"]
    except Exception as error:  # whatever another package's module raises while it is imported or built
        text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        return [text if repr(name) in text else f"{noun(group)} {name!r}: {text}"]
    return []


def _group(group: str) -> _Group:
    if group not in _GROUPS:
        raise ConfigError(f"unknown group of components {group!r}; {_nearest(group, list(_GROUPS))}")
    return _GROUPS[group]


def _here(group: str) -> dict[str, Callable[..., Any]]:
    """What `locally` has let in, by name."""
    return {name: make for each in tuple(_local) for (of, name), make in each.items() if of == group}


def _value(make: Callable[..., Any]) -> str:
    return f"{make.__module__}:{make.__qualname__}"


def _points(group: str) -> dict[str, tuple[Entry, EntryPoint]]:
    return _found(group, tuple(sys.path))


@cache
def _found(group: str, path: tuple[str, ...]) -> dict[str, tuple[Entry, EntryPoint]]:
    # Looking through all packages on the path, and reading who brings a component, takes tens of milliseconds; a
    # codec's name comes with every message.
    kind = _group(group)
    found: dict[str, tuple[Entry, EntryPoint]] = {}
    for point in entry_points(group=f"fedloom.{group}"):
        other = _entry(point)
        first, _ = found.setdefault(point.name, (other, point))
        # The same distribution may be seen twice (an editable install next to its build); that is no conflict.
        if first.distribution != other.distribution:
            raise ConfigError(
                f"{kind.noun} {point.name!r} is registered by both {first.distribution} and {other.distribution};"
                " uninstall one of them"
            )
    return dict(sorted(found.items()))


def _entry(point: EntryPoint) -> Entry:
    origin = ("unknown", "0") if point.dist is None else (point.dist.name, point.dist.version)
    return Entry(point.name, *origin, point.value)


def _remedy(point: EntryPoint, error: Exception) -> str:
    """An extra of the component's own name brings what it needs; otherwise its package is broken."""
    dist: Distribution | None = point.dist
    extras = (dist.metadata.get_all("Provides-Extra") or []) if dist else []
    if dist and isinstance(error, ModuleNotFoundError) and point.name in extras:
        return f"install {dist.name}[{point.name}]"
    return "reinstall that package"


def lacking(group: str, made: object) -> list[str]:
    """Methods and attributes that a component of this group needs and this object does not have."""
    kind = _group(group)
    methods = [name for name in kind.methods if not callable(getattr(made, name, None))]
    return methods + [name for name in kind.attributes if not hasattr(made, name)]


def _annotation(parameter: inspect.Parameter) -> Any:
    kind = Any if parameter.annotation is parameter.empty else parameter.annotation
    if get_origin(kind) is not Literal:
        return kind
    choices = get_args(kind)

    def exact(value: object) -> object:
        """Refuse true for the choice 1."""
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        raise PydanticCustomError("literal_error", "input should be one of the choices")

    return Annotated[kind, BeforeValidator(exact)]


def _field(make: Callable[..., Any], parameter: inspect.Parameter, about: str | None) -> FieldInfo:
    factories = {each.name: each.default_factory for each in fields(make)} if is_dataclass(make) else {}
    factory = factories.get(parameter.name, MISSING)
    if factory is not MISSING:
        return cast(FieldInfo, Field(default_factory=factory, description=about))
    return cast(FieldInfo, Field(... if parameter.default is parameter.empty else parameter.default, description=about))


def _nearest(word: str, allowed: list[str]) -> str:
    available = f"available: {', '.join(allowed) or 'none'}"
    return " ".join(filter(None, [meant(word, allowed), available]))


def _explained(what: str, model: type[BaseModel], options: Mapping[str, Any], errors: list[ErrorDetails]) -> str:
    """The first problem in one sentence; an unknown option comes before what else is wrong."""
    shown = ", ".join(_shown(name, field) for name, field in model.model_fields.items()) or "none"
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    option = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{what} has no option {option!r}; {_nearest(option, sorted(model.model_fields))} ({shown})"
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{what} needs option {option!r}; allowed: {shown}"
    said = first["msg"].removeprefix("Value error, ")
    if not option:
        return f"{what} refuses its options {dict(options)}: {said}"
    why = "" if first["type"] in _WRONG_TYPE else f" ({said[:1].lower()}{said[1:]})"
    return f"option {option!r} of {what} is {options[option]!r}{why}; allowed: {shown}"


def _shown(name: str, field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        text = " | ".join(repr(choice) for choice in get_args(kind))
    elif kind is Any:
        text = "any"
    else:
        text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
    return f"{name}: {text}{default}"
