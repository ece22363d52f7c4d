"""What clients are drawn to be, and what a trace says that they are."""

import math
from itertools import takewhile
from pathlib import Path
from statistics import mean, median

import pytest

from fedloom.core.config.virtual_time import VirtualTimeSection
from fedloom.core.errors import ConfigError
from fedloom.simulation.virtual_time.devices import Device, devices
from fedloom.simulation.virtual_time.trace import Session, read_trace

MANY = [f"client-{number}" for number in range(2000)]


def drawn(**section: float) -> list[Device]:
    return list(devices(VirtualTimeSection(**section), MANY).values())


def test_a_client_is_the_same_whoever_else_is_there_and_in_whatever_order() -> None:
    section = VirtualTimeSection(step_s=1, step_spread=1, network_spread=1, upload_mbps=1, mean_on_s=9, mean_off_s=9)
    alone = devices(section, ["client-7"])["client-7"]
    among = devices(section, MANY[::-1])["client-7"]

    assert alone == among
    one, two = (list(takewhile(lambda each: each.end_s < 1000, each.sessions())) for each in (alone, among))
    assert one == two != []
    another = devices(section.model_copy(update={"seed": 1}), ["client-7"])["client-7"]
    assert (alone.step_s, alone.line) != (another.step_s, another.line)


def test_speeds_are_lognormal_about_the_median() -> None:
    found = drawn(step_s=3.0, step_spread=0.5, network_spread=1.0, download_mbps=8, upload_mbps=4)

    logs = [math.log(each.step_s / 3.0) for each in found]
    assert mean(logs) == pytest.approx(0, abs=0.05)
    assert mean(log * log for log in logs) == pytest.approx(0.25, rel=0.1)
    assert median(each.download_s(10**6) for each in found) == pytest.approx(1.0, rel=0.1)
    assert median(each.upload_s(10**6) for each in found) == pytest.approx(2.0, rel=0.1)
    assert mean(math.log(each.upload_s(10**6) / 2) ** 2 for each in found) == pytest.approx(1.0, rel=0.1)
    pairs = [(math.log(each.step_s / 3.0), math.log(each.line)) for each in found]
    assert mean(one * two for one, two in pairs) == pytest.approx(0, abs=0.05), "a slow computer may have a fast line"


def test_without_spread_all_are_alike_and_without_a_rate_bytes_take_no_time() -> None:
    found = drawn(step_s=3.0)

    assert {(each.step_s, each.line, each.upload_s(10**9)) for each in found} == {(3.0, 1.0, 0.0)}
    assert list(found[0].sessions()) == [Session(0.0, math.inf)]


def test_the_share_of_clients_that_are_there_is_the_same_at_all_times() -> None:
    found = drawn(mean_on_s=30, mean_off_s=60)

    def is_there(device: Device, time_s: float) -> bool:
        begun = list(takewhile(lambda each: each.start_s <= time_s, device.sessions()))
        return bool(begun) and time_s < begun[-1].end_s

    for time_s in (0, 5, 200):
        assert mean(is_there(each, time_s) for each in found) == pytest.approx(1 / 3, abs=0.04)
    assert mean(each.at_start for each in found) == pytest.approx(1 / 3, abs=0.04)
    second = [next(each.sessions()) for each in found if not each.at_start]
    assert mean(each.end_s - each.start_s for each in second) == pytest.approx(30, rel=0.1)
    assert mean(each.start_s for each in second) == pytest.approx(60, rel=0.1)


def test_dropouts_come_at_their_rate_each_on_its_own() -> None:
    found = drawn(dropout_rate=0.2)

    first, second = ([each.dropout(number) for each in found] for number in (0, 1))
    for shares in (first, second):
        assert mean(share is not None for share in shares) == pytest.approx(0.2, abs=0.03)
        assert mean(share for share in shares if share is not None) == pytest.approx(0.5, abs=0.05)
    both = mean(None not in pair for pair in zip(first, second, strict=True))
    assert both == pytest.approx(0.04, abs=0.015)
    assert [each.dropout(1) for each in found] == second, "asked again, it is the same"
    assert {each.dropout(0) for each in drawn()} == {None}


def test_a_trace_is_read_with_its_speeds_in_the_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("client,start_s,end_s,step_s\nann,50,,\nann,0,20.5,3\nben,1,2,0\nstranger,0,1,1\n")

    assert read_trace(path, ["ann", "ben"]) == {
        "ann": (Session(0, 20.5, 3), Session(50, math.inf, None)),
        "ben": (Session(1, 2, 0),),
    }
    path.write_text("start_s,client,end_s\n0,ann,1\n")
    assert read_trace(path, ["ann"]) == {"ann": (Session(0, 1),)}
    made = devices(VirtualTimeSection(trace=str(path)), ["ann"])["ann"]
    assert list(made.sessions()) == [Session(0, 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client,from,to\nann,0,1\n", "has the columns client, from, to; needed are client, start_s, end_s"),
        ("", "has the columns none"),
        ("client,start_s,end_s,speed\nann,0,1,1\n", "columns client, start_s, end_s, speed"),
        ("client,start_s,end_s\nann,zero,1\n", "line 2: could not convert string to float: 'zero'; give seconds"),
        ("client,start_s,end_s\nann,0,1\nann\n", "line 3: could not convert"),
        ("client,start_s,end_s\nann,5,5\n", r"line 2 has start_s = 5, end_s = 5, .* needed are 0 <= start_s < end_s"),
        ("client,start_s,end_s\nann,-1,5\n", "start_s = -1"),
        ("client,start_s,end_s\nann,nan,5\n", "start_s = nan"),
        ("client,start_s,end_s,step_s\nann,0,5,inf\n", "step_s = inf"),
        ("client,start_s,end_s,step_s\nann,0,5,nan\n", "step_s = nan"),
        ("client,start_s,end_s\nann,0,5\nann,4,6\n", "'ann' there from 4 s on and until 5 s at once"),
        ("client,start_s,end_s\nben,0,5\n", "no line for 'ann', so it would never be there"),
        ("client,start_s,end_s\nann\x00,0,5\n", "no line for 'ann'|cannot be read"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)

    with pytest.raises(ConfigError, match=said):
        read_trace(path, ["ann"])


def test_a_trace_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_bytes(b"client,start_s,end_s\n\xff\xfe,0,1\n")

    for path in (tmp_path / "trace.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: .*; give a CSV file in UTF-8"):
            read_trace(path, ["ann"])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"mean_on_s": 5}, "mean_on_s and mean_off_s go together"),
        ({"mean_on_s": 5, "mean_off_s": 5, "trace": "trace.csv"}, "both say when clients are there"),
        ({"dropout_rate": 1}, "dropout_rate"),
        ({"step": 1}, "unknown key 'step'; did you mean 'step_s'"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VirtualTimeSection(**section)
