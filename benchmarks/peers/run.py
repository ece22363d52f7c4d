"""fedloom beside pfl-research, Flower and NVFlare: the same work, in turns, each in an environment of its own.

`make bench-peers` makes the environments in .venv-peers from the pins beside this file, runs all of it and writes
benchmarks/peers/results.json and the tables of docs/benchmarks.md. `make bench-peers ARGS="--only lora-2 --repeats 1"`
does less. What is not installed is left out and named.

**Same work.** Every framework has the same base model, the same start, texts, labels, steps, learning rate, plain SGD,
plain averages, float32 and no dropout; `work.py` has all of it. Each leaves the adapter that it ended with, and the
driver refuses the whole comparison if two of them differ.

**Same machine.** Everybody has the same cores (`--cores`). A framework in one process trains with as many torch
threads; one that has several processes trains in as many as there are cores, or clients, with one thread each.

**As its own documentation says is best.** The base model stays loaded where the framework lets a process stay: in pfl,
in Flower's Ray actors, in NVFlare's simulator, which has a process for each client. pfl runs in one process and, since
it can, with a worker for each core under torchrun. Flower's SuperNodes start a process for every message, which loads
the model anew.

**What is measured.** A round lasts from commit to commit, the first is not counted, and a repetition's figure is the
median of its rounds. Repetitions alternate between the frameworks, in another order each time, and a ratio is the
median of the ratios within repetitions. Start-up is the time from the command to the first commit. Memory is the peak
of all processes of the framework together, up to the last commit. Bytes are those of a round and client: of
deployments all that goes through a proxy, framing and heartbeats too, and of simulations what the framework says.

Each piece of work is written when it is done; what others have in the file stays, with the date and load that it had.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers.memory import MARK, Sampler, end_leftovers
from peers.work import Work, reported, write_rows
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SAME = 1e-3
"""Most that two adapters may be apart, relative to how far they have come from the start."""
LONGEST_S = 3600.0


@dataclass(frozen=True)
class Engine:
    """One way to do the work."""

    arguments: tuple[str, ...]
    """What Python runs, with FOLDER for the work's folder."""
    environment: str = ""
    """Folder in .venv-peers; empty for the one that this runs in."""
    server: str = ""
    """Pattern of the command lines of the server's own processes."""
    private: bool = False

    @property
    def python(self) -> Path:
        """The interpreter."""
        return ROOT / ".venv-peers" / self.environment / "bin" / "python" if self.environment else Path(sys.executable)


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """A script of this folder as a module."""
    return ("-m", f"peers.with_{name}", "FOLDER", *arguments)


WORKERS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "CORES")
SUPERLINK = r"flower-superlink|flwr-serverapp"
ENGINES = {
    "bare": Engine(script("bare")),
    "fedloom": Engine(script("fedloom", "simulation")),
    "fedloom-private": Engine(script("fedloom", "simulation"), private=True),
    "fedloom-deployed": Engine(script("fedloom", "deployment"), server=r"fedloom\.cli\.main server"),
    "fedloom-empty": Engine(script("fedloom_empty"), server=r"with_fedloom_empty"),
    "pfl": Engine(script("pfl"), "pfl"),
    "pfl-workers": Engine((*WORKERS, *script("pfl")), "pfl"),
    "flower": Engine(script("flower", "simulation"), "flower"),
    "flower-deployed": Engine(script("flower", "deployment"), "flower", SUPERLINK),
    "nvflare": Engine(script("nvflare"), "nvflare", r"app\.simulator\.simulator "),
}
"""By name; the first of those of a piece of work whose name begins with fedloom is what others are compared with."""

SIMULATORS = ("fedloom", "bare", "pfl", "pfl-workers", "flower", "nvflare")
LORA = Work("lora", clients=0, rounds=4, folder="", steps=2, batch=16, tokens=32)
WORKS: dict[str, tuple[Work, tuple[str, ...]]] = {
    "empty": (Work("empty", clients=2, rounds=6, folder=""), ("fedloom-empty", "flower-deployed", "nvflare")),
    "lora-2": (replace(LORA, clients=2, rounds=6), (*SIMULATORS, "fedloom-private")),
    "lora-8": (replace(LORA, clients=8), (*SIMULATORS, "fedloom-private")),
    "lora-20": (replace(LORA, clients=20), (*SIMULATORS, "fedloom-private")),
    "deployed-2": (replace(LORA, clients=2), ("fedloom-deployed", "flower-deployed")),
    "deployed-8": (replace(LORA, clients=8, rounds=3), ("fedloom-deployed", "flower-deployed")),
    "virtual-1000": (
        # Most add up whole weights in float32. Of a thousand, with one small step each, that rounds away 2 % of the
        # mean step; with larger steps it is less than `SAME`.
        replace(LORA, clients=1000, rounds=2, steps=1, batch=4, tokens=16, rate=6.0),
        ("fedloom", "bare", "pfl", "pfl-workers", "flower"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), help="pieces of work")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="ways to do it")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of each piece of work")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further repetition after so long")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="cores that everybody has")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="where the figures go")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    missing = sorted(name for name in options.engines if not ENGINES[name].python.is_file())
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="peers") as name:
        starting = start(Path(name))
        for title in options.only:
            work, engines = WORKS[title]
            chosen = [each for each in engines if each in options.engines and each not in missing]
            work = replace(work, cores=options.cores, model=str(starting.parent / "base"))
            about = {**machine(), "cores": options.cores}
            found = list(repetitions(work, chosen, starting, options.repeats, until))
            versions = {package: number for done in found[0].values() for package, number in done["versions"].items()}
            about |= {"versions": versions, "left_out": [each for each in engines if each in missing]}
            about["rows"] = rows(work, chosen, found)
            show(title, about["rows"])
            keep(options.out, title, about)


