"""`instep-client loadtest`: how much a server does, and how fast."""

from __future__ import annotations

import importlib.util
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from instep_client.commands import report
from instep_client.commands.connect import connected
from instep_client.commands.load import Mode
from instep_client.commands.load_plan import LoadPlan, split
from instep_client.commands.pacing import Clock, Stop
from instep_client.commands.problems import BadFile, CommandProblem, Exit
from instep_client.commands.processes import run_parts
from instep_client.commands.report import Measured
from instep_client.commands.slo import largest_within
from instep_client.commands.terminal import Terminal
from instep_client.commands.words import counted
from instep_client.protocol.wire import ServerInfo


class SearchStopped(Exception):
    """Ctrl-C in a search."""


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What to do."""

    endpoint: str
    plan: LoadPlan
    slo_ms: float | None = None
    """Search for the largest number of streams within it; `plan.streams` is the first one tried."""
    plot: Path | None = None


async def loadtest(test: LoadTest, terminal: Terminal, stop: Stop, clock: Clock | None = None) -> Exit:
    """Run it and report.

    Raises:
        InstepError: as the client does.
        CommandProblem: when the load does not fit the server, or the plot cannot be written.
    """
    if test.plot is not None:
        _check_plot(test.plot)
    async with connected(test.endpoint, "loadtest", terminal, stop) as client:
        info = client.info
    terminal.note(report.setting(info))
    if test.slo_ms is None:
        return await _measure_once(test, info, terminal, stop, clock)
    return await _search(test, test.slo_ms, info, terminal, stop, clock)


async def _measure_once(test: LoadTest, info: ServerInfo, terminal: Terminal, stop: Stop, clock: Clock | None) -> Exit:
    result = await _measure(test, test.plan, info, terminal, stop, clock)
    saved = _plot(test, result, info)
    if terminal.as_json:
        terminal.result({"server": _server(info), **report.as_json(result)})
    elif len(result.samples):
        terminal.out.print(report.table(result))
    numbers = "0 frames/s: nothing was answered"
    if len(result.samples):
        p50_ms = result.latencies["latency_us"].p50 / 1000
        due = f" of {test.plan.offered_frames_s:,.0f} due" if test.plan.mode is Mode.OPEN else ""
        numbers = f"{result.frames_s:,.0f} frames/s{due}, {result.answers_s:,.0f} answers/s, "
        numbers += f"p50 {p50_ms:.3f} ms, p99 {result.p99_ms:.3f} ms"
    terminal.summary(f"{numbers}{_problems(result)}{_interrupted(stop, result)}{saved}", good=result.whole)
    return Exit.OK if result.whole else Exit.FOUND_PROBLEMS


async def _search(
    test: LoadTest, slo_ms: float, info: ServerInfo, terminal: Terminal, stop: Stop, clock: Clock | None
) -> Exit:
    trials: list[Measured] = []

    async def measure(streams: int) -> bool:
        connections = min(test.plan.connections, streams)
        plan = replace(
            test.plan, streams=streams, connections=connections, processes=min(test.plan.processes, connections)
        )
        trial = await _measure(test, plan, info, terminal, stop, clock)
        if stop.requested:
            raise SearchStopped
        trials.append(trial)
        met = report.meets(trial, slo_ms)
        terminal.note(
            f"{counted(streams, 'stream')}: p99 {trial.p99_ms:.2f} ms{_problems(trial)}, {'met' if met else 'not met'}"
        )
        return met

    if test.plan.streams > info.max_streams:
        raise CommandProblem(f"the server keeps {info.max_streams} streams at most; begin the search with fewer")
    stopped = limited = False
    try:
        limited = (await largest_within(measure, test.plan.streams, info.max_streams)).limited
    except SearchStopped:
        stopped = True
    return _report_search(test, slo_ms, info, terminal, Searched(trials, limited, stopped))


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search went through."""

    trials: list[Measured]
    limited: bool
    """It ended at the most that the server has room for."""
    stopped: bool
    """It did not come to its end."""


def _report_search(test: LoadTest, slo_ms: float, info: ServerInfo, terminal: Terminal, search: Searched) -> Exit:
    met = [trial for trial in search.trials if report.meets(trial, slo_ms)]
    best = max(met, key=lambda trial: trial.plan.streams, default=None)
    saved = "" if best is None else _plot(test, best, info)
    if terminal.as_json:
        terminal.result(
            {
                "server": _server(info),
                "slo_ms": slo_ms,
                "streams": 0 if best is None else best.plan.streams,
                "limited_by_server": search.limited,
                "stopped": search.stopped,
                "best": None if best is None else report.as_json(best),
                "trials": [report.as_json(trial) for trial in search.trials],
            }
        )
    else:
        terminal.out.print(report.trials_table(search.trials, slo_ms))
        if best is not None:
            terminal.out.print(report.table(best))
    level = f"in real time at {test.plan.rate_hz:g} Hz within p99 of {slo_ms:g} ms"
    if best is None:
        terminal.summary(
            f"no stream was served {level}{' before it was stopped' if search.stopped else ''}", good=False
        )
        return Exit.FOUND_PROBLEMS
    end = ""
    if search.limited:
        end = "; that is all the server has room for"
    elif search.stopped:
        end = "; the search was stopped before its end"
    found = f"{counted(best.plan.streams, 'stream')} {level} (p99 {best.p99_ms:.2f} ms)"
    terminal.summary(f"{found}{end}{saved}", good=not search.stopped)
    return Exit.OK


async def _measure(
    test: LoadTest, plan: LoadPlan, info: ServerInfo, terminal: Terminal, stop: Stop, clock: Clock | None
) -> Measured:
    terminal.note(plan.sentence())
    parts = split(plan, info, f"load-{secrets.token_hex(3)}")
    started = time.monotonic()
    seconds = plan.warmup_s + plan.duration_s
    async with terminal.progress("measuring", seconds, "s", lambda: min(seconds, time.monotonic() - started)):
        return report.measured(plan, await run_parts(parts, test.endpoint, stop, clock))


def _plot(test: LoadTest, result: Measured, info: ServerInfo) -> str:
    """Draw it where asked to; where it is, as the end of a sentence."""
    if test.plot is None or not len(result.samples):
        return ""
    from instep_client.commands.plot import plot

    plot(result, test.plot, f"{result.plan.sentence()}\n{report.setting(info)}")
    return f"; drawn in {test.plot}"


def _check_plot(path: Path) -> None:
    """Find out before the work, not after it, whether it can be drawn there."""
    if path.suffix.lower() != ".png":
        raise CommandProblem(f"the plot is a PNG: call it {path.with_suffix('.png')}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandProblem(
            "a plot needs the package 'matplotlib', which is not installed: "
            'pip install "instep[cli]", or pip install -e ".[cli]" in a checkout'
        )
    try:
        path.open("ab").close()
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None


def _problems(result: Measured) -> str:
    parts = [f"{counted(frames, 'frame')} refused ({code})" for code, frames in result.refused.items()]
    if result.unanswered:
        parts.append(f"{counted(result.unanswered, 'frame')} unanswered")
    return "".join(f", {part}" for part in parts)


def _interrupted(stop: Stop, result: Measured) -> str:
    return f"; stopped after {result.seconds:.1f} s, all streams closed" if stop.requested else ""


def _server(info: ServerInfo) -> dict[str, Any]:
    return {
        "model": info.model,
        "fingerprint": info.fingerprint,
        "features": info.features,
        "outputs": info.outputs,
        "device": info.device,
        "exactness": info.exactness,
    }
