"""What is counted, and that the documentation lists it."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import UpdateRejected
from fedloom.server.monitoring.recorders.api import RoundRecord
from fedloom.server.rounds.evaluation import federated_score
from tests.dashboard.stage import Stage, config, stage

SCORED = federated_score(
    RunConfig.model_validate(
        config().model_dump()
        | {"privacy": {"enabled": False}, "federated_evaluation": {"enabled": True, "personalised": True}}
    ),
    [tuple(each / 5**0.5 for each in (100.0, 70.0, 30.0, 80.0, 20.0))],
)

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"


def counted(live: Stage) -> dict[str, float]:
    """Every sample, as Prometheus reads it."""
    families = text_string_to_metric_families(live.observation.metrics.text().decode())
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_happens_is_counted(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        live.join("ann", "ben")
        live.rounds(2)
        live.ask()
        live.clients[0].send()
        with pytest.raises(UpdateRejected):
            live.clients[1].send(float("nan"))
        live.stranger("a name with spaces")
        found = counted(live)
        while sum(value for name, value in found.items() if "rpc_calls_total Join FAILED" in name) < 1:
            found = counted(live)  # a call is counted once its answer is on its way

    payload = 4 * 2 * 8 * 384 * 4
    assert found["fedloom_rounds_committed_total"] == 2
    assert found["fedloom_round_duration_seconds_count"] == 2
    assert (found["fedloom_rounds_done"], found["fedloom_rounds_planned"]) == (2, 10)
    assert found["fedloom_updates_accepted_total"] == 5
    assert found["fedloom_updates_rejected_total UpdateRejected"] == 1
    assert found["fedloom_clients_lost_total rejected"] == 1
    assert found["fedloom_clients_live"] == 2
    assert (found["fedloom_round_clients"], found["fedloom_round_updates"]) == (2, 1)
    assert (found["fedloom_sent_bytes_total"], found["fedloom_received_bytes_total"]) == (6 * payload, 6 * payload)
    assert found["fedloom_refusals_total"] == 1
    assert found["fedloom_rpc_calls_total Submit OK"] == 5
    assert found["fedloom_rpc_calls_total Submit OUT_OF_RANGE"] == 1
    assert found["fedloom_rpc_calls_total Join FAILED_PRECONDITION"] == 1
    assert found["fedloom_rpc_duration_seconds_count Submit"] == 6
    assert found["fedloom_store_commit_duration_seconds_count"] >= 10
    assert round(found["fedloom_epsilon_most"], 2) == 4.47, "asked three times, see the README's demo"


def test_every_metric_is_documented_and_no_other(tmp_path: Path) -> None:
    user: dict[str, object] = {"enabled": True, "cohort": 2, "noise_multiplier": 20.0}
    names: set[str] = set()
    for number, run in enumerate((config(), config(user_level=user))):
        with stage(tmp_path / str(number), run, strategy=run.user_level.enabled) as live:
            live.observation.metrics.record(RoundRecord(2, 2, 0.75, 0.5, None, None, 0, 0, 0.0, None, SCORED))
            families = text_string_to_metric_families(live.observation.metrics.text().decode())
            names |= {
                family.name + ("_total" if family.type == "counter" else "")
                for family in families
                if not family.name.endswith("_created")
            }

    documented = re.findall(r"^\| `((?:fedloom|process)_\w+)` \|", PAGE.read_text(encoding="utf-8"), re.M)

    assert names == set(documented)
    assert len(documented) == len(set(documented))
    assert all(
        re.search(r"_(total|seconds|bytes)$|^fedloom_(clients|round|rounds|epsilon|held_out|federated)_|_fds$", name)
        for name in names
    )


def test_the_newest_score_is_shown_once_there_is_one(live: Stage) -> None:
    assert "fedloom_held_out_accuracy" not in counted(live)

    for number, accuracy in ((1, 0.25), (2, 0.75), (3, None)):
        loss = None if accuracy is None else 1 - accuracy
        live.observation.metrics.record(RoundRecord(number, 2, accuracy, loss, None, None, 0, 0, 0.0))

    found = counted(live)
    assert (found["fedloom_held_out_accuracy"], found["fedloom_held_out_loss"]) == (0.75, 0.25)
    assert "fedloom_federated_accuracy" not in found
    for federated in (SCORED, None):
        live.observation.metrics.record(RoundRecord(4, 2, None, None, None, None, 0, 0, 0.0, None, federated))
    assert counted(live)["fedloom_federated_accuracy"] == pytest.approx(0.7)


def test_no_metric_is_about_one_client(tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        live.join("ann-of-the-ward", "ben-of-the-ward")
        live.rounds(1)

        assert "of-the-ward" not in live.observation.metrics.text().decode()
