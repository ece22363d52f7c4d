"""Rules of the tree itself: what style and review would otherwise have to remember."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from fedloom.cli.main import app
from fedloom.client.policy import Policy
from fedloom.core import errors
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.registry import GROUPS
from fedloom.core.schema import Role, Schema, TensorSpec

ROOT = Path(__file__).parents[1]
PARTS = ("core", "proto", "strategies", "server", "client", "simulation", "flower", "api", "cli", "conformance")
MAX_LINES = 400


def _tracked(*patterns: str) -> list[str]:
    """Paths of tracked files, as git prints them; deleted ones that are not committed yet are left out."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=True, text=True)
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]


TRACKED = _tracked()
PYTHON = [path for path in TRACKED if path.endswith(".py") and "_pb2" not in path]
SOURCE = [path for path in PYTHON if not path.startswith("tests/") and "/tests/" not in path]
MODULES = [path for path in SOURCE if path.startswith(tuple(f"{part}/fedloom/" for part in PARTS))]


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def _fresh(code: str, *arguments: str) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lists_are_not_empty() -> None:
    """Every test below that loops over files has some to loop over."""
    assert {path.split("/")[0] for path in MODULES} == set(PARTS)
    assert len(SOURCE) > len(MODULES)


@pytest.mark.parametrize("part", PARTS)
def test_the_namespace_has_no_init(part: str) -> None:
    """One `__init__.py` there would hide the other parts."""
    assert (ROOT / part / "fedloom").is_dir()
    assert not (ROOT / part / "fedloom" / "__init__.py").exists()


def _order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name: the order ruff keeps too."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def _public(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


@pytest.mark.parametrize("path", MODULES)
def test_all_is_sorted_and_complete(path: str) -> None:
    tree = _tree(path)
    public = _public(tree)
    if not public and not any(isinstance(node, ast.Assign) and "__all__" in ast.unparse(node) for node in tree.body):
        return  # a docstring alone needs no list
    name = path.partition("/")[2].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "flwr":
            raise
        pytest.skip("Flower has an environment of its own, see the Makefile; its three modules are imported there")

    listed = list(module.__all__)

    assert listed == sorted(listed, key=_order)
    assert not [each for each in listed if not hasattr(module, each)]
    assert public <= set(listed), f"add to __all__ or rename with an underscore: {sorted(public - set(listed))}"


@pytest.mark.parametrize("path", PYTHON)
def test_files_are_short(path: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def _keys(model: type[BaseModel]) -> list[str]:
    """section.key of every key of a file."""
    document = model.model_json_schema()
    found = []
    for section, entry in document["properties"].items():
        (name,) = re.findall(r"#/\$defs/(\w+)", str(entry))
        found += [f"{section}.{key}" for key in document["$defs"][name]["properties"]]
    return found


def _commands(command: Any, path: str) -> Iterator[str]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{path} {name}")


def _chapter(title: str) -> str:
    """One part of the reference: run and policy files have keys of the same name."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    (found,) = [part for part in re.split(r"^## ", text, flags=re.M) if part.startswith(f"{title}\n")]
    return found


@pytest.mark.parametrize(("title", "model"), [("Run file", RunConfig), ("Policy file", Policy)])
def test_every_key_is_in_the_reference_with_its_meaning(title: str, model: type[BaseModel]) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", _chapter(title), re.M))

    assert sorted(rows) == sorted(_keys(model))
    assert all(len(meaning.strip()) > 5 for meaning in rows.values())


def _registered(group: str) -> dict[str, str]:
    """Components of ours by name, with what makes them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = project["entry-points"].get(f"fedloom.{group}", {})
    return found


def test_every_command_error_and_component_is_in_the_reference() -> None:
    commands = _chapter("Commands")

    for path in _commands(typer.main.get_command(app), "fedloom"):
        assert f"### `{path}`\n" in commands
    for chapter, mark, names in (
        ("Errors", "| `{}` |", errors.__all__),
        *((group.capitalize(), "### `{}`\n", _registered(group)) for group in GROUPS if _registered(group)),
    ):
        text = _chapter(chapter)
        for name in names:
            assert mark.format(name) in text


@pytest.mark.parametrize("page", ["reference", "papers", "mutations", "study", "peers", "families"])
def test_what_is_made_from_the_code_is_current(page: str) -> None:
    command = [sys.executable, "-m", f"docs.make_{page}", "--check"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr


def test_every_command_has_an_example_that_names_it() -> None:
    def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", {})
        if not children:
            yield path, command
        for name, child in children.items():
            yield from leaves(child, f"{path} {name}")

    for path, command in leaves(typer.main.get_command(app), "fedloom"):
        assert f"Example: {path}" in command.help
        assert all(each.help for each in command.params)
        for text in (command.help, *(each.help for each in command.params)):
            assert "[" not in text, "the terminal takes it for markup and shows nothing"


def test_stubs_are_what_the_proto_file_gives(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    outputs.append(f"--mypy_grpc_out=quiet:{tmp_path}")
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-Iproto",
        *outputs,
        "proto/fedloom/proto/v1/federation.proto",
    ]
    # protoc finds the mypy plugin on the path; a virtual environment need not be activated for these tests.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PATH": search}
    )

    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "proto/fedloom/proto/v1").glob("*_pb2*.py*")}
    assert made == committed


