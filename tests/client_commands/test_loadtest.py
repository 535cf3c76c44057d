from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instep_client.commands import loadtest as loadtest_module
from instep_client.commands import report
from instep_client.commands.load import Mode
from instep_client.commands.load_plan import LoadPlan
from instep_client.commands.loadtest import LoadTest, loadtest
from instep_client.commands.pacing import Stop
from instep_client.commands.problems import CommandProblem, Exit
from instep_client.commands.processes import run_parts
from instep_client.commands.report import Measured
from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from tests.client_commands.helpers import JumpingClock, RememberingTerminal, info_with
from tests.support.fake_server import FakeServer, Message, error

PLAN = LoadPlan(
    streams=6,
    connections=2,
    processes=1,
    mode=Mode.OPEN,
    rate_hz=20.0,
    duration_s=1.0,
    warmup_s=0.5,
    block=2,
    steps=1,
)


class Run:
    """One run of the command against a fake server."""

    def __init__(self, as_json: bool = False, max_streams: int = 1000) -> None:
        self.terminal = RememberingTerminal(as_json)
        self.stop = Stop()
        self.clock = JumpingClock()
        self.server = FakeServer(info_with(max_streams=max_streams))

    async def __call__(self, plan: LoadPlan = PLAN, slo_ms: float | None = None, plot: Path | None = None) -> Exit:
        with self.server as server:
            test = LoadTest(server.endpoint, plan, slo_ms, plot)
            ending = await loadtest(test, self.terminal, self.stop, self.clock)
            assert server.rules.names == {}, "streams are left open"
        return ending


async def test_an_open_loop_against_a_server(tmp_path: Path) -> None:
    run = Run()
    assert await run(plot=tmp_path / "p.png") == Exit.OK
    assert set(run.server.rules.blocks) == {(1, 2), (1, 1)}
    assert sum(streams for _, streams in run.server.rules.blocks) == 6 * 30
    assert "latency, from when it was due" in run.terminal.said
    queue = next(line for line in run.terminal.said.splitlines() if "server: queue" in line)
    assert queue.split()[2:] == ["0.007"] * 5
    assert " frames/s of 120 due, " in run.terminal.said.splitlines()[-1]
    assert run.terminal.said.strip().endswith(f"; drawn in {tmp_path / 'p.png'}")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "open loop at 20 Hz a stream" in run.terminal.complained


async def test_a_closed_loop_against_a_server() -> None:
    run = Run(as_json=True)
    run.clock.tick_s = 0.01
    assert await run(replace(PLAN, mode=Mode.CLOSED, steps=4)) == Exit.OK
    values = run.terminal.json()
    assert values["load"]["mode"] == "closed"
    assert values["frames_per_second"] > 0
    assert values["latency_us"]["queue"]["p50"] == 7
    assert values["server"]["model"] == "halving"
    assert set(run.server.rules.blocks) == {(4, 2), (4, 1)}


async def test_refusals_are_told_and_are_no_success() -> None:
    run = Run()

    def refuse(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        return [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None

    run.server.rules.fault = refuse
    assert await run() == Exit.FOUND_PROBLEMS
    assert run.terminal.said.startswith("0 frames/s: nothing was answered, ")
    assert "refused (TOO_LARGE)" in run.terminal.said


async def test_a_stop_in_the_warm_up() -> None:
    run = Run()
    run.clock.on_sleep = lambda moment: run.stop.request()
    await run()
    assert run.terminal.said.startswith("0 frames/s: nothing was answered; stopped")


def judged_by(monkeypatch: pytest.MonkeyPatch, capacity: int, stop_at: int | None = None) -> list[LoadPlan]:
    """Let real runs be judged by their number of streams; the plans that were run."""
    plans: list[LoadPlan] = []

    def meets(result: Measured, slo_ms: float) -> bool:
        return result.plan.streams <= capacity

    async def run_and_note(parts: Any, endpoint: str, stop: Stop, clock: Any) -> Any:
        plans.append(parts)
        if stop_at is not None and len(plans) == stop_at:
            stop.request()
        return await run_parts(parts, endpoint, stop, clock)

    monkeypatch.setattr(report, "meets", meets)
    monkeypatch.setattr(loadtest_module, "run_parts", run_and_note)
    return plans


async def test_the_search_ends_with_the_largest_load(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, capacity=11)
    run = Run()
    assert await run(replace(PLAN, streams=1, connections=4), slo_ms=50.0) == Exit.OK
    last = run.terminal.said.splitlines()[-1]
    assert last.startswith("11 streams in real time at 20 Hz within p99 of 50 ms (p99 ")
    assert [line.split()[0] for line in run.terminal.complained.splitlines() if "met" in line] == (
        ["1", "2", "4", "8", "16", "16", "12", "12", "10", "11"]
    )
    assert run.terminal.said.count("not met") == 4


async def test_the_search_ends_at_the_servers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, capacity=1000)
    run = Run(as_json=True, max_streams=20)
    assert await run(slo_ms=50.0) == Exit.OK
    values = run.terminal.json()
    assert (values["streams"], values["limited_by_server"], values["slo_ms"]) == (20, True, 50)
    assert values["best"]["load"]["streams"] == 20
    assert [trial["load"]["streams"] for trial in values["trials"]] == [6, 12, 20]
    assert "all the server has room for" in run.terminal.complained


async def test_the_search_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, capacity=0)
    run = Run()
    assert await run(replace(PLAN, streams=2), slo_ms=0.5) == Exit.FOUND_PROBLEMS
    assert run.terminal.said.splitlines()[-1] == "no stream was served in real time at 20 Hz within p99 of 0.5 ms"


@pytest.mark.parametrize(("stop_at", "said"), [(1, "before it was stopped"), (3, "stopped before its end")])
async def test_a_search_that_is_stopped(monkeypatch: pytest.MonkeyPatch, stop_at: int, said: str) -> None:
    plans = judged_by(monkeypatch, capacity=1000, stop_at=stop_at)
    run = Run()
    await run(slo_ms=50.0)
    assert len(plans) == stop_at
    assert said in run.terminal.said.splitlines()[-1]


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ({"plot": Path("p.svg")}, "the plot is a PNG: call it p.png"),
        ({"plot": Path("absent/p.png")}, "absent/p.png cannot be written"),
        ({"plan": replace(PLAN, streams=2000)}, "keeps 1000 streams at most"),
        ({"plan": replace(PLAN, streams=2000), "slo_ms": 1.0}, "begin the search with fewer"),
    ],
)
async def test_what_cannot_be_is_told(what: dict[str, Any], problem: str) -> None:
    run = Run()
    with pytest.raises(CommandProblem, match=problem):
        await run(**what)
    assert Kind.STEP not in run.server.rules.kinds


async def test_a_plot_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandProblem, match=r"'matplotlib', which is not installed: pip install .instep\[cli\]"):
        await Run()(plot=Path("p.png"))