def keep(path: Path, title: str, about: Mapping[str, Any]) -> None:
    """Put one piece of work into the file of figures; the others in it stay."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held[title] = about
    ordered = {each: held[each] for each in WORKS if each in held}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def start(folder: Path) -> Path:
    """The file of the adapter that all begin from, and a link to the base model beside it."""
    from fedloom.client.assets.fetch import fetch
    from fedloom.client.models.load import load_model
    from fedloom.core.config.run import AdapterSection, ModelSection
    from fedloom.strategies.start import starting_adapter

    (folder / "base").symlink_to(fetch("minilm-l6"))
    schema = load_model(ModelSection(base=str(folder / "base"), labels=("a", "b")), AdapterSection(rank=8)).schema
    save_file(starting_adapter(schema, 0), folder / "start.safetensors")
    return folder / "start.safetensors"


def repetitions(
    work: Work, engines: Sequence[str], starting: Path, repeats: int, until: float
) -> Iterator[dict[str, dict[str, Any]]]:
    """What each engine has done, by its name, again and again."""
    for repeat in range(repeats):
        if repeat and time.monotonic() > until:
            return
        turn = repeat % len(engines)
        done, adapters = {}, {}
        for name in (*engines[turn:], *engines[:turn]):
            with tempfile.TemporaryDirectory(prefix="peer") as folder:
                done[name] = once(ENGINES[name], replace(work, folder=folder), starting)
                if work.kind == "lora" and not ENGINES[name].private:
                    adapters[name] = load_file(Path(folder) / "final.safetensors")
            print(f"{work.clients} clients, {name}: {done[name]['round_s']:.3f} s a round", file=sys.stderr)
        check_same(adapters, starting)
        yield done


def once(engine: Engine, work: Work, starting: Path) -> dict[str, Any]:
    """Do the work in a process of its own; its figures."""
    work = replace(work, private=engine.private)
    work.save()
    if work.kind == "lora":
        shutil.copy(starting, work.path)
        write_rows(work)
    given = {"FOLDER": work.folder, "CORES": str(work.cores)}
    command = [str(engine.python), *(given.get(each, each) for each in engine.arguments)]
    # Each script says how many threads torch has, and nothing may say otherwise.
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "VIRTUAL_ENV")}
    paths = {"PYTHONPATH": str(HERE.parent), "TMPDIR": work.folder}
    launched = time.time()
    mark = f"{launched!r}"
    try:
        with Sampler(mark, engine.server) as sampler:
            done = subprocess.run(
                command, env=kept | paths | {MARK: mark}, capture_output=True, text=True, timeout=LONGEST_S, check=False
            )
    finally:
        end_leftovers(mark)
    found = reported(done.stdout)
    if done.returncode or found is None:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    commits = found.pop("commits")
    if commits:
        found |= {"round_s": float(np.median(np.diff(commits))), "start_s": commits[0] - launched}
    peak, server = sampler.peaks_mib(commits[-1] if commits else time.time())
    return found | {"peak_mib": peak, **({"server_mib": server} if engine.server else {})}


def check_same(adapters: Mapping[str, Mapping[str, Any]], starting: Path) -> None:
    """Refuse to compare those that have not done the same.

    Raises:
        SystemExit: Two adapters are too far apart.
    """
    if not adapters:
        return
    first, expected = next(iter(adapters.items()))
    moved = distance(expected, load_file(starting))
    for name, adapter in adapters.items():
        apart = distance(adapter, expected) / moved
        if not apart <= SAME:
            sys.exit(
                f"{name} and {first} end {apart:.1e} apart, of what {first} has moved; at most {SAME:g} is the same"
            )


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Euclidean, over all tensors; infinite if their names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return float(np.sqrt(sum(np.square(one[name].astype(np.float64) - other[name]).sum() for name in one)))


def rows(work: Work, engines: Sequence[str], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each engine: medians over the repetitions, and of their ratios to fedloom's round."""
    base = next((name for name in engines if name.startswith("fedloom")), None)
    made = []
    for name in engines:
        mine = [done[name] for done in found]
        row: dict[str, Any] = {"engine": name, "clients": work.clients, "repeats": len(mine)}
        row |= {"rounds_s": [round(each["round_s"], 5) for each in mine]}
        if base is not None:
            row["ratios"] = [round(done[name]["round_s"] / done[base]["round_s"], 4) for done in found]
            row["ratio"] = round(median(row["ratios"]), 4)
        figures = ("round_s", "start_s", "peak_mib", "server_mib", "bytes_up", "bytes_down")
        row |= {key: round(median(each[key] for each in mine), 5) for key in figures if key in mine[0]}
        made.append(row | {"clients_per_s": round(work.clients / row["round_s"], 2)})
    return made


def machine() -> dict[str, Any]:
    """What it is, and what else it does: its load average before anything begins."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.is_file() else None
    return {
        "processor": model[1] if model else platform.processor(),
        "cores_there": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def show(title: str, found: Sequence[Mapping[str, Any]]) -> None:
    """A table for whoever waits."""
    table = Table(title, "round", "beside", "clients/s", "start-up", "MiB", "of the server")
    for row in found:
        cells = (row.get(key) for key in ("ratio", "clients_per_s", "start_s", "peak_mib", "server_mib"))
        table.add_row(row["engine"], f"{row['round_s']:.3f} s", *(f"{cell:.4g}" if cell else "" for cell in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
