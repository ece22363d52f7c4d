"""`fedloom push` against a server that speaks what huggingface_hub asks a hub for."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.core.errors import ConfigError, Unavailable

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how the client puts files

FACTS = {"run": "demo", "base": "clinic/bert", "base_digest": "sha256:0", "labels": ["no", "yes"], "privacy": None}


@dataclass
class Hub:
    """A hub in memory."""

    address: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """Whether each is private."""
    files: dict[str, bytes] = field(default_factory=dict)
    """REPO/NAME of what was committed."""
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    writable: bool = True
    open_to_all: bool = False
    """New repositories are public, whatever was asked."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON."""
        self.asked.append(f"{method} {path}")
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            if not self.writable:
                return 403, {}, {"error": "this token may only read"}
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, asked["visibility"] == "private" and not self.open_to_all)
            return (409 if known else 200), {}, {"url": f"{self.address}/{name}", "name": name}
        if path.startswith("/upload/"):
            self.objects[path.removeprefix("/upload/")] = body
            return 200, {}, {}
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if each["path"].endswith(".safetensors") else "regular" for each in files]
            found = [
                {"path": each["path"], "uploadMode": mode, "shouldIgnore": False}
                for each, mode in zip(files, modes, strict=True)
            ]
            return 200, {}, {"files": found}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [
                {**each, "actions": {"upload": {"href": f"{self.address}/upload/{each['oid']}"}}} for each in wanted
            ]
            return 200, {}, {"transfer": "basic", "objects": actions}
        if "/commit/" in path:
            for line in body.decode().splitlines():
                self.commit(repo, json.loads(line))
            return (
                200,
                {},
                {"success": True, "commitUrl": f"{self.address}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40},
            )
        return 200, {}, {"id": repo, "private": self.repos[repo], "siblings": [], "tags": []}

    def commit(self, repo: str, entry: dict[str, Any]) -> None:
        value = entry["value"]
        if entry["key"] == "file":
            self.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            self.files[f"{repo}/{value['path']}"] = self.objects[value["oid"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self._body()
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, headers, document = hub.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(text)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(text)

        def _body(self) -> bytes:
            if "Content-Length" in self.headers:
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts: list[bytes] = []
            while "chunked" in self.headers.get("Transfer-Encoding", ""):
                size = int(self.rfile.readline(), 16)
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if not size:
                    break
            return b"".join(parts)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture
def export(tiny_model: AdapterModel, tmp_path: Path) -> Path:
    save_adapter(tiny_model, tmp_path / "adapter", FACTS)
    return tmp_path / "adapter"


def push(folder: Path, *words: str, said: str = "") -> Any:
    return CliRunner().invoke(app, ["push", str(folder), "clinic/demo", *words], input=said, catch_exceptions=False)


def test_the_hub_gets_the_files_as_they_are_and_in_private(hub: Hub, export: Path) -> None:
    done = push(export, "--endpoint", hub.address, "--yes", "--json")

    assert done.exit_code == 0, done.output
    files = {path.name: path.read_bytes() for path in export.iterdir()}
    assert hub.files == {f"clinic/demo/{name}": content for name, content in files.items()}
    assert hub.repos == {"clinic/demo": True}
    assert list(hub.objects) == [hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["commit"] == f"{hub.address}/clinic/demo/commit/{'0' * 40}"
    assert (told["public"], told["files"]) == (False, sorted(files))
    assert "Bearer hf_of_a_test" in hub.tokens

    assert push(export, "--endpoint", hub.address, "--yes").exit_code == 0, "a second time, into what is there"


def test_it_shows_what_would_go_where_and_waits_for_a_yes(hub: Hub, export: Path) -> None:
    for said in ("n\n", ""):
        done = push(export, "--endpoint", hub.address, said=said)
        assert done.exit_code == 1
    assert hub.asked == []
    shown = done.output
    assert all(path.name in shown for path in export.iterdir())
    assert "trained without differential privacy" in shown
    assert "clinic/demo, private" in shown

    done = push(export, "--endpoint", hub.address, "--public", said="y\n")
    assert done.exit_code == 0
    assert "clinic/demo, which everybody can read" in done.output
    assert hub.repos == {"clinic/demo": False}


def test_a_repository_that_everybody_reads_is_no_private_one(hub: Hub, export: Path) -> None:
    hub.repos["clinic/demo"] = False

    with pytest.raises(ConfigError, match=r"clinic/demo is there already, and everybody can read it; give --public"):
        push(export, "--endpoint", hub.address, "--yes")

    assert hub.files == {}
    assert not any("create" in each for each in hub.asked)


def test_a_hub_that_makes_it_public_all_the_same_gets_no_file(hub: Hub, export: Path) -> None:
    hub.open_to_all = True

    with pytest.raises(ConfigError, match="clinic/demo is public, though it was to be private"):
        push(export, "--endpoint", hub.address, "--yes")

    assert hub.files == hub.objects == {}


@pytest.mark.parametrize("name", ["ledger.db", "rows.csv", ".env", "model.safetensors.bak", "run.toml", "model.bin"])
def test_anything_but_an_exports_files_is_refused(hub: Hub, export: Path, name: str) -> None:
    (export / name).write_text("of a patient")

    with pytest.raises(ConfigError, match=rf"{name} is no part of an export, so nothing is uploaded"):
        push(export, "--endpoint", hub.address, "--yes")
    assert hub.asked == []


def test_links_and_folders_are_refused(hub: Hub, export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of a patient")
    (export / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"config\.json is no part of an export"):
        push(export, "--endpoint", hub.address, "--yes")
    (export / "config.json").unlink()
    (export / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is no part of an export"):
        push(export, "--endpoint", hub.address, "--yes")
    assert hub.asked == []


def test_a_folder_that_is_no_export_is_refused(hub: Hub, export: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", export / "README.md"):
        with pytest.raises(ConfigError, match=r"is no folder with README\.md and fedloom\.json"):
            push(folder, "--endpoint", hub.address, "--yes")
    (export / "fedloom.json").write_text('{"run": "demo"}')
    with pytest.raises(ConfigError, match=r"fedloom\.json lacks base_digest; give what `fedloom export` wrote"):
        push(export, "--endpoint", hub.address, "--yes")
    assert hub.asked == []


def test_a_token_that_may_not_write_is_one_clear_error(hub: Hub, export: Path) -> None:
    hub.writable = False

    with pytest.raises(Unavailable, match=r"nothing was committed to clinic/demo at .*log in with `hf auth login`"):
        push(export, "--endpoint", hub.address, "--yes")


def test_a_hub_that_is_not_there_is_one_clear_error(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]

    with pytest.raises(Unavailable, match=rf"at http://127\.0\.0\.1:{port}: .*refused; see the address, the network"):
        push(export, "--endpoint", f"http://127.0.0.1:{port}", "--yes")
