"""Whole federations on a tiny model: the engines agree, the result loads with PEFT, and nothing is left half-done."""

import hashlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedloom.client.privacy.ledger.account import personal_folder
from fedloom.core.config.run import RunConfig, SecureAggregationSection
from fedloom.core.errors import BudgetError, ConfigError, DataError, FedloomError, ModelError, PolicyError
from fedloom.core.secagg.fixed_point import FixedPoint
from fedloom.proto.messages import UpdateHeader
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.recorders.api import read_metrics
from fedloom.server.rounds.state import RoundClosed, UpdateAccepted
from fedloom.server.storage.local import Store
from fedloom.simulation import processes
from fedloom.simulation.federation import build, completed
from fedloom.simulation.in_process.engine import run_inprocess
from fedloom.simulation.simulate import simulate
from fedloom.strategies.start import starting_adapter
from tests.support.engines import entropy_of, largest_difference, over_sockets
from tests.support.runs import tiny_run

pytestmark = pytest.mark.usefixtures("preloaded_clients")


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    """Three clients, two rounds, not private."""
    return tiny_run(
        tiny_base,
        privacy={"enabled": False, "epsilon": 20.0, "delta": 1e-2},
        strategy={"name": "fedsvd", "weighting": "examples"},
        rounds={"min_clients": 3},
        data={"source": str(data), "clients": 3},
    )


def private(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"enabled": True})})


@pytest.mark.parametrize(
    ("strategy", "bands"),
    [("fedavg", 1), ("fedsvd", 1), ("fedavg", 2), ("la-lora", 1), ("as-lora", 1), ("feddpa", 1)],
)
def test_private_run_is_the_same_in_process_and_over_grpc(
    config: RunConfig, tmp_path: Path, strategy: str, bands: int
) -> None:
    section = config.strategy.model_copy(update={"name": strategy})
    noise = config.privacy.model_copy(update={"enabled": True, "noise_bands": bands})
    adapter = config.adapter.model_copy(update={"kind": "dual-lora" if strategy == "feddpa" else "lora"})
    settled = completed(config.model_copy(update={"strategy": section, "privacy": noise, "adapter": adapter}))
    federation = build(settled, tmp_path / "run")
    schema = federation.model.schema
    starting = starting_adapter(schema, settled.run.seed)
    results = []
    for engine in ("inprocess", "grpc"):
        with Store(tmp_path / engine, durable=False) as store:
            coordinator = Coordinator(settled, schema, build_strategy(settled), store, starting=starting, expect=3)
            if engine == "inprocess":
                seams = {name: (lambda r, name=name: entropy_of(name, r)) for name in federation.clients}
                for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
                    pass
            else:
                over_sockets(federation, coordinator)
            assert coordinator.finished
            results.append(coordinator.state.adapter)
        for policy in federation.policies.values():  # an engine begins with nothing kept by another
            shutil.rmtree(personal_folder(policy), ignore_errors=True)

    assert largest_difference(results[0], starting) > 1e-2
    assert largest_difference(*results) < 1e-5


@pytest.mark.parametrize("engine", ["inprocess", "grpc"])
def test_a_secure_private_run_is_the_plain_one_up_to_the_step(config: RunConfig, tmp_path: Path, engine: str) -> None:
    section = config.strategy.model_copy(update={"name": "fedavg", "weighting": "uniform"})
    settled = completed(private(config).model_copy(update={"strategy": section}))
    sums = SecureAggregationSection(enabled=True, max_clients=3)
    results = []
    for number, run in enumerate((settled, settled.model_copy(update={"secure_aggregation": sums}))):
        federation = build(run, tmp_path / str(number))
        starting = starting_adapter(federation.model.schema, run.run.seed)
        with Store(tmp_path / f"state-{number}", durable=False) as store:
            coordinator = Coordinator(
                run, federation.model.schema, build_strategy(run), store, starting=starting, expect=3
            )
            if engine == "inprocess":
                seams = {name: (lambda r, name=name: entropy_of(name, r)) for name in federation.clients}
                for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
                    pass
            else:
                over_sockets(federation, coordinator)
            assert coordinator.finished
            results.append(coordinator.state.adapter)

    assert largest_difference(results[0], starting) > 1e-2
    # The step is 5.6e-9, so what is left is that training starts from values that differ in their last digit.
    assert FixedPoint(sums.max_change, sums.max_clients).step < 1e-8
    assert largest_difference(*results) < 1e-5


