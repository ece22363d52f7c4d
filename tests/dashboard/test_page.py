"""The page in a real browser, before a real coordinator. Its pictures are the ones in docs/dashboard.md."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.core.errors import UpdateRejected
from fedloom.core.schema import Tensors
from fedloom.server.monitoring.dashboard import runs as board
from tests.dashboard.browser import Browser, browser, found
from tests.dashboard.stage import TOKENS, Stage, config, finished_run, stage

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(found() is None, reason="there is no Chromium here: apt-get install chromium"),
]

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "images"
SCRIPT = "<script>document.title='broken'</script>"
LONG = "n" * 256
# The scores of the demo's run, as the README prints them.
ACCURACY = [0.471, None, 0.556, None, 0.740, None, 0.740, None, 0.754, None, 0.758]
LOSS = [0.695, None, 0.670, None, 0.532, None, 0.688, None, 0.741, None, 0.715]
READY = (
    "!document.getElementById('run').hidden && document.querySelectorAll('.chart:not([hidden]) .plot > *').length >= 2"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests; none may leave it with a complaint."""
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_complaints(page: Browser) -> Iterator[None]:
    page.complaints.clear()
    yield
    page.go("about:blank")
    page.call("Network.clearBrowserCookies")
    # Coordinators end with their tests, while the page still asks.
    assert not [each for each in page.complaints if "ERR_CONNECTION_REFUSED" not in each]


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Stage]:
    """Six clients in round 7 of 10: two have sent, one was rejected, one has left; somebody was refused."""
    finished_run(tmp_path / "runs", "sentiment", ACCURACY, LOSS)
    with stage(tmp_path / "runs", expect=6) as live:
        live.join("charite", "guys", "karolinska", "mayo", "tgh", "ucsf")
        live.rounds(6)
        live.ask()
        live.stranger("a name with spaces")
        for client in live.clients[:2]:
            client.send()
        with pytest.raises(UpdateRejected):
            live.clients[2].send(float("nan"))
        live.clients[3].line.leave("maintenance")
        live.coordinator.tick()
        yield live


def opened(page: Browser, url: str) -> None:
    page.go("about:blank")
    page.go(url)
    page.wait(f"Boolean({READY})")


def sideways(page: Browser) -> list[str]:
    """What is wider than the window."""
    script = """[...document.querySelectorAll('body *')].filter((each) => {
        const box = each.getBoundingClientRect();
        return box.width && box.right > innerWidth + 0.5 && !each.closest('.list, .across, .sr, thead, .skip, .who *');
    }).map((each) => each.outerHTML.slice(0, 120))"""
    found: list[str] = page.run(script)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844)])
def test_a_run_looks_right_wherever_it_is_seen(
    page: Browser, busy: Stage, tmp_path: Path, device: str, width: int, height: int, scheme: str
) -> None:
    page.view(width, height, scheme, phone=device == "phone")
    # Kept in the repository only when asked: the pictures hold times of the day.
    folder = PICTURES if os.environ.get("FEDLOOM_PICTURES") else tmp_path
    for name, query in (("running", ""), ("finished", "?run=sentiment")):
        opened(page, busy.url + query)
        page.wait("document.getElementById('clients').innerText.includes('5.43') || location.search !== ''")
        page.wait("document.getElementById('tiles').innerText.includes('of 6')")
        page.wait("!document.body.innerText.includes('Being worked out')")
        path = folder / f"dashboard-{name}-{device}-{scheme}.png"

        page.picture(path, width)

        assert path.stat().st_size > 20_000
        assert page.run("document.documentElement.scrollWidth") <= width
        assert sideways(page) == []
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(245, 247, 248)" if scheme == "light" else "rgb(15, 21, 24)")


def test_what_it_says_is_what_happened(page: Browser, busy: Stage) -> None:
    page.view(1280, 800)
    opened(page, busy.url)

    text = page.run("document.getElementById('run').innerText")

    assert "6 of 10 rounds committed" in text
    assert "Round 7 has 2 of 6 updates, 2 lost" in text
    assert page.run("[...document.querySelectorAll('#clients tbody tr')].map((row) => row.cells[0].innerText)") == [
        "karolinska",
        "mayo",
        "tgh",
        "ucsf",
        "charite",
        "guys",
    ]
    assert " up in fp32, " in text
    assert " down in fp32" in text
    assert "lost: update rejected" in text
    assert "a name with spaces" in text
    # A live view: what happens next is seen without a reload.
    for client in busy.clients[4:]:
        client.send()
    page.wait("document.getElementById('rounds').innerText.startsWith('7 of 10')")


