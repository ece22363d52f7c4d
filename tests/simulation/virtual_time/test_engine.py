"""A federation in virtual time: the same as without where nothing takes time, and what a trace says where it does."""

import csv
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.ledger.hash_chain import OVER, Charge
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, FedloomError
from fedloom.core.schema import Tensors
from fedloom.server.rounds.run_log import agreed
from fedloom.server.rounds.state import ClientLost, Event, RoundClosed, RunEnded, UpdateAccepted
from fedloom.server.storage.local import Store
from fedloom.server.storage.verify import look
from fedloom.simulation.simulate import Result, simulate
from tests.support.engines import largest_difference
from tests.support.runs import tiny_run


@pytest.fixture
def configure(data: Path, tiny_base: Path) -> Any:
    """Makes a run of three clients, with some sections in place of the usual ones."""

    def configure(rounds: dict[str, Any], virtual: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        return tiny_run(
            tiny_base,
            **{
                "run": {"name": "tiny", "rounds": 3, "seed": 5},
                "rounds": {"min_clients": 3, **rounds},
                "data": {"source": str(data), "clients": 3},
                **({} if virtual is None else {"virtual_time": virtual}),
                **sections,
            },
        )

    return configure


def adapter(result: Result) -> Tensors:
    return dict(load_file(result.folder / "adapter" / "adapter_model.safetensors"))


def assignments(result: Result) -> list[dict[str, str]]:
    with (result.folder / "assignments.csv").open(newline="") as file:
        return list(csv.DictReader(file))


BUFFERED = {"mode": "buffered", "clients_per_round": 2, "min_clients": 2}


@pytest.mark.parametrize(
    "rounds", [{}, BUFFERED, {**BUFFERED, "concurrency": 2}, {"clients_per_round": 2, "min_clients": 2}]
)
def test_where_nothing_takes_time_it_is_the_plain_run_to_the_bit(
    configure: Any, tmp_path: Path, rounds: dict[str, Any]
) -> None:
    plain = simulate(configure(rounds), tmp_path / "runs")
    virtual = simulate(configure(rounds, {}), tmp_path / "runs")

    assert largest_difference(adapter(plain), adapter(virtual)) == 0.0
    assert [record.virtual_seconds for record in virtual.records] == [0.0] * 4
    assert [record.virtual_seconds for record in plain.records] == [None] * 4
    assert [(r.clients, r.bytes_up, r.bytes_down) for r in plain.records] == [
        (r.clients, r.bytes_up, r.bytes_down) for r in virtual.records
    ]


ONE_STEP = {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.3}


@pytest.fixture
def trace(tmp_path: Path) -> Any:
    """Writes a trace: start, end and seconds for a step of each session, by the client's number."""

    def trace(*sessions: tuple[int, float, float | str, float]) -> str:
        path = tmp_path / "trace.csv"
        lines = [f"client-{number},{start},{end},{step}" for number, start, end, step in sessions]
        path.write_text("\n".join(["client,start_s,end_s,step_s", *lines]))
        return str(path)

    return trace


def ends(result: Result) -> list[float]:
    """When each round was committed, to the millisecond."""
    return [round(record.virtual_seconds or 0.0, 3) for record in result.records]


def outcomes(result: Result, client: str) -> list[str]:
    return [each["outcome"] for each in assignments(result) if each["client"] == client]


def log_of(result: Result) -> list[Event]:
    with Store(result.folder / "state") as store:
        return store.events()


def test_a_round_closes_at_its_deadline_without_a_client_that_is_slow(
    configure: Any, trace: Any, tmp_path: Path
) -> None:
    speeds = trace((0, 0, "", 1), (1, 0, "", 2), (2, 0, "", 100))

    result = simulate(configure({"min_clients": 2, "deadline_s": 50}, {"trace": speeds}), tmp_path / "runs")

    assert ends(result) == [0, 50, 100, 150]
    closed = [event for event in log_of(result) if isinstance(event, RoundClosed)]
    assert [(event.clients, event.reason) for event in closed] == [(("client-0", "client-1"), "deadline")] * 3
    assert outcomes(result, "client-2") == ["over"] * 3, "it hears that its round is over, and takes part in the next"
    assert [float(each["start_s"]) for each in assignments(result) if each["client"] == "client-2"] == pytest.approx(
        [0, 50, 100], abs=1e-3
    )
    assert not [event for event in log_of(result) if isinstance(event, ClientLost)], (
        "it was heard for longer than a lease"
    )
    assert "refused" not in [note.kind for note in look(result.folder / "state").audit], "who stops sends nothing"


def test_staleness_is_what_the_speeds_make_it(configure: Any, trace: Any, tmp_path: Path) -> None:
    """One step of 2, 3 and 7 s; two updates make a round.

    At 3 s the first two close round 1, at 6 s round 2; at 7 s the third comes with what it began at 0, two rounds ago,
    and the first closes round 3 at 8 s.
    """
    speeds = trace((0, 0, "", 2), (1, 0, "", 3), (2, 0, "", 7))

    result = simulate(configure(BUFFERED, {"trace": speeds}, train=ONE_STEP), tmp_path / "runs")

    assert ends(result) == [0, 3, 6, 8]
    found = [(r["client"], r["round"], r["end_s"], r["outcome"], r["staleness"]) for r in assignments(result)]
    assert found == [
        ("client-0", "1", "2.0", "counted", "0"),
        ("client-1", "1", "3.0", "counted", "0"),
        ("client-0", "2", "5.0", "counted", "0"),
        ("client-1", "2", "6.0", "counted", "0"),
        ("client-2", "1", "7.0", "counted", "2"),
        ("client-0", "3", "8.0", "counted", "0"),
        ("client-1", "3", "8.0", "over", ""),
    ]
    events = log_of(result)
    last = [event for event in events if isinstance(event, UpdateAccepted)][-2:]
    assert [(event.client, event.round) for event in last] == [("client-2", 0), ("client-0", 2)]


def test_bytes_take_the_time_that_the_line_gives_them(configure: Any, tmp_path: Path) -> None:
    result = simulate(configure({}, {"download_mbps": 0.8, "upload_mbps": 0.1}), tmp_path / "runs")

    first, record = assignments(result)[0], result.records[1]
    assert record.bytes_up == record.bytes_down > 0
    assert float(first["download_s"]) == pytest.approx(record.bytes_down / 3 / 1e5, abs=1e-6)
    assert float(first["upload_s"]) == pytest.approx(record.bytes_up / 3 / 12_500, abs=1e-6)
    assert record.virtual_seconds == pytest.approx(float(first["download_s"]) + float(first["upload_s"]), abs=1e-5)


def test_who_goes_without_a_word_is_waited_for_until_its_lease_lapses(
    configure: Any, trace: Any, tmp_path: Path
) -> None:
    speeds = trace((0, 0, "", 1), (1, 0, "", 31 / 3), (2, 0, 2, 5))

    result = simulate(configure({"min_clients": 2, "lease_s": 30}, {"trace": speeds}), tmp_path / "runs")

    assert ends(result) == [0, 32, 63, 94], "it was heard last at 2 s, so at 31 s it is still waited for"
    assert [(e.client, e.reason) for e in log_of(result) if isinstance(e, ClientLost)] == [("client-2", "lease")]
    assert outcomes(result, "client-2") == ["away"]


def test_a_client_that_is_back_begins_anew(configure: Any, trace: Any, tmp_path: Path) -> None:
    """It is gone at 2 s and back at 10 s, in a round that still asks for it."""
    speeds = trace((0, 0, "", 1), (1, 0, "", 1), (2, 0, 2, 5), (2, 10, "", 5))

    result = simulate(configure({"lease_s": 30}, {"trace": speeds}), tmp_path / "runs")

    assert ends(result) == [0, 25, 40, 55]
    assert outcomes(result, "client-2") == ["away", "counted", "counted", "counted"]


PRIVATE = {"enabled": True, "epsilon": 20.0, "delta": 1e-2, "noise_multiplier": 3.0}


def charges(result: Result, client: str) -> list[Charge]:
    (path,) = (result.folder / "clients" / client / "ledger").glob("*.ledger")
    with Ledger(path.parent, path.stem) as ledger:
        return ledger.charges()


def test_every_assignment_that_was_begun_is_charged_whatever_became_of_it(configure: Any, tmp_path: Path) -> None:
    virtual = {"step_s": 2.0, "step_spread": 0.5, "mean_on_s": 60, "mean_off_s": 10, "dropout_rate": 0.3, "seed": 1}
    rounds = {"min_clients": 1, "clients_per_round": 2, "deadline_s": 20}
    run = {"name": "tiny", "rounds": 8, "seed": 5}

    result = simulate(configure(rounds, virtual, run=run, privacy=PRIVATE), tmp_path / "runs")

    seen = {each["outcome"] for each in assignments(result)}
    assert seen >= {"counted", "dropped", "away"}, "or it would show nothing"
    for client in ("client-0", "client-1", "client-2"):
        begun, charged = outcomes(result, client), charges(result, client)
        assert len(charged) == len(begun) - begun.count("declined") > 0
        assert sum(charge.digest is None for charge in charged) >= begun.count("dropped") + begun.count("away")
        accepted = [each for each in log_of(result) if isinstance(each, UpdateAccepted) and each.client == client]
        assert len(accepted) == begun.count("counted")
        assert result.privacy[client].rounds == len(charged)


def test_a_client_that_is_cut_off_three_times_in_a_row_declines_and_the_run_goes_on(
    configure: Any, trace: Any, tmp_path: Path
) -> None:
    """As its ledger has it that a machine dies in every round; a simulation must not spend more than a site would."""
    cut_off = [(2, start, start + 1, 5) for start in (0, 10, 20, 30, 40)]
    speeds = trace((0, 0, "", 40), (1, 0, "", 40), *cut_off)
    rounds, run = {"min_clients": 2}, {"name": "tiny", "rounds": 5, "seed": 5}

    result = simulate(configure(rounds, {"trace": speeds}, run=run, privacy=PRIVATE), tmp_path / "runs")

    assert result.records[-1].round == 5
    assert outcomes(result, "client-2") == ["away"] * 3 + ["declined"]
    assert [(charge.digest, charge.dropped) for charge in charges(result, "client-2")] == [(None, None)] * 3


def test_the_charge_of_a_round_that_closed_meanwhile_says_so(configure: Any, trace: Any, tmp_path: Path) -> None:
    """It would have been cut off at 90 s; at 50 s it hears that the round is over, as a client that trains does."""
    speeds = trace((0, 0, "", 1), (1, 0, "", 1), (2, 0, 90, 100))
    rounds, run = {"min_clients": 2, "deadline_s": 50}, {"name": "tiny", "rounds": 1, "seed": 5}

    result = simulate(configure(rounds, {"trace": speeds}, run=run, privacy=PRIVATE), tmp_path / "runs")

    assert outcomes(result, "client-2") == ["over"]
    assert [(charge.digest, charge.dropped) for charge in charges(result, "client-2")] == [(None, OVER)]


def test_one_seed_gives_one_course_and_one_adapter(configure: Any, tmp_path: Path) -> None:
    virtual = {"step_s": 2.0, "step_spread": 1.0, "mean_on_s": 40, "mean_off_s": 20, "dropout_rate": 0.2}
    rounds = {**BUFFERED, "lease_s": 5}
    one, two = (simulate(configure(rounds, virtual), tmp_path / "runs") for _ in range(2))
    other = simulate(configure(rounds, {**virtual, "seed": 1}), tmp_path / "runs")

    assert assignments(one) == assignments(two) != assignments(other)
    assert ends(one) == ends(two) != ends(other)
    assert largest_difference(adapter(one), adapter(two)) == 0.0


@pytest.mark.parametrize("rounds", [{"min_clients": 3}, BUFFERED])
def test_a_run_that_nobody_is_left_to_end_says_so(
    configure: Any, trace: Any, tmp_path: Path, rounds: dict[str, Any]
) -> None:
    speeds = trace((0, 0, "", 1), (1, 0, 100, 60), (2, 200, 300, 60))

    with pytest.raises(FedloomError, match=r"round 1 of 3 does not end: at .* it has . of the . updates it needs, and"):
        simulate(configure(rounds, {"trace": speeds}), tmp_path / "runs")


def test_a_run_in_which_no_work_is_ever_done_in_time_says_so(configure: Any, tmp_path: Path) -> None:
    never = {"step_s": 1e4, "mean_on_s": 20, "mean_off_s": 20}

    with pytest.raises(FedloomError, match="round 1 of 3 does not end"):
        simulate(configure({"min_clients": 1, "give_up_s": 200, "deadline_s": 10}, never), tmp_path / "runs")


def test_the_coordinator_ends_a_run_whose_clients_do_not_come_back(configure: Any, trace: Any, tmp_path: Path) -> None:
    speeds = trace((0, 0, "", 1), (1, 0, 5, 1), (2, 0, 5, 1))

    result = simulate(
        configure({"min_clients": 3, "give_up_s": 500, "deadline_s": 5}, {"trace": speeds}), tmp_path / "runs"
    )

    assert result.records[-1].round == 1
    assert isinstance(log_of(result)[-1], RunEnded)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"engine": {"kind": "grpc"}}, 'engine.kind = "grpc" works in real time'),
        (
            {"secure_aggregation": {"enabled": True, "max_clients": 3}},
            "nothing of the further messages of a secure sum",
        ),
    ],
)
def test_what_has_no_virtual_time_is_refused_before_anything_is_written(
    configure: Any, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(configure({}, {}, **sections), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_trace_without_one_of_the_clients_leaves_no_run_folder(configure: Any, trace: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no line for 'client-2', so it would never be there"):
        simulate(configure({}, {"trace": trace((0, 0, "", 1), (1, 0, "", 1))}), tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_clients_agree_on_the_same_run_with_and_without(configure: Any, tiny_model: AdapterModel) -> None:
    plain, virtual = configure({}), configure({}, {"step_s": 3.0})

    assert agreed(plain, tiny_model.schema) == agreed(virtual, tiny_model.schema)
    assert plain.spec == virtual.spec