@pytest.mark.e2e
@pytest.mark.slow
def test_processes_give_the_adapter_that_one_process_gives(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "CLIENT", [sys.executable, "-m", "fedloom.cli.main", "client"])
    over_grpc = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "grpc"})})
    one, two = (simulate(each, tmp_path / "runs") for each in (config, over_grpc))

    adapters = [load_file(result.folder / "adapter" / "adapter_model.safetensors") for result in (one, two)]
    assert two.folder.name == "tiny-2"
    assert largest_difference(*adapters) < 1e-5
    assert one.agreement == two.agreement == 1.0
    logs = [log.read_text() for log in (two.folder / "clients").glob("*/client.log")]
    assert len(logs) == 3
    said = ("run over after 2 rounds; trained 2", ": round 1/2 sent\n", ": round 2/2 sent\n")
    assert all(each in log for log in logs for each in said)


@pytest.mark.parametrize("engine", ["inprocess", pytest.param("grpc", marks=pytest.mark.e2e)])
def test_buffered_rounds_run_on_either_engine(config: RunConfig, tmp_path: Path, engine: str) -> None:
    rounds = config.rounds.model_copy(update={"mode": "buffered", "clients_per_round": 2, "min_clients": 2})
    sections = {"strategy": config.strategy.model_copy(update={"name": "fedavg"}), "rounds": rounds}
    sections["engine"] = config.engine.model_copy(update={"kind": engine})
    sections["run"] = config.run.model_copy(update={"rounds": 4})

    result = simulate(private(config).model_copy(update=sections), tmp_path / "runs")

    assert [record.round for record in result.records] == [0, 1, 2, 3, 4]
    assert result.agreement == 1.0
    assert result.final != result.start
    with Store(result.folder / "state") as store:
        events = store.events()
    assert [len(event.clients) for event in events if isinstance(event, RoundClosed)] == [2, 2, 2, 2]
    counted = Counter(event.client for event in events if isinstance(event, UpdateAccepted))
    assert len(counted) == 3 or engine == "grpc", "in one process clients take turns, and all of them count"
    for name, stated in result.privacy.items():
        # Somebody may have been at work when the run was over, and has spent for it.
        assert counted[name] <= stated.rounds <= counted[name] + 1
        reported = result.records[-1].epsilon
        assert reported is not None
        assert stated.epsilon <= reported[name] + 0.01, name