def test_the_curves_have_axes_and_can_be_read_by_keyboard(page: Browser, busy: Stage) -> None:
    page.view(1280, 800)
    opened(page, busy.url + "?run=sentiment")
    plot = "document.querySelector('#charts .plot')"

    axis = page.run(f"[...{plot}.querySelectorAll('text')].map((each) => each.textContent)")
    page.run(f"{plot}.focus()")
    page.key("ArrowRight")
    first = page.run("document.querySelector('#charts .reading').innerText")
    page.key("ArrowRight")
    second = page.run("document.querySelector('#charts .reading').innerText")

    assert {"40 %", "60 %", "80 %", "0", "10"} <= set(axis)
    assert (first, second) == ("round 0: 47.1 %", "round 2: 55.6 %")
    assert "round 2: 55.6 %" in page.run(f"{plot}.getAttribute('aria-label')")


def test_a_coordinators_own_scores_appear_as_they_come(page: Browser, tmp_path: Path) -> None:
    scores = [(0.5, 0.7), (0.625, 0.6), (0.875, 0.4)]

    def score(adapter: Tensors) -> tuple[float, float]:
        return scores.pop(0)

    run = config(rounds=5, evaluation={"every": 2})
    with stage(tmp_path / "runs", run, expect=2, score=score) as live:
        live.join("ann", "ben")
        page.view(1280, 800)
        opened(page, live.url)
        page.wait("!document.getElementById('unscored').hidden")

        live.rounds(2)  # one point, and no round on either side of it that could make a line
        page.wait("document.getElementById('unscored').hidden")
        page.wait("document.querySelector('#charts .reading').innerText === 'round 2: 50.0 %'")
        assert page.run("document.querySelectorAll('#charts .accuracy-dot').length") == 1
        live.rounds(3)
        page.wait("document.querySelector('#charts .reading').innerText === 'round 5: 87.5 %'")

        plot = "document.querySelector('#charts .plot')"
        assert page.run("document.querySelectorAll('#charts .accuracy-dot').length") == 3
        assert "3 points" in page.run(f"{plot}.getAttribute('aria-label')")
        assert "87.5 %" in page.run("document.getElementById('tiles').innerText")
        assert "from 50.0 % at round 2" in page.run("document.getElementById('tiles').innerText")


def test_what_the_clients_score_together_is_shown_as_theirs(page: Browser, tmp_path: Path) -> None:
    run = config(federated_evaluation={"enabled": True, "personalised": True, "noise_multiplier": 2.0})
    with stage(tmp_path / "runs", run, expect=2) as live:
        live.join("ann", "ben")
        page.view(1280, 800)
        opened(page, live.url)
        for right in (200.0, 350.0):
            for client in live.clients:  # of 500 rows; of those after local steps 450 right
                client.score = tuple(each / 5**0.5 for each in (500.0, right, 30.0, 450.0, 20.0))
            live.rounds(1)

        page.wait("document.querySelector('#charts .reading').innerText === 'round 1: 70.0 %'")
        told = page.run("document.getElementById('tiles').innerText")
        assert "Accuracy at the clients" in told
        assert "70.0 % ± 1.6 %" in told.replace("\u00a0", " ")
        assert "from 40.0 % at round 0" in told
        assert "90.0 %" in told
        assert "Held-out" not in page.run("document.getElementById('charts').innerText")


def test_names_of_strangers_are_text_and_the_page_stays_in_its_width(page: Browser, tmp_path: Path) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        live.join(SCRIPT, LONG)
        live.rounds(1)
        live.stranger(f"<img src=x onerror=document.title='broken'> {LONG[:180]}")
        page.view(360, 740, phone=True)
        opened(page, live.url)
        page.wait("document.querySelectorAll('#clients tbody tr').length === 2")

        names = page.run("[...document.querySelectorAll('#clients tbody tr td.who')].map((cell) => cell.textContent)")

        assert set(names) == {SCRIPT, LONG}
        assert page.run("document.title") == "ward-notes · fedloom"
        assert page.run("document.querySelectorAll('#run img, #run script').length") == 0
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert sideways(page) == []


