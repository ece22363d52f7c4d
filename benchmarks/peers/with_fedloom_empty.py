"""fedloom: `fedloom bench round`, synced to disk as `fedloom server` does, in a process without torch.

python -m peers.with_fedloom_empty FOLDER
"""

from peers.work import given_work, report

from fedloom.simulation.benchmarks.round import bench_round


def main() -> None:
    work = given_work()
    figures = bench_round(rounds=work.rounds, clients=work.clients, durable=True, tls=False)
    report(("fedloom", "grpcio"), [], round_s=figures["median_ms"] / 1e3, parameters=figures["parameters"])


if __name__ == "__main__":
    main()
