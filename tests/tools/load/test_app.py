"""`instep loadtest` as a user sees it: what it prints, its page, its exit status."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from instep_tools.connect import Target
from instep_tools.load.app import LoadTest
from instep_tools.load.result import LoadResult
from instep_tools.problems import Exit
from instep_tools.running import run_command
from instep_tools.words import three_digits
from tests.support.fake_server import FakeServer, Message, error
from tests.support.pages import read_page
from tests.support.small_files import files_of_at_most
from tests.tools.helpers import RememberingTerminal
from tests.tools.loads import PLAN, SHORT, Timed, run


def refuse_steps(header: list[Any], frames: list[bytes]) -> list[Message] | None:
    return [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None


async def test_an_open_loop() -> None:
    run = Timed(as_json=True)
    assert await run() == Exit.OK
    assert set(run.server.rules.blocks) == {(1, 2), (1, 1)}
    assert sum(streams for _, streams in run.server.rules.blocks) == 6 * 30
    values = run.terminal.json()
    assert (values["samples"], values["frames_per_second"], values["unanswered_frames"]) == (80, 120, 0)
    assert values["latency_us"]["queue"] == {"p50": 7, "p90": 7, "p99": 7, "p99.9": None, "max": 7}


async def test_the_page_says_what_the_json_says(tmp_path: Path) -> None:
    file = tmp_path / "load.html"
    once = Timed(as_json=True, model="<b>halving")
    assert await once(report=file) == Exit.OK
    values, page = once.terminal.json(), read_page(file)
    assert page.verdict == "Every frame was answered"
    rows = page.table(f"milliseconds, n = {values['samples']:,}")
    for row, name in zip(rows, ("latency", "late", "queue", "compute", "send", "rest", "own"), strict=True):
        found = values["latency_us"][name]
        for level in ("p50", "p99", "max"):
            assert row[level] == three_digits(found[level] / 1000)
    assert page.facts["model"] == "<b>halving"
    assert f"{values['frames_per_second']:,.0f} frames/s of 120 due" in page.text["p"][2]
    assert page.tags["svg"] == 1


async def test_the_page_of_a_search_shows_every_try_and_the_load_of_the_best(tmp_path: Path) -> None:
    file, search = tmp_path / "load.html", Timed(as_json=True, max_streams=25)
    assert await search(replace(PLAN, slo_ms=1e6), report=file) == Exit.OK
    values, page = search.terminal.json(), read_page(file)
    assert (values["streams"], values["limited_by_server"], values["best"]["load"]["streams"]) == (25, True, 25)
    assert page.verdict == "25 streams within 1e+06 ms"
    assert page.facts["load"].startswith("25 streams on ")
    for row, trial in zip(page.table("streams", "processes"), values["trials"], strict=True):
        assert row["streams"] == f"{trial['load']['streams']:,}"
        assert row["p99 within 1e+06 ms"] == trial["verdict"] == "met"
        assert row["less own share"] == three_digits(trial["p99_less_own_ms"])


def test_loads_are_described_as_they_were_asked_for() -> None:
    asked = ("--rate", "50", "--processes", "2")
    with FakeServer() as server:
        result = run(*SHORT, *asked, "--json", "-e", server.endpoint)
        assert server.rules.names == {}
    load = json.loads(result.stdout)["load"]
    assert (load["rate_hz"], load["processes"], load["connections"]) == (50, 2, 2)
    assert load["duration_s"] == 0.2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--report", "absent/p.html"], "absent/p.html"),
        (["--streams", "1", "--processes", "2"], "2 processes"),
        (["--streams", "200000"], "100000"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_sent(arguments: list[str], named: str) -> None:
    with FakeServer() as server:
        result = run(*arguments, "--endpoint", server.endpoint)
        assert Kind.STEP not in server.rules.kinds
    assert result.exit_code == 2
    assert named in " ".join(result.stderr.replace("│", " ").split())


async def test_a_load_generator_that_is_too_slow_says_so() -> None:
    for plan in (PLAN, replace(PLAN, streams=1, connections=1, slo_ms=50.0)):
        run = Timed(as_json=True)
        run.clock.tick_s = 0.05
        assert await run(plan) == Exit.MEASURED_ITSELF


async def test_refusals_are_told_and_are_no_success(tmp_path: Path) -> None:
    run = Timed(as_json=True)
    run.server.rules.fault = refuse_steps
    assert await run(report=tmp_path / "a.html") == Exit.FOUND_PROBLEMS
    assert run.terminal.json()["refused_frames"]["TOO_LARGE"] > 0
    assert "(TOO_LARGE)" in read_page(tmp_path / "a.html").text["p"][2]


@pytest.mark.parametrize("slo_ms", [None, 1e6])
async def test_a_stop_in_the_warm_up_leaves_the_page_of_another_run(tmp_path: Path, slo_ms: float | None) -> None:
    run, page = Timed(), tmp_path / "base.html"
    page.write_text("before")
    run.clock.on_sleep = lambda moment: run.stop.request()
    assert await run(replace(PLAN, slo_ms=slo_ms), report=page) == Exit.FOUND_PROBLEMS
    assert page.read_text() == "before"


def test_a_page_that_cannot_be_written_costs_the_page_and_not_the_result(tmp_path: Path) -> None:
    with FakeServer() as server, files_of_at_most(1000):
        result = run(*SHORT, "--report", tmp_path / "p.html", "--json", "--endpoint", server.endpoint)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["samples"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_keeps_what_it_found_when_one_signal_comes_twice(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `timeout` sends it: to its child, and to the whole process group."""
    monkeypatch.setattr(LoadResult, "verdict", lambda result, slo_ms: "met")
    sent: list[int] = []

    def end_the_second_try(header: list[Any], frames: list[bytes]) -> None:
        frames_so_far = sum(streams for _, streams in server.rules.blocks)
        if header[0] == Kind.STEP and not sent and frames_so_far > 60:  # the first try sends 44, the second 88
            for _ in range(2):
                sent.append(number)
                os.kill(os.getpid(), number)
                time.sleep(0.02)  # or Python takes the two for one

    before = signal.signal(signal.SIGTERM, lambda *_: sent.append(0))  # a test that fails is not to end all others
    terminal = RememberingTerminal(as_json=True)
    plan = replace(PLAN, streams=4, connections=1, rate_hz=50, duration_s=0.2, warmup_s=0, block=None, slo_ms=1e6)
    try:
        with FakeServer() as server:
            server.rules.fault = end_the_second_try
            target = Target(server.endpoint)
            status = run_command(lambda *given: LoadTest(target, plan, None, *given).run(), terminal, same_signal_s=1e9)
            assert server.rules.names == {}
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (sent, status, terminal.json()["streams"]) == ([number, number], 128 + number, 4)