def test_everything_is_reached_by_keyboard_and_shows_where_it_is(page: Browser, busy: Stage) -> None:
    page.view(1280, 800)
    opened(page, f"{busy.url}#token={TOKENS.operator}")
    page.wait("!document.getElementById('stop').hidden")
    page.run("document.activeElement.blur()")
    named = "(each) => each.id || each.className || each.tagName"
    reached = []
    for _ in range(30):
        page.key("Tab")
        reached.append(page.run(f"({named})(document.activeElement)"))
        if reached[-1] == "SUMMARY":
            break
        seen = page.run("getComputedStyle(document.activeElement).outlineStyle")
        assert seen != "none", f"{reached[-1]} does not show that it has the focus"

    assert reached == [
        *("skip", "runs", "session", "adapter", "finish", "stop", "INPUT", "plot", "plot", "across", "csv"),
        *("list", "list", "invite", "list", "SUMMARY"),
    ]
    unnamed = page.run("""[...document.querySelectorAll('a, button, input, select')].filter((each) =>
        !(each.innerText || each.labels?.length || each.ariaLabel)).map((each) => each.outerHTML)""")
    assert unnamed == []


def test_an_operator_signs_in_asks_twice_and_stops(page: Browser, busy: Stage) -> None:
    page.view(1280, 800)
    opened(page, f"{busy.url}#token={TOKENS.operator}")
    page.wait("!document.getElementById('stop').hidden")
    assert page.run("location.hash + document.cookie") == "", "neither the address nor a script has the token"

    page.run("document.getElementById('stop').focus()")
    page.key("Enter")
    page.wait("document.getElementById('ask-sure').open")
    assert page.run("document.activeElement.id") == "sure-cancel", "the harmless answer has the focus"
    page.key("Escape")
    page.wait("!document.getElementById('ask-sure').open")
    assert busy.observation.stop is not None

    page.run("document.getElementById('stop').click()")
    page.run("document.getElementById('sure-yes').click()")

    page.wait("document.getElementById('stop').hidden")
    assert busy.observation.stop is None
    page.run("document.getElementById('session').click()")
    page.wait("document.getElementById('session').innerText === 'Sign in'")


