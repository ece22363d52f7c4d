"""`fedloom bench`: measurements, as a table for people and, if asked for, one JSON line for programs."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import out

__all__ = [
    "app",
    "clients",
    "codecs",
    "commit",
    "dp_step",
    "gpu",
    "population",
    "round_",
    "rounds",
    "secagg",
    "simulate",
    "throughput",
    "wire",
]

app = typer.Typer(
    help="Measure this machine. With --json, a benchmark ends with one line of JSON.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]


@app.command("round")
def round_(
    rounds: Annotated[int, typer.Option(help="Empty rounds to measure, after ten to warm up.", min=5)] = 100,
    clients: Annotated[int, typer.Option(help="Client processes.", min=1)] = 2,
    durable: Annotated[
        bool, typer.Option(help="Sync every update and event to disk, as `fedloom server` does.")
    ] = False,
    tls: Annotated[bool, typer.Option(help="Encrypt and identify, as `fedloom server` does.")] = False,
    json_line: Json = False,
) -> None:
    """Time an empty round over gRPC: broadcast, no training, upload, commit.

    The adapter has 786,432 float32 values (LoRA r=8 on query and value of a RoBERTa-large), the clients are
    resident processes, and the time runs from one commit to the next. In turn with the rounds, the same bytes go over
    as many bare gRPC streams, without TLS.

    Example: fedloom bench round --json
    """
    from fedloom.simulation.benchmarks.round import bench_round

    _report("round", bench_round(rounds=rounds, clients=clients, durable=durable, tls=tls), json_line)


@app.command()
def rounds(
    clients: Annotated[int, typer.Option(help="Clients that answer in each round.", min=16)] = 4000,
    rounds: Annotated[int, typer.Option(help="Rounds to measure for each number of clients.", min=1)] = 7,
    json_line: Json = False,
) -> None:
    """Time the bookkeeping of a round: the state machine and its log, without sockets, disk or tensors.

    The same is measured for a quarter of the clients, to see how it grows.

    Example: fedloom bench rounds --clients 4000 --json
    """
    from fedloom.simulation.benchmarks.rounds import bench_rounds

    _report("rounds", bench_rounds(clients=clients, rounds=rounds), json_line)


@app.command("dp-step")
def dp_step(
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions of each variant.", min=1)] = 15,
    json_line: Json = False,
) -> None:
    """Time a private step against a plain LoRA step, interleaved, beside Opacus's hooks and its ghost clipping.

    MiniLM, LoRA r=8 on every linear layer of the encoder, batch 32 of 64 tokens, one thread. Then, on Linux, the peak
    memory of each above what stays between steps, each in a fresh process.

    Example: fedloom bench dp-step --json
    """
    from fedloom.client.benchmarks.step import bench_step

    _report("dp-step", bench_step(repeats=repeats), json_line)


@app.command()
def simulate(
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions of each variant.", min=1)] = 7,
    clients: Annotated[int, typer.Option(help="Clients of a round.", min=2)] = 20,
    json_line: Json = False,
) -> None:
    """Time a simulated round of training against the plainest loop over the clients with transformers and PEFT.

    MiniLM, LoRA r=8 on query and value, two steps of 16 x 32 tokens for each client, one thread; open and private, with
    adapters on all layers and on the last two.

    Example: fedloom bench simulate --json
    """
    from fedloom.simulation.benchmarks.training import Work, bench_training

    _report("simulate", bench_training(Work(clients=clients), repeats=repeats), json_line)


@app.command()
def population(
    clients: Annotated[int, typer.Option(help="Simulated clients, all in every round.", min=20)] = 1000,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 10,
    private: Annotated[bool, typer.Option(help="With DP-SGD and a ledger for each client.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.", min=1)] = 2,
    json_line: Json = False,
) -> None:
    """Simulate many clients in one process: clients a second, and its memory beside a tenth of them. Linux only.

    MiniLM, LoRA r=8 on query and value, one step of 4 x 16 tokens for each client.

    Example: fedloom bench population --clients 1000 --json
    """
    from fedloom.simulation.benchmarks.population import bench_population
    from fedloom.simulation.benchmarks.training import Work

    work = Work(clients=clients, steps=1, batch=4, length=16, private=private)
    _report("population", bench_population(work, rounds=rounds, threads=threads), json_line)


@app.command()
def gpu(
    minutes: Annotated[float, typer.Option(help="About how long it may take at most.", min=0.1)] = 8.0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny models on whatever device there is, to see that everything runs.")
    ] = False,
    json_line: Json = False,
) -> None:
    """Time a private step on a GPU beside a plain one and Opacus's ghost clipping, with its memory and its error.

    Models of real sizes with random weights, LoRA r=8 on every linear layer: an encoder of 0.4 B in bfloat16, decoders
    of 1 B and 8 B, the latter in 4 bits and in bfloat16. The most important come first, and what does not fit into the
    memory or the time is left out. Then the steps of 32 clients, in turn and in one pass. Nothing is downloaded.

    Example: fedloom bench gpu --minutes 8 --json
    """
    from fedloom.client.benchmarks.gpu import bench_gpu

    found = bench_gpu(minutes=minutes, tiny=tiny)
    out.print(", ".join(f"{key} {value}" for key, value in found["device"].items()))
    for size, error in found["exactness"].items():
        out.print(f"{size}: clipped sum in float32 within {error:.1e} of float64 on the CPU")
    columns = ("plain_ms", "ratio_ours", "ratio_opacus_ghost", "noise_share", "ours_tokens_s", "ours_peak_gib")
    table = Table("case", "batch × tokens", *columns, box=None, pad_edge=False)
    for case in found["cases"]:
        figures = [case["skipped"]] if "skipped" in case else [_short(case.get(key)) for key in columns]
        table.add_row(case["case"], f"{case['batch']} × {case['length']}", *figures)
    out.print(table)
    one_pass = found["one_pass"]
    for name in () if "skipped" in one_pass else ("private", "open"):
        in_turn, together, speed_up = (
            _short(one_pass[f"{name}_{key}"]) for key in ("in_turn_ms", "one_pass_ms", "speed_up")
        )
        out.print(
            f"{name} steps of {one_pass['clients']} clients: {in_turn} ms in turn, {together} ms in one pass "
            f"({speed_up} times as fast)"
        )
    if json_line:
        typer.echo(json.dumps({"bench": "gpu", **found, "machine": _machine(), "versions": _versions()}))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


@app.command()
def commit(
    strategy: Annotated[str, typer.Option(help="Name of a registered strategy.")] = "fedsvd",
    width: Annotated[int, typer.Option(help="Inputs and outputs of a layer.", min=16)] = 4096,
    rank: Annotated[int, typer.Option(help="Rank of every pair.", min=1)] = 16,
    layers: Annotated[int, typer.Option(help="Layers whose commit is timed.", min=1)] = 16,
    json_line: Json = False,
) -> None:
    """Time a strategy's commit against the SVD of a dense product, and compare its memory for 10 and 200 clients.

    For memory it needs Linux.

    Example: fedloom bench commit --strategy flexlora --json
    """
    if 2 * rank > width:
        raise typer.BadParameter(f"a rank of {rank} on layers of {width}; at most half the width is allowed")
    from fedloom.simulation.benchmarks.commit import bench_commit

    _report("commit", bench_commit(strategy=strategy, width=width, rank=rank, layers=layers), json_line)


@app.command()
def wire(json_line: Json = False) -> None:
    """Count the bytes of a round each way, for three strategies under each codec.

    The adapter has 786,432 values (LoRA r=8 on query and value of a RoBERTa-large); nothing is trained.

    Example: fedloom bench wire --json
    """
    from fedloom.simulation.benchmarks.round import roberta_large_schema
    from fedloom.simulation.benchmarks.wire import bench_wire

    rows = bench_wire(roberta_large_schema())
    most = max(row["overhead_percent"] for row in rows)
    _report_rows("wire", rows, {"max_overhead_percent": most}, json_line)


@app.command()
def codecs(
    parameters: Annotated[int, typer.Option(help="Values in the adapter.", min=1)] = 1_000_000,
    repeats: Annotated[int, typer.Option(help="How often each is measured; the median counts.", min=1)] = 25,
    clients: Annotated[int, typer.Option(help="Updates in a round of the coordinator.", min=1)] = 100,
    json_line: Json = False,
) -> None:
    """Measure what each codec loses of normal values, its time over that of copying them, and a coordinator's round.

    Example: fedloom bench codecs --json
    """
    from fedloom.simulation.benchmarks.codecs import bench_codecs

    rows = bench_codecs(parameters=parameters, repeats=repeats, clients=clients)
    _report_rows("codecs", rows, {"parameters": parameters, "clients": clients}, json_line)


@app.command()
def throughput(
    mib: Annotated[int, typer.Option(help="Adapter that goes each way over TLS, in MiB.", min=1)] = 100,
    rounds: Annotated[int, typer.Option(help="Rounds to measure, after one to warm up.", min=1)] = 5,
    rtt_ms: Annotated[float, typer.Option(help="Round trip through the slow proxy.", min=0.0)] = 50.0,
    mbit_s: Annotated[float, typer.Option(help="Bandwidth of the slow proxy each way.", min=0.1)] = 20.0,
    json_line: Json = False,
) -> None:
    """Time payloads both ways: large ones over TLS on this machine, and FedSVD at two bits on a slow line.

    Example: fedloom bench throughput --json
    """
    from fedloom.simulation.benchmarks.throughput import bench_throughput

    _report("throughput", bench_throughput(mib=mib, rounds=rounds, rtt_ms=rtt_ms, mbit_s=mbit_s), json_line)


@app.command()
def secagg(
    rounds: Annotated[int, typer.Option(help="Rounds of each kind, in turn, after two to warm up.", min=3)] = 15,
    clients: Annotated[int, typer.Option(help="Client processes.", min=3, max=256)] = 16,
    parameters: Annotated[int, typer.Option(help="Values in the adapter.", min=1)] = 1_000_000,
    json_line: Json = False,
) -> None:
    """Time a round with secure aggregation against one without, over gRPC and without training.

    Example: fedloom bench secagg --json
    """
    from fedloom.simulation.benchmarks.secagg import bench_secagg

    _report("secagg", bench_secagg(rounds=rounds, clients=clients, parameters=parameters), json_line)


@app.command()
def clients(
    n: Annotated[int, typer.Option(help="Clients, each with a connection of its own.", min=16)] = 2000,
    seconds: Annotated[float, typer.Option(help="How long to measure, once all have arrived.", min=1)] = 60.0,
    heartbeat: Annotated[float, typer.Option(help="Seconds between two heartbeats of a client.", min=1)] = 30.0,
    training: Annotated[float, typer.Option(help="Longest time a client takes to answer a round, in seconds.")] = 5.0,
    tls: Annotated[bool, typer.Option(help="Mutual TLS, each client with a certificate of its own.")] = True,
    json_line: Json = False,
) -> None:
    """Hold many clients on one coordinator: its memory, and how long a heartbeat takes. Linux only.

    Every client has a long poll waiting, and rounds of 16 of them go on meanwhile: each that opens wakes every poll.

    Example: fedloom bench clients --n 2000 --json
    """
    from fedloom.simulation.benchmarks.clients import bench_clients

    figures = bench_clients(clients=n, seconds=seconds, heartbeat_s=heartbeat, training_s=training, tls=tls)
    _report("clients", figures, json_line)


def _report(name: str, figures: dict[str, Any], json_line: bool) -> None:
    table = Table("figure", "value", box=None, pad_edge=False)
    for key, value in figures.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    out.print(table)
    if json_line:
        typer.echo(json.dumps({"bench": name, **figures, "machine": _machine(), "versions": _versions()}))


def _report_rows(name: str, rows: list[dict[str, Any]], figures: dict[str, Any], json_line: bool) -> None:
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    out.print(table)
    for key, value in figures.items():
        out.print(f"{key}  {value:.4g}")
    if json_line:
        document = {"bench": name, **figures, "rows": rows, "machine": _machine(), "versions": _versions()}
        typer.echo(json.dumps(document))


def _machine() -> dict[str, Any]:
    import os

    return {"system": platform.platform(), "processor": platform.processor() or "", "cores": os.cpu_count()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("cryptography", "fedloom", "grpcio", "numpy", "opacus", "peft", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
