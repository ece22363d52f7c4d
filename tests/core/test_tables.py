"""Run and policy files as Windows leaves them: byte-order marks, line ends, and paths with backslashes."""

from pathlib import Path

import pytest

from fedloom.client.policy import load_policy
from fedloom.core.config.parsing import read_json, read_toml
from fedloom.core.config.run import load_run
from fedloom.core.errors import ConfigError

RUN = """[run]
name = "stars"
rounds = 2
[model]
base = "minilm-l6"
labels = ["1", "2"]
[train]
steps = 5
sampling_rate = 0.1
learning_rate = 1.0
"""


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_run_file_is_the_same_with_any_line_end_and_a_mark(mark: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "plain.toml").write_text(RUN)
    (tmp_path / "run.toml").write_bytes((mark + RUN.replace("\n", end)).encode())

    assert load_run(tmp_path / "run.toml") == load_run(tmp_path / "plain.toml")


def test_json_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')

    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_another_encoding_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-16")

    with pytest.raises(ConfigError, match="it is not in UTF-8; save it as UTF-8"):
        read_toml(tmp_path / "run.toml")


# The first two are no TOML. The last one is: its backslashes are a line break and a tab.
@pytest.mark.parametrize("source", [r"C:\Users\me\train.csv", r"D:\data\train.csv", r"C:\new\train.csv"])
@pytest.mark.parametrize("key", ["data.source", "client.state", "client.anchors", "model.folder"])
def test_a_path_of_windows_is_refused_with_how_to_write_it(source: str, key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    tables = {"client": 'name = "w"\n', "data": "", "model": ""}
    if key != "data.source":
        tables["data"] = 'source = "a.csv"\n'
    path = tmp_path / "client.toml"

    for written, fine in ((f'"{source}"', False), (f"'{source}'", True)):
        whole = tables | {section: tables[section] + f"{name} = {written}\n"}
        path.write_text("".join(f"[{each}]\n{lines}" for each, lines in whole.items()))
        if fine:
            load_policy(path)
        else:
            with pytest.raises(ConfigError, match="write a path of Windows with / or between single quotes"):
                load_policy(path)


def test_a_number_too_long_to_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN + "microbatch = " + "9" * 5000)

    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_run(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text(RUN)
    with pytest.raises(ConfigError):
        load_run(tmp_path / "run.toml", ("train.microbatch=" + "9" * 5000,))
