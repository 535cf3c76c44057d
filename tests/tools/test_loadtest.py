from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from instep_tools import loadtest as loadtest_module
from instep_tools import report
from instep_tools.load import Mode
from instep_tools.load_plan import LoadPlan
from instep_tools.loadtest import LoadTest, loadtest
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.processes import run_parts
from instep_tools.report import Measured, Verdict
from instep_tools.saved_runs import compare_runs
from tests.support.fake_server import FakeServer, Message, error
from tests.tools.helpers import JumpingClock, RememberingTerminal, info_with

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

    async def __call__(
        self,
        plan: LoadPlan = PLAN,
        slo_ms: float | None = None,
        plot: Path | None = None,
        save: Path | None = None,
        all_closed: bool = True,
    ) -> Exit:
        with self.server as server:
            test = LoadTest(server.endpoint, plan, slo_ms, plot, save)
            ending = await loadtest(test, self.terminal, self.stop, self.clock)
            assert server.rules.names == {} or not all_closed, "streams are left open"
        return ending


async def test_an_open_loop_against_a_server(tmp_path: Path) -> None:
    run = Run()
    assert await run(plot=tmp_path / "p.png") == Exit.OK
    assert set(run.server.rules.blocks) == {(1, 2), (1, 1)}
    assert sum(streams for _, streams in run.server.rules.blocks) == 6 * 30
    assert "latency, from when it was due" in run.terminal.said
    queue = next(line for line in run.terminal.said.splitlines() if "server: queue" in line)
    assert queue.split()[2:] == ["0.007", "0.007", "0.007", "–", "0.007"]
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


async def test_a_load_generator_that_is_too_slow_says_so() -> None:
    run = Run()
    run.clock.tick_s = 0.05
    assert await run() == Exit.MEASURED_ITSELF
    last = run.terminal.said.splitlines()[-1]
    assert last.startswith("measured the load generator, not the server: it sent ")
    assert " not sent" in last


async def test_a_search_blames_the_load_generator_for_its_own_lateness(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    async def run_and_note(them: Any, endpoint: str, stop: Stop, clock: Any) -> Any:
        parts.append(len(them))
        return await run_parts(them[:1], endpoint, stop, clock)

    monkeypatch.setattr(loadtest_module, "run_parts", run_and_note)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run = Run()
    run.clock.tick_s = 0.05
    assert await run(slo_ms=50.0) == Exit.MEASURED_ITSELF
    assert parts == [1, 2], "once more with more processes"
    assert "with 6 streams the load generator could not keep up" in run.terminal.said.splitlines()[-1]
    assert run.terminal.said.count("invalid") == 2


async def test_a_search_ends_without_a_server_and_keeps_what_it_found() -> None:
    run = Run(as_json=True)

    def end(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        is_second = len(run.server.rules.blocks) > 6 * 30
        return [error(header[1], Code.UNKNOWN_STREAM)] if is_second and header[0] == Kind.STEP else None

    run.server.rules.fault = end
    assert await run(slo_ms=1e6, all_closed=False) == Exit.FOUND_PROBLEMS
    values = run.terminal.json()
    assert values["streams"] == 6
    assert "UNKNOWN_STREAM" in values["ended"]


async def test_results_are_saved_and_compared(tmp_path: Path) -> None:
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, streams in zip(files, (3, 6), strict=True):
        run = Run()
        assert await run(replace(PLAN, streams=streams), save=file) == Exit.OK
        assert run.terminal.said.strip().endswith(f"; saved in {file}")
    terminal = RememberingTerminal(as_json=True)
    assert compare_runs(*files, terminal) == Exit.OK
    assert terminal.json()["ratio"]["streams"] == 2
    assert terminal.json()["first"]["frames/s"] == pytest.approx(60)
    terminal = RememberingTerminal()
    assert compare_runs(*files, terminal) == Exit.OK
    assert "latency p99, ms" in terminal.said
    found_nothing = ('{"best": null}', "found no load within its level")
    for content, problem in (("{}", "holds no result of a load test"), (None, "cannot be read"), found_nothing):
        bad = tmp_path / "bad.json"
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_text(content)
        assert compare_runs(files[0], bad, terminal) == Exit.COULD_NOT_RUN
        assert problem in terminal.complained


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

    def verdict(result: Measured, slo_ms: float) -> Verdict:
        return "met" if result.plan.streams <= capacity else "not met"

    async def run_and_note(parts: Any, endpoint: str, stop: Stop, clock: Any) -> Any:
        plans.append(parts)
        if stop_at is not None and len(plans) == stop_at:
            stop.request()
        return await run_parts(parts, endpoint, stop, clock)

    monkeypatch.setattr(report, "verdict", verdict)
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
    expected = "no number of streams was found that is served in real time at 20 Hz within p99 of 0.5 ms"
    assert run.terminal.said.splitlines()[-1] == expected


@pytest.mark.parametrize("stop_at", [1, 3])
async def test_a_search_that_is_stopped(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    plans = judged_by(monkeypatch, capacity=1000, stop_at=stop_at)
    run = Run()
    await run(slo_ms=50.0)
    assert len(plans) == stop_at
    assert run.terminal.said.splitlines()[-1].endswith("; the search was stopped before its end")


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ({"plot": Path("p.gif")}, "a plot is a PNG, an SVG or a PDF: call it p.png"),
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