# Written so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:home|root|work|var/tmp|opt)/")
REGISTRIES = re.compile(
    b"|".join(
        re.escape(f"{host}.{domain}".encode())
        for host, domain in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("npmjs", "org"),
            ("download.pytorch", "org"),
            ("anaconda", "com"),
            ("anaconda", "org"),
            ("ghcr", "io"),
            ("gcr", "io"),
            ("quay", "io"),
            ("docker", "io"),
            ("crates", "io"),
        )
    )
)


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRIES], ids=["machine-path", "registry"])
def test_no_file_names_a_machine_or_a_registry(pattern: re.Pattern[bytes]) -> None:
    found = {path: match.group() for path in TRACKED if (match := pattern.search((ROOT / path).read_bytes()))}

    assert not found


@pytest.mark.parametrize(
    ("pattern", "text", "hit"),
    [
        (MACHINE_PATH, "see '/{}/me/x'", True),
        (MACHINE_PATH, "framework/{}/x", False),
        (REGISTRIES, "https://{}/simple", True),
    ],
)
def test_the_patterns_above_can_match(pattern: re.Pattern[bytes], text: str, hit: bool) -> None:
    word = "home" if pattern is MACHINE_PATH else ".".join(("pypi", "org"))

    assert bool(pattern.search(text.format(word).encode())) is hit


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def _unsafe(tree: ast.Module) -> Iterator[str]:
    """Ways to run what somebody else wrote, with their lines."""
    refusals = set(_refusals(tree))
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in names if name.split(".")[0] in BANNED_MODULES or name == "torch.load"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found = ["torch.load"]
        elif isinstance(node, ast.Name) and node.id in {"eval", "exec", "__import__"}:
            found = [node.id]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found = [] if node in refusals else [node.arg]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found = [] if node in refusals else ["trust_remote_code"]
        yield from found


def _refusals(tree: ast.Module) -> Iterator[ast.AST]:
    """Where trust_remote_code is named to say no: transformers asks at the terminal if nothing is said."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False:
            yield node
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and isinstance(value, ast.Constant) and value.value is False:
                    yield key


@pytest.mark.parametrize("path", SOURCE)
def test_nothing_runs_what_a_file_or_peer_says(path: str) -> None:
    assert not list(_unsafe(_tree(path)))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "load(x, trust_remote_code=True)",
        "load(x, **{'trust_remote_code': True})",
        "load(x, trust_remote_code=trusted)",
        "load(x, **{'trust_remote_code': 0, 'other': False})",
    ],
)
def test_unsafe_code_is_seen(code: str) -> None:
    assert list(_unsafe(ast.parse(code)))


@pytest.mark.parametrize("code", ["load(x, trust_remote_code=False)", "load(x, **{'trust_remote_code': False})"])
def test_a_refusal_to_run_code_is_no_finding(code: str) -> None:
    assert not list(_unsafe(ast.parse(code)))


def _loaded(code: str, *arguments: str) -> set[str]:
    """Top-level packages in memory after `code`."""
    return set(_fresh(code + "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})", *arguments).split())


def test_strategies_need_numpy_only() -> None:
    names = [
        path.partition("/")[2].removesuffix(".py").replace("/", ".") for path in _tracked(":(glob)strategies/**/*.py")
    ]
    # The battery is a test suite and imports pytest; it is bound by the same rule.
    loaded = _loaded("\n".join(f"import {name.removesuffix('.__init__')}" for name in names))

    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "peft", "opacus", "grpc", "google"}


SERVER = """
import sys
from fedloom.cli.main import main
try:
    main()
except SystemExit as end:
    print(end.code, file=sys.stderr)
import fedloom.server.rpc.server
"""


def test_a_coordinator_loads_no_torch(tmp_path: Path) -> None:
    """The whole path of `fedloom server` with a prepared schema, up to the refusal of the address."""
    run = tmp_path / "run.toml"
    run.write_bytes((ROOT / "examples" / "sentiment.toml").read_bytes())
    config = load_run(run)
    schema = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 4)), TensorSpec("m.B", "m", Role.LORA_B, (4, 8))), 2.0)
    model, adapter = config.model.model_dump_json(exclude={"digest"}), config.adapter.model_dump_json()
    run.with_suffix(".schema.json").write_text(
        f'{{"model": {model}, "adapter": {adapter}, "digest": "sha256:{"0" * 64}", "schema": {schema.to_json()}}}'
    )

    state = str(tmp_path / "state")
    loaded = _loaded(SERVER, "server", str(run), "--insecure-loopback", "--listen", "0.0.0.0:0", "--state", state)

    assert {"grpc", "numpy"} <= loaded
    assert (tmp_path / "state").is_dir(), "it must have got as far as opening its state"
    assert not loaded & {"torch", "transformers", "peft", "opacus"}


@pytest.mark.parametrize(
    ("path", "names"),
    [("constraints.txt", ("server", "client", "dev")), ("flower/constraints.txt", ("server", "flower"))],
)
def test_constraints_are_exact(path: str, names: tuple[str, ...]) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    loose = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)]
    pinned = {_canonical(line.partition("==")[0]) for line in pins}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = chain(project["dependencies"], *(extras[name] for name in names))
    wanted = {_canonical(re.split(r"[\[<>=]", each)[0]) for each in asked} - {"fedloom"}

    assert not loose
    assert len(pinned) == len(pins)
    assert wanted <= pinned


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

    assert re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
