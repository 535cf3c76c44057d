"""What is drawn: every number where it belongs, and nothing that does not fit or that moves the cursor."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from instep_tools.top.screen import Picture, draw
from instep_tools.top.snapshot import SORTS, ModelTotals, Numbers, StreamQuery, rates_between, select
from instep_tools.top.text import fitted, period, plain, scaled, short, sparkline
from instep_tools.top.view import ScreenView
from tests.tools.top.support import NUMBERS, snapshot, stream

PHASES = ("queue", "compute", "send", "latency")
SIZES = [(80, 24), (120, 40)]
HOSTILE = ("\x1b[2J\x1b]0;title\x07", "a\r\nb\tc", "\u202eright to left", "zero\u200bwidth", "\x9b31mred", "\u2028line")
WIDE = ("日本語の長い名前" * 10, "🎤️ microphone", "e\u0301" * 40, "ｆｕｌｌ")


def shown(picture: Picture, width: int, height: int, keys: bool = True) -> list[str]:
    """The lines as a console of that size prints them."""
    console = Console(file=StringIO(), width=width, height=height, record=True, highlight=False, force_terminal=True)
    for line in draw(picture, width, height, keys):
        console.print(line, soft_wrap=True)
    return console.export_text(clear=False).splitlines()


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("helping", [False, True])
def test_the_largest_numbers_fit(width: int, height: int, helping: bool) -> None:
    streams = [stream(f"microphone-{number:05}") for number in range(100)]
    before, now = (
        snapshot(10.0, streams),
        snapshot(11.0, streams, query=StreamQuery(sort="pending"), frames_total=123_456_789_012.0 + 5e6),
    )
    view = ScreenView(StreamQuery())
    view.helping = helping
    picture = Picture("tcp://127.0.0.1:5757", view, now, rates_between(before, now), [1.0, 5e6] * 40)
    lines = shown(picture, width, height)
    assert len(lines) == height
    assert max(map(cell_len, lines)) <= width
    assert "…" not in "".join(lines).replace("1 … 5", "")
    text = "\n".join(lines)
    assert "5.00M" in text
    assert "BUSY 1.23M, SEQ_GAP 12" in text
    assert "123G frames, 50% compared, no mismatch, 0.4 s behind" in text
    assert ("clears" in text) is helping
    assert text.count("microphone-000") == (0 if helping else height - 12)
    assert lines[-1].startswith("100 streams  ? help  q quit")


@pytest.mark.parametrize("height", range(1, 16))
@pytest.mark.parametrize("helping", [False, True])
def test_a_low_terminal_shows_what_fits_and_the_keys(height: int, helping: bool) -> None:
    view = ScreenView(StreamQuery())
    view.helping = helping
    picture = Picture("tcp://h:1", view, snapshot(1.0, [stream(f"mic-{number}") for number in range(50)]))
    lines = shown(picture, 80, height)
    assert len(lines) == height
    assert lines[-1].startswith("50 streams  ? help  q quit")


def test_the_numbers_are_where_they_belong() -> None:
    streams = [
        stream("mic", state="connected", rate=50.0, seq=1234, pending=3, idle_s=0.25, expires_in_s=3600.0),
        stream("old", state="parked", rate=None, seq=None, pending=0, idle_s=90.0, expires_in_s=None),
    ]
    phases = {"recent_queue_us_p50": 120.0, "recent_compute_us_p50": 250.0, "recent_send_us_p50": 40.0}
    before = snapshot(10.0, streams, ("ears", "wake-word-detector"), batches_total=100.0)
    now = snapshot(
        12.0,
        streams,
        ("ears", "wake-word-detector"),
        StreamQuery(),
        batches_total=700.0,
        **phases,
        verify_mismatches_total=2,
    )
    lines = shown(
        Picture("ipc:///run/instep", ScreenView(StreamQuery()), now, rates_between(before, now)), 80, 24, keys=False
    )
    text = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert text["instep"] == "top ipc:///run/instep up 3d 3h"
    assert text["server"] == "ready, 2.00G frames/s, 6.00M streams, 32,768 connections, loop 100%"
    assert text["models"] == "ears 1.00G/s wake-word-detector 1.00G/s"
    assert text["batches/s"] == "300 p50 0.120 0.250 0.0400 10,000"
    assert text["streams"] == "4.00M open of 4.00M, 999,999 of them parked; 1.00M hibernating"
    assert text["verified"] == "123G frames, 50% compared, 2 streams differ, 0.4 s behind"
    assert text["mic"] == "connected 50 1,234 3 0.2 s 1h 0m"
    assert text["old"] == "parked – – 0 1m 30s never"


def test_one_of_a_kind_is_singular() -> None:
    now = replace(
        snapshot(1.0, [], (), StreamQuery(), verify_mismatches_total=1), models=[ModelTotals("ears", 1, 1, 100)]
    )
    lines = shown(Picture("tcp://h:1", ScreenView(StreamQuery()), now), 80, 24, keys=False)
    text = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert text["server"] == "ready, – frames/s, 1 stream, 1 connection, loop 100%"
    assert ", 1 stream differs, " in text["verified"]


def test_where_nothing_was_answered_lately_there_are_dashes_and_no_zeros() -> None:
    idle = {f"recent_{phase}_us_{quantile}": 0.0 for phase in PHASES for quantile in ("p50", "p99")}
    idle |= {"recent_batch_size_mean": 0.0, "recent_commit_us_p99": 0.0}
    now = snapshot(1.0, [], (), StreamQuery(), **idle)
    lines = shown(Picture("tcp://h:1", ScreenView(StreamQuery()), now), 80, 24, keys=False)
    text = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert text["batches/s"] == "– p50 – – – –"
    assert text["batch"] == "size – 131,072 pending p99 – – – –"
    assert text["recording"].endswith("commits – ms (p99)")


def test_a_number_that_the_server_lacks_is_a_dash() -> None:
    whole = snapshot(1.0, [], verify_skipped_frames_total=0.0)

    def lines_without(*absent: str) -> list[str]:
        numbers = Numbers({name: value for name, value in whole.model.numbers.items() if name not in absent})
        now = replace(whole, model=replace(whole.model, numbers=numbers))
        lines = shown(Picture("tcp://h:1", ScreenView(StreamQuery()), now), 80, 24, keys=False)
        assert "nan" not in "".join(lines).lower()
        return lines

    before = lines_without()
    shown_as_totals = {"frames_total", "batches_total", "batch_size_mean", "connections"}  # or as rates
    for name in set(NUMBERS) - shown_as_totals:
        differing = [(old, new) for old, new in zip(before, lines_without(name), strict=True) if old != new]
        assert differing, name
        for old, new in differing:
            assert new.count("–") > old.count("–") or name.startswith("refused_") or new.endswith("off"), (name, new)
    assert lines_without(*NUMBERS)[0].endswith("up –")


@pytest.mark.parametrize("name", [*HOSTILE, *WIDE], ids=ascii)
def test_no_name_disturbs_the_terminal(name: str) -> None:
    view = ScreenView(StreamQuery(contains=name))
    view.typing = True
    now = snapshot(1.0, [stream(name), stream("next")], (name, "other"), StreamQuery(contains=name))
    picture = Picture(f"tcp://{name}:1", view, now, None, lost=f"no answer: {name}")
    for line in draw(picture, 80, 24):
        assert cell_len(line.plain) <= 80
        assert all(char.isprintable() for char in line.plain)
    rows = [line for line in shown(picture, 80, 24) if "hibernating " in line]
    assert {cell_len(row) for row in rows} == {80}
    assert {row[cell_columns(row, 22) :][:12] for row in rows} == {" hibernating"}


def cell_columns(text: str, columns: int) -> int:
    """How many characters take that many columns."""
    return next(count for count in range(len(text)) if cell_len(text[:count]) == columns)


def test_of_many_models_the_one_that_is_shown_is_among_those_in_sight() -> None:
    now = snapshot(1.0, [], [f"model-{number}" for number in range(50)] + ["wake-word-detector"])
    models = shown(Picture("tcp://h:1", ScreenView(StreamQuery()), now), 80, 24)[2]
    assert models.endswith("model-48 –/s  model-49 –/s  wake-word-detector –/s ")
    assert cell_len(models) <= 80


def test_a_lost_server_is_named_and_its_last_numbers_stay() -> None:
    now = snapshot(1.0, [stream("mic")])
    lines = shown(
        Picture("tcp://h:1", ScreenView(StreamQuery()), now, None, lost="no answer for 12 s: nobody there"), 80, 24
    )
    assert lines[1] == "no answer for 12 s: nobody there"
    assert any(line.startswith("mic ") for line in lines)
    assert shown(Picture("tcp://h:1", ScreenView(StreamQuery())), 80, 24)[0].startswith("instep top  tcp://h:1")


def test_rates_are_differences_and_none_where_a_counter_began_anew() -> None:
    before, now = snapshot(10.0, [], busy_total=5.0), snapshot(14.0, [], busy_total=25.0)
    rates = rates_between(before, now)
    assert rates is not None
    assert rates.numbers["busy_total"] == 5.0
    assert rates.frames == {"wake-word-detector": 1e9}
    assert rates_between(now, before) is None
    assert rates_between(now, snapshot(15.0, [], busy_total=24.0)) is None
    assert rates_between(None, now) is None


def test_streams_are_selected_and_sorted() -> None:
    streams = [
        stream("b", rate=1.0, seq=9, pending=0, idle_s=3.0, state="connected"),
        stream("a", rate=None, seq=None, pending=2, idle_s=2.0, state="hibernating"),
        stream("ab", rate=2.0, seq=7, pending=1, idle_s=1.0, state="parked"),
    ]

    def names(**query: object) -> str:
        return " ".join(each.name for each in select(streams, StreamQuery(**query))[0])  # type: ignore[arg-type]

    assert {sort: names(sort=sort) for sort in SORTS} == {
        "name": "a ab b",
        "rate": "ab b a",
        "seq": "b ab a",
        "pending": "a ab b",
        "idle": "b a ab",
    }
    assert names(sort="name", reverse=True) == "b ab a"
    assert names(sort="rate", reverse=True) == "a b ab"
    assert names(contains="a") == "ab a"
    assert names(state="parked") == "ab"
    assert (names(limit=1), select(streams, StreamQuery(limit=1))[1]) == ("ab", 3)


def test_numbers_in_few_columns() -> None:
    assert [short(n) for n in (0, 7, 49.5, 0.5, 999.7, 123_456, 999_999.6, 1.5e9, float("nan"))] == [
        "0", "7", "49.5", "0.500", "1,000", "123,456", "1.00M", "1.50G", "–",
    ]  # fmt: skip
    assert [scaled(n, " ") for n in (12, 1500, 2.5e12)] == ["12 ", "1.50 k", "2.50 T"]
    assert [period(s) for s in (0.04, 59.96, 252, 11_520, 270_000)] == ["0.0 s", "1m 0s", "4m 12s", "3h 12m", "3d 3h"]
    assert sparkline([0, 5, 10], 5) == "  ▁▅█"
    assert sparkline([1, 2, 3], 0) == sparkline([], 0) == ""
    assert fitted("load-123456-0-17", 10, middle=True) == "load-1…-17"
    assert fitted("日本語", 4) == "日… "
    assert plain("a\x1b[1mb") == "a\ufffd[1mb"