def test_a_run_that_stands_still_is_loud_and_can_be_finished(
    page: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stage(tmp_path / "runs", expect=2) as live:
        live.join("ann", "ben")
        live.rounds(1)
        live.ask()
        live.clients[1].line.leave("budget spent")
        live.coordinator.tick()
        page.view(1280, 800)
        opened(page, f"{live.url}#token={TOKENS.operator}")
        page.wait("!document.getElementById('finish').hidden")
        waits = "ound 2 can reach only 1 of the 2 updates it needs, and waits for more clients"
        page.wait(f"document.getElementById('standing').innerText.includes({waits!r})")
        assert page.run("document.getElementById('alarm').hidden"), "it has only just begun to wait"

        monkeypatch.setattr(board, "_ALARM_S", 0.0)

        page.wait("!document.getElementById('alarm').hidden")
        assert f"This run stands still: r{waits}" in page.run("document.getElementById('alarm').innerText")
        assert page.run("document.title").startswith("⚠ stands still: ward-notes")
        assert page.run("document.getElementById('phase').innerText") == "Stands still"
        assert "left" not in page.run("document.getElementById('eta').innerText")
        page.run("document.getElementById('finish').click()")
        assert page.run("document.activeElement.id") == "sure-cancel", "the harmless answer has the focus"
        page.run("document.getElementById('sure-yes').click()")
        page.wait("document.getElementById('standing').innerText === 'It was ended with what is committed.'")
        page.wait("document.getElementById('happened').innerText.includes('an operator said so')")
        assert page.run("document.getElementById('alarm').hidden")


def test_clients_are_invited_and_revoked_and_a_token_is_shown_once(page: Browser, tmp_path: Path) -> None:
    with stage(tmp_path / "runs") as live:
        page.view(1280, 800)
        opened(page, live.url)
        page.wait("document.getElementById('certificates').innerText.includes('this coordinator')")
        assert page.run("document.getElementById('invite').hidden"), "an observer only looks"
        opened(page, f"{live.url}#token={TOKENS.operator}")
        page.wait("!document.getElementById('invite').hidden")

        page.run("document.getElementById('invite').click()")
        page.run("document.getElementById('sure-name').value = 'a site'")
        page.run("document.getElementById('sure-yes').click()")
        page.wait("document.getElementById('sure-wrong').innerText.includes('1 to 64 letters')")
        page.run("document.getElementById('sure-name').value = 'site-a'")
        page.run("document.getElementById('sure-yes').click()")
        page.wait("document.getElementById('sure-token').value.startsWith('fedloom-join-1.')")
        page.run("document.getElementById('sure-cancel').click()")
        page.wait("document.getElementById('sure-token').value === ''")
        page.wait("document.getElementById('certificates').innerText.includes('site-a')")
        page.run("document.querySelector('[aria-label=\"Revoke site-a\"]').click()")
        assert page.run("document.getElementById('sure-title').innerText") == "Revoke site-a?"
        page.run("document.getElementById('sure-yes').click()")
        page.wait("!document.getElementById('certificates').innerText.includes('site-a')")
        # The browser itself notes the refusal of the wrong name.
        page.complaints[:] = [each for each in page.complaints if "/api/invite" not in each]


def test_other_runs_are_laid_over_this_one(page: Browser, busy: Stage) -> None:
    page.view(1280, 800)
    opened(page, busy.url)
    assert page.run("document.querySelectorAll('#charts .other-0').length") == 0

    page.run("document.querySelector('#overlay input').click()")

    page.wait("document.querySelectorAll('#charts .line.other-0').length >= 2")
    page.wait("document.querySelector('#charts .reading').innerText === 'sentiment, round 10: 75.8 %'")
    page.run("document.querySelector('#overlay input').click()")
    page.wait("document.querySelectorAll('#charts .other-0').length === 0")


def test_who_took_how_long_and_who_was_lost_is_told_by_round(page: Browser, busy: Stage) -> None:
    page.view(1280, 800)
    opened(page, busy.url)

    rows = page.run(
        "Object.fromEntries([...document.querySelectorAll('.timeline tbody tr')]"
        ".map((row) => [row.cells[0].innerText, row.cells[7].innerText]))"
    )

    assert {name: rows[name] for name in ("karolinska", "mayo", "tgh", "ucsf")} == {
        "karolinska": "lost",
        "mayo": "lost",
        "tgh": "…",
        "ucsf": "…",
    }
    assert page.run("document.querySelectorAll('.timeline thead th').length") == 9
    assert page.run("document.querySelector('.timeline tbody').innerText.includes('lost 1×')")
    heads = page.run("[...document.querySelectorAll('#past th')].map((each) => each.innerText)")
    assert heads[-1] == "Took"
    happened = page.run("document.getElementById('happened').innerText")
    assert "in round 7: it left; its own log says why" in happened
    keys = page.run("document.getElementById('config').innerText")
    assert "min_clients" in keys
    assert "secure_aggregation" not in keys, "what is switched off is not shown"


def test_beyond_loopback_the_page_asks_for_a_token(page: Browser, tmp_path: Path) -> None:
    with stage(tmp_path / "runs", listen="0.0.0.0:0") as live:
        url = live.url.replace("0.0.0.0", "127.0.0.1")
        page.view(390, 844, phone=True)
        page.go(url)
        page.wait("document.activeElement.id === 'gate-token'")
        assert page.run("document.getElementById('run').hidden")

        page.type("not a token")
        page.key("Enter")
        page.wait("document.getElementById('gate-wrong').innerText !== ''")
        page.type(TOKENS.observer)
        page.key("Enter")

        page.wait(f"Boolean({READY})")
        assert page.run("document.getElementById('stop').hidden")
        assert page.run("document.getElementById('role').textContent") == "Observer, read only"
        # The browser itself notes the refusal of the wrong token.
        page.complaints[:] = [each for each in page.complaints if "/api/session" not in each]


def test_a_coordinator_that_ends_is_said_to_have(page: Browser, tmp_path: Path) -> None:
    page.view(1280, 800)
    with stage(tmp_path / "runs") as live:
        opened(page, live.url)
        assert "No client has joined yet" in page.run("document.getElementById('clients').innerText")

    page.wait("!document.getElementById('banner').hidden")
    assert "No answer from the coordinator" in page.run("document.getElementById('banner').innerText")
