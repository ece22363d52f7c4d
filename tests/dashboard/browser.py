"""Headless Chromium over its debugging pipe: no driver, no port, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Browser", "browser", "found"]

_TIMEOUT_S = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def found() -> str | None:
    """The browser of this machine, or None."""
    chosen = os.environ.get("FEDLOOM_CHROMIUM")
    return chosen or next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. What it complains about is kept in `complaints`."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._number, self._buffer, self._session = 0, b"", ""
        self.complaints: list[str] = []

    def open(self) -> None:
        """Attach to a new page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events on the way are looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._notice(answer)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; it may be a promise."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true in the page."""
        end_s = time.monotonic() + _TIMEOUT_S
        while not self.run(script):
            assert time.monotonic() < end_s, (
                f"never true: {script}; the page says {self.run('document.body.innerText')}"
            )
            time.sleep(0.05)

    def view(self, width: int, height: int, scheme: str = "light", *, phone: bool = False) -> None:
        """The size of the window, in CSS pixels, and the colours that the person prefers."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def go(self, url: str) -> None:
        """Open an address and wait for its scripts."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def key(self, name: str, *, shift: bool = False) -> None:
        """Press a key."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}
        about: dict[str, Any] = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
        about |= {"modifiers": 8 if shift else 0} | ({"text": "\r"} if name == "Enter" else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, width: int) -> None:
        """The whole page as PNG."""
        height = self.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        got = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], _TIMEOUT_S)
            chunk = os.read(self._reader, 1 << 16) if ready else b""
            assert chunk, "the browser does not answer"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _notice(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.complaints.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case _:
                pass


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser of its own with an empty page."""
    path = found()
    assert path is not None
    to_child, from_child = os.pipe(), os.pipe()
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
    # The pipe must be descriptors 3 and 4 of the browser.
    command = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&{to_child[0]} 4>&{from_child[1]}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, path, str(profile)],
        pass_fds=(to_child[0], from_child[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child[0])
    os.close(from_child[1])
    made = Browser(from_child[0], to_child[1])
    try:
        made.open()
        yield made
    finally:
        os.close(to_child[1])
        process.terminate()
        process.wait(30)
        os.close(from_child[0])
