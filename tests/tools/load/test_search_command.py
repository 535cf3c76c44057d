"""`instep-client loadtest --slo-ms` as a user sees it: which loads it tries, and how it ends."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from instep_tools import terminal as terminal_module
from instep_tools.connect import Target
from instep_tools.load import generator
from instep_tools.load.command import LoadTest, LoadTester
from instep_tools.load.result import Measured, Verdict
from instep_tools.problems import Exit
from instep_tools.running import run_command
from tests.support.fake_server import FakeServer, Message, error
from tests.tools.helpers import RememberingTerminal, info_with
from tests.tools.loads import PLAN, SHORT, Timed, fits, run


def judged(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """Let real runs be judged by their number of streams."""

    def verdict(result: Measured, slo_ms: float) -> Verdict:
        return "met" if result.plan.streams <= capacity else "not met"

    monkeypatch.setattr(Measured, "verdict", verdict)


async def test_a_search_ends_with_the_largest_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judged(monkeypatch, capacity=11)
    monkeypatch.chdir(tmp_path)  # a long name of the file would not fit
    run = Timed()
    plan = replace(PLAN, streams=1, connections=4, slo_ms=1e6)
    assert await run(plan, plot=Path("s.pdf")) == Exit.OK
    assert run.last.startswith("11 streams in real time at 20 Hz within p99 of 1e+06 ms (p99 ")
    tried = re.findall(r"^([\d,]+) .*met: p99 [\d.]+ ms, sent [\d.]+ ms late", run.terminal.complained, re.MULTILINE)
    assert tried == ["1", "2", "4", "8", "16", "16", "12", "12", "10", "11"]
    assert run.terminal.said.count("not met") == 4
    assert fits(run.terminal.said.removesuffix(run.last + "\n")), "only sentences are wrapped, and only on a terminal"
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF")


async def test_a_search_ends_at_the_servers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, capacity=1000)
    run = Timed(as_json=True, max_streams=20)
    assert await run(replace(PLAN, slo_ms=1e6)) == Exit.OK
    values = run.terminal.json()
    assert (values["streams"], values["limited_by_server"], values["slo_ms"]) == (20, True, 1e6)
    assert values["best"]["load"]["streams"] == 20
    assert [(trial["load"]["streams"], trial["verdict"]) for trial in values["trials"]] == [
        (6, "met"),
        (12, "met"),
        (20, "met"),
    ]
    assert "all the server has room for" in run.last


def test_a_search_says_how_long_it_may_take_and_which_try_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, capacity=1000)
    for name in ("QUIET_S", "LOG_S"):
        monkeypatch.setattr(terminal_module, name, 0.05)
    with FakeServer(info_with(max_streams=16)) as server:
        result = run(*SHORT, "--slo-ms", "50", "--rate", "50", "--endpoint", server.endpoint)
    said = " ".join(result.stderr.split())
    assert (
        "searching: 3 to 12 tries of 0.2 s each, about 62 s at the most; a size that is not met is tried once more"
        in said
    )
    for number in (1, 2, 3):
        assert re.search(rf"^try {number} \d/0 s · ", result.stderr, re.MULTILINE)
    assert "try 4" not in said


async def test_a_search_that_is_stopped_in_its_first_try_shows_no_table(tmp_path: Path) -> None:
    run, page = Timed(), tmp_path / "load.html"
    run.clock.on_sleep = lambda moment: run.stop.request()
    assert await run(replace(PLAN, slo_ms=1e6), report=page) == Exit.FOUND_PROBLEMS
    assert run.last == f"nothing was measured; the search was stopped before its end; {page} not written"
    assert "frames/s due" not in run.terminal.said
    assert not page.exists()


async def test_a_search_that_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, capacity=0)
    run = Timed()
    assert await run(replace(PLAN, streams=2, slo_ms=1e6)) == Exit.FOUND_PROBLEMS
    assert run.last == "not even 1 stream stayed within 1e+06 ms at p99 (20 Hz)"


async def test_a_search_blames_the_load_generator_for_its_own_lateness() -> None:
    run = Timed()
    run.clock.tick_s = 0.05
    assert await run(replace(PLAN, streams=1, connections=1, slo_ms=50.0)) == Exit.MEASURED_ITSELF
    assert run.last.startswith(
        "the load generator was too slow to find out what the server can do; with 1 stream the load generator "
    )
    assert "could not keep up; this machine is busy: run it" in run.last
    assert "--processes" not in run.last
    assert run.terminal.said.count("invalid") == 2


async def test_a_search_that_begins_with_too_much_to_send_goes_on_with_what_could_be_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    run = Timed(as_json=True)
    run.clock.tick_s = 0.0005
    plan = replace(PLAN, streams=200, block=1, slo_ms=200.0, warmup_s=0.0, duration_s=0.5)
    await run(plan)
    sizes = [trial["load"]["streams"] for trial in run.terminal.json()["trials"]]
    assert sizes[:2] == [200, 200]
    assert 10 < sizes[2] < 100, "halving would have tried 100 next"


async def test_only_sizes_that_the_server_missed_are_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr(
        Measured, "verdict", lambda result, slo_ms: "not met" if result.plan.streams == 8 else "invalid"
    )
    run = Timed()
    await run(replace(PLAN, streams=8, slo_ms=1e6))
    assert run.last.startswith("not even 8 streams stayed within 1e+06 ms at p99 (20 Hz)")


async def test_a_search_ends_where_the_machine_is_busy_whatever_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    run = Timed(as_json=True)

    def oversleep(moment: float) -> None:
        run.clock.time += 0.015

    run.clock.on_sleep = oversleep
    monkeypatch.setattr(generator, "STALL_S", math.inf)  # those of the machine, in real time
    monkeypatch.setattr(Measured, "verdict", lambda result, slo_ms: "invalid")
    plan = replace(PLAN, streams=16, rate_hz=100.0, block=1, slo_ms=1e6, warmup_s=0.0, duration_s=0.5)
    assert await run(plan) == Exit.MEASURED_ITSELF
    assert [trial["load"]["streams"] for trial in run.terminal.json()["trials"]] == [16, 16, 8, 8]
    assert run.last.startswith(
        "the load generator was too slow to find out what the server can do; with 8 streams the load generator was as "
        "late as with more; this machine is busy: run it while the machine is idle"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_keeps_what_it_found_when_one_signal_comes_twice(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `timeout` sends it: to its child, and to the whole process group."""
    judged(monkeypatch, capacity=1000)
    sent: list[int] = []

    def end_the_second_try(header: list[Any], frames: list[bytes]) -> None:
        if header[0] == Kind.STEP and not sent and len(server.rules.blocks) > 10:
            for _ in range(2):
                sent.append(number)
                os.kill(os.getpid(), number)
                time.sleep(0.02)  # or Python takes the two for one

    before = signal.signal(signal.SIGTERM, lambda *_: sent.append(0))  # a test that fails is not to end all others
    try:
        with FakeServer() as server:
            server.rules.fault = end_the_second_try
            plan = replace(
                PLAN, streams=4, connections=1, rate_hz=50, duration_s=0.2, warmup_s=0, block=None, slo_ms=1e6
            )
            test = LoadTest(Target(server.endpoint), plan, save=tmp_path / "found.json")
            terminal = RememberingTerminal()
            status = run_command(lambda terminal, stop: LoadTester(test, terminal, stop).run(), terminal, 1e9)
            assert server.rules.names == {}
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent == [number, number]
    assert status == 128 + number
    assert "at least 4 streams in real time at 50 Hz" in terminal.said
    assert json.loads((tmp_path / "found.json").read_text())["streams"] == 4


async def test_a_search_ends_without_a_server_and_keeps_what_it_found() -> None:
    run = Timed(as_json=True)

    def end(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        is_second = len(run.server.rules.blocks) > 6 * 30
        return [error(header[1], Code.UNKNOWN_STREAM)] if is_second and header[0] == Kind.STEP else None

    run.server.rules.fault = end
    assert await run(replace(PLAN, slo_ms=1e6), all_closed=False) == Exit.FOUND_PROBLEMS
    values = run.terminal.json()
    assert values["streams"] == 6
    assert "UNKNOWN_STREAM" in values["ended"]