def test_a_strategy_that_cannot_be_buffered_is_refused_before_anything_is_written(
    config: RunConfig, tmp_path: Path
) -> None:
    rounds = config.rounds.model_copy(update={"mode": "buffered", "clients_per_round": 3})

    with pytest.raises(ConfigError, match="FedSVD cannot use changes made from an older state"):
        simulate(config.model_copy(update={"rounds": rounds}), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_private_simulation_leaves_a_complete_run_folder(config: RunConfig, tmp_path: Path) -> None:
    result = simulate(private(config), tmp_path / "runs")

    folder = result.folder
    records = read_metrics(folder)
    assert [record.round for record in records] == [0, 1, 2]
    assert records[-1].accuracy == result.final.accuracy
    # While a run goes on the coarser grid is used, and rounds a client was asked to join; its ledger has the report.
    assert records[-1].epsilon is not None
    for name, stated in result.privacy.items():
        assert stated.epsilon <= records[-1].epsilon[name] <= stated.epsilon + 0.01
        assert (stated.rounds, [each.steps for each in stated.mechanisms]) == (2, [6])
    assert records[-1].privacy is not None
    assert records[-1].privacy["epsilon"] == max(records[-1].epsilon.values())
    assert (records[-1].privacy["rounds"], records[1].privacy and records[1].privacy["rounds"]) == (2, 1)
    assert 0 < max(result.epsilon.values()) <= 20.0
    assert records[1].epsilon is not None
    assert max(records[1].epsilon.values()) < max(result.epsilon.values())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    known = json.loads((folder / "adapter" / "fedloom.json").read_text())
    assert known["privacy"]["epsilon"] == pytest.approx(max(result.epsilon.values()))
    worst = max(result.privacy.values(), key=lambda each: each.epsilon)
    terms = json.loads(json.dumps(worst.document()))
    assert terms.items() <= known["privacy"].items()
    assert (terms["unit"], terms["adjacency"], terms["delta"]) == ("one example", "add or remove one", 1e-2)
    assert json.loads((folder / "summary.json").read_text())["privacy"].keys() == result.privacy.keys()
    assert result.agreement == 1.0
    # B only goes up under FedSVD; A comes down too.
    assert records[1].bytes_up < records[1].bytes_down


def test_a_client_is_charged_for_the_rounds_it_joined(config: RunConfig, tmp_path: Path) -> None:
    longer = config.run.model_copy(update={"rounds": 3})
    some = config.rounds.model_copy(update={"min_clients": 1, "clients_per_round": 1})
    joined = Counter[str]()

    result = simulate(private(config).model_copy(update={"run": longer, "rounds": some}), tmp_path / "runs")

    with Store(result.folder / "state") as store:
        for event in store.events():
            joined.update(event.clients if isinstance(event, RoundClosed) else ())
    assert {name: stated.rounds for name, stated in result.privacy.items()} == {
        name: joined[name] for name in result.privacy
    }
    assert len({*joined.values(), *(joined[name] for name in result.privacy)}) > 1, "or it would show nothing"
    records = read_metrics(result.folder)
    assert records[-1].epsilon is not None
    for name, spent in records[-1].epsilon.items():
        assert (spent == 0) == (joined[name] == 0)
        assert result.epsilon[name] <= spent <= result.epsilon[name] + 0.01


def test_private_noise_differs_between_runs_of_one_seed(config: RunConfig, tmp_path: Path) -> None:
    one, two = (simulate(private(config), tmp_path / "runs") for _ in range(2))

    adapters = [load_file(result.folder / "adapter" / "adapter_model.safetensors") for result in (one, two)]
    assert largest_difference(*adapters) > 1e-3


def test_open_run_is_the_same_twice(config: RunConfig, tmp_path: Path) -> None:
    one, two = (simulate(config, tmp_path / "runs") for _ in range(2))

    adapters = [load_file(result.folder / "adapter" / "adapter_model.safetensors") for result in (one, two)]
    assert largest_difference(*adapters) == 0.0
    assert one.folder != two.folder


def test_effective_config_runs_again(config: RunConfig, tmp_path: Path) -> None:
    from fedloom.core.config.run import load_run

    result = simulate(config, tmp_path / "runs")

    again = load_run(result.folder / "run.toml")
    assert again.model.digest is not None
    assert again == completed(config)


def test_a_client_whose_budget_ends_stops_the_run_with_its_reason(config: RunConfig, tmp_path: Path) -> None:
    settled = completed(private(config))
    federation = build(settled, tmp_path / "run")
    name = "client-1"
    policy = federation.policies[name]
    tight = policy.privacy.model_copy(update={"epsilon": 0.5})
    federation.policies[name] = policy.model_copy(update={"privacy": tight})
    with Store(tmp_path / "state", durable=False) as store:
        starting = starting_adapter(federation.model.schema, 0)
        coordinator = Coordinator(
            settled, federation.model.schema, build_strategy(settled), store, starting=starting, expect=3
        )
        with pytest.raises(BudgetError, match="over the life of this data set"):
            for _ in run_inprocess(federation, coordinator):
                pass
        assert not coordinator.finished


@pytest.mark.parametrize(
    ("section", "change", "error", "text"),
    [
        ("model", {"digest": "sha256:" + "0" * 64}, ModelError, "the run pins sha256:000"),
        ("model", {"base": "nowhere"}, ModelError, "has no config.json"),
        ("data", {"source": "missing.csv"}, DataError, "missing.csv"),
        ("data", {"clients": 31}, ConfigError, "31"),
        ("data", {"clients": 2}, ConfigError, "below rounds.min_clients = 3: no round could ever open"),
        ("strategy", {"name": "fedsvdd"}, ConfigError, "fedsvd"),
        ("strategy", {"options": {"train_head": True}}, ConfigError, "model.head"),
        ("adapter", {"targets": ("quarry",)}, ModelError, "quarry"),
    ],
)
def test_bad_input_is_one_clear_error_and_no_adapter(  # type: ignore[no-untyped-def]  # sections of different models
    config: RunConfig, tmp_path: Path, section: str, change, error, text: str
) -> None:
    bad = config.model_copy(update={section: getattr(config, section).model_copy(update=change)})

    with pytest.raises(error, match=text):
        simulate(bad, tmp_path / "runs")

    assert not list((tmp_path / "runs").glob("*")), "what never ran leaves no folder, whose name the next would lack"


@pytest.mark.parametrize("engine", ["inprocess", pytest.param("grpc", marks=pytest.mark.e2e)])
def test_updates_that_diverge_end_the_run_with_an_error(config: RunConfig, tmp_path: Path, engine: str) -> None:
    """Nobody else will come into a simulation, so a round that is short of updates would stay open for ever."""
    sections = {
        "train": config.train.model_copy(update={"learning_rate": 1e4}),
        "rounds": config.rounds.model_copy(update={"max_update_norm": 10.0}),
        "engine": config.engine.model_copy(update={"kind": engine}),
    }

    with pytest.raises(
        FedloomError, match=r"round 1 needs 3 updates and only [0-2] clients .* lower train\.learning_rate"
    ):
        simulate(config.model_copy(update=sections), tmp_path / "runs")

    assert not list((tmp_path / "runs").rglob("adapter"))


def test_a_round_closes_without_the_update_that_diverged(config: RunConfig, tmp_path: Path) -> None:
    settled = completed(config.model_copy(update={"rounds": config.rounds.model_copy(update={"min_clients": 2})}))
    federation = build(settled, tmp_path / "run")
    schema = federation.model.schema
    with Store(tmp_path / "state", durable=False) as store:
        starting = starting_adapter(schema, 0)
        coordinator = Coordinator(settled, schema, build_strategy(settled), store, starting=starting, expect=3)
        submit = coordinator.submit
        nan = np.float32(np.nan).tobytes()

        def spoiled(header: UpdateHeader, payload: bytes, run: str, epoch: int) -> bool:
            if header.client == "client-1" and header.round == 0:
                payload = payload[:-4] + nan
                header = replace(header, digest=hashlib.sha256(payload).hexdigest())
            return submit(header, payload, run, epoch)

        coordinator.submit = spoiled  # type: ignore[method-assign]
        for _ in run_inprocess(federation, coordinator):
            pass

        assert coordinator.finished
        closed = [event.clients for event in store.events() if isinstance(event, RoundClosed)]
    assert closed == [("client-0", "client-2"), ("client-0", "client-1", "client-2")]
    assert all(np.isfinite(tensor).all() for tensor in coordinator.state.adapter.values())


def test_a_run_that_asks_more_than_the_policy_is_refused(config: RunConfig, tmp_path: Path) -> None:
    settled = completed(private(config))
    federation = build(settled, tmp_path / "run")
    policy = federation.policies["client-0"]
    strict = policy.privacy.model_copy(update={"min_noise_multiplier": 50.0})
    federation.policies["client-0"] = policy.model_copy(update={"privacy": strict})
    with Store(tmp_path / "state", durable=False) as store:
        starting = starting_adapter(federation.model.schema, 0)
        coordinator = Coordinator(
            settled, federation.model.schema, build_strategy(settled), store, starting=starting, expect=3
        )
        with pytest.raises(PolicyError, match=r"noise multiplier .* \(at least 50\)"):
            for _ in run_inprocess(federation, coordinator):
                pass


def test_a_simulation_leaves_its_caller_the_threads_and_the_backend_it_had(config: RunConfig, tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    before, backend = torch.get_num_threads(), matplotlib.get_backend()
    try:
        torch.set_num_threads(2)
        pyplot.switch_backend("svg")
        done = simulate(config, tmp_path)
        assert config.data is not None
        nowhere = config.data.model_copy(update={"source": "none"})
        with pytest.raises(DataError):
            simulate(config.model_copy(update={"data": nowhere}), tmp_path)

        assert (done.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert torch.get_num_threads() == 2
        assert matplotlib.get_backend().lower() == "svg"
    finally:
        torch.set_num_threads(before)
        pyplot.switch_backend(backend)
