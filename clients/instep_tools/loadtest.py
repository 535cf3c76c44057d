"""`instep-client loadtest`: how much a server does, and how fast."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import ServerInfo
from instep_tools import report
from instep_tools.connect import connected
from instep_tools.load import Mode
from instep_tools.load_plan import LoadPlan, split
from instep_tools.pacing import Clock, Stop
from instep_tools.problems import BadFile, CommandProblem, Exit
from instep_tools.processes import run_parts
from instep_tools.report import Measured, Verdict, three_digits
from instep_tools.slo import largest_within
from instep_tools.terminal import Terminal
from instep_tools.words import counted

ADVICE: Final = "use more --processes, a larger --block, or a lower --rate"
LONG_GAP_S: Final = 1.0
PLOT_SUFFIXES: Final = (".png", ".svg", ".pdf")


class SearchEnded(Exception):
    """A search ends before its end: on Ctrl-C, without the server, or because this side cannot keep up."""


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What to do."""

    endpoint: str
    plan: LoadPlan
    slo_ms: float | None = None
    """Search for the largest number of streams within it; `plan.streams` is the first one tried."""
    plot: Path | None = None
    save: Path | None = None
    """Where the JSON of the result goes as well."""


async def loadtest(test: LoadTest, terminal: Terminal, stop: Stop, clock: Clock | None = None) -> Exit:
    """Run it and report.

    Raises:
        InstepError: as the client does.
        CommandProblem: when the load does not fit the server, or the plot cannot be written.
    """
    if test.plot is not None:
        _check_plot(test.plot)
    if test.save is not None:
        _check_writable(test.save)
    async with connected(test.endpoint, "loadtest", terminal, stop) as client:
        info = client.info
    terminal.note(report.setting(info))
    if test.slo_ms is None:
        return await _measure_once(test, info, terminal, stop, clock)
    return await _search(test, test.slo_ms, info, terminal, stop, clock)


async def _measure_once(test: LoadTest, info: ServerInfo, terminal: Terminal, stop: Stop, clock: Clock | None) -> Exit:
    result = await _measure(test, test.plan, info, terminal, stop, clock)
    saved = _save(test, {"server": _server(info), **report.as_json(result)}, terminal) + _plot(test, result, info)
    if not terminal.as_json and len(result.samples):
        terminal.out.print(report.table(result))
    numbers = "0 frames/s: nothing was answered"
    if len(result.samples):
        p50_ms = three_digits(result.latencies["latency_us"].p50 / 1000)
        due = f" of {test.plan.offered_frames_s:,.0f} due" if test.plan.mode is Mode.OPEN else ""
        numbers = f"{result.frames_s:,.0f} frames/s{due}, {result.answers_s:,.0f} answers/s, "
        numbers += f"p50 {p50_ms} ms, p99 {three_digits(result.p99_ms)} ms"
    good = result.whole and not result.measured_itself
    blame = f"{_measured_itself(result)}: " if result.measured_itself else ""
    terminal.summary(f"{blame}{numbers}{_problems(result)}{_interrupted(stop, result)}{saved}", good=good)
    if result.measured_itself:
        return Exit.MEASURED_ITSELF
    return Exit.OK if good else Exit.FOUND_PROBLEMS


async def _search(
    test: LoadTest, slo_ms: float, info: ServerInfo, terminal: Terminal, stop: Stop, clock: Clock | None
) -> Exit:
    trials: list[Measured] = []
    processes = test.plan.processes

    async def attempt(streams: int) -> Verdict:
        here = min(processes, streams)
        connections = min(max(test.plan.connections, here), streams)
        plan = replace(test.plan, streams=streams, connections=connections, processes=here, slo_ms=slo_ms)
        try:
            trial = await _measure(test, plan, info, terminal, stop, clock)
        except (InstepError, CommandProblem) as error:  # the latter of other processes
            if not trials:
                raise
            raise SearchEnded(f"the search ended there: {error}") from None
        if stop.requested:
            raise SearchEnded("the search was stopped before its end")
        trials.append(trial)
        if trial.lost:
            raise SearchEnded(f"the search ended there: {trial.lost}")
        found = report.verdict(trial, slo_ms)
        terminal.note(
            f"{counted(streams, 'stream')}: p99 {three_digits(trial.p99_ms)} ms{_problems(trial)}, {found}"
            + (f": {_measured_itself(trial)}" if found == "invalid" else "")
        )
        return found

    async def measure(streams: int) -> bool:
        nonlocal processes
        found = await attempt(streams)
        if found == "invalid" and processes < min(os.cpu_count() or 1, streams):
            processes = min(2 * processes, os.cpu_count() or 1)
            found = await attempt(streams)
        if found == "invalid":
            raise SearchEnded(f"with {counted(streams, 'stream')} the load generator could not keep up; {ADVICE}")
        return found == "met"

    if test.plan.streams > info.max_streams:
        raise CommandProblem(f"the server keeps {info.max_streams} streams at most; begin the search with fewer")
    ended, limited = "", False
    try:
        limited = (await largest_within(measure, test.plan.streams, info.max_streams)).limited
    except SearchEnded as end:
        ended = str(end)
    return _report_search(test, slo_ms, info, terminal, Searched(trials, limited, ended))


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search went through."""

    trials: list[Measured]
    limited: bool
    """It ended at the most that the server has room for."""
    ended: str
    """Why it did not come to its end."""


def _report_search(test: LoadTest, slo_ms: float, info: ServerInfo, terminal: Terminal, search: Searched) -> Exit:
    met = [trial for trial in search.trials if report.verdict(trial, slo_ms) == "met"]
    best = max(met, key=lambda trial: trial.plan.streams, default=None)
    saved = _save(
        test,
        {
            "server": _server(info),
            "slo_ms": slo_ms,
            "streams": 0 if best is None else best.plan.streams,
            "limited_by_server": search.limited,
            "ended": search.ended or None,
            "best": None if best is None else report.as_json(best),
            "trials": [report.as_json(trial) for trial in search.trials],
        },
        terminal,
    )
    saved += "" if best is None else _plot(test, best, info)
    invalid = bool(search.trials) and report.verdict(search.trials[-1], slo_ms) == "invalid"
    if not terminal.as_json:
        terminal.out.print(report.trials_table(search.trials, slo_ms))
        if best is not None:
            terminal.out.print(report.table(best))
    level = f"in real time at {test.plan.rate_hz:g} Hz within p99 of {slo_ms:g} ms"
    end = f"; {search.ended}" if search.ended else "; that is all the server has room for" if search.limited else ""
    found = f"no number of streams was found that is served {level}"
    if best is not None:
        least = "at least " if search.ended else ""
        found = f"{least}{counted(best.plan.streams, 'stream')} {level} (p99 {three_digits(best.p99_ms)} ms)"
    terminal.summary(f"{found}{end}{saved}", good=best is not None and not search.ended)
    if invalid:
        return Exit.MEASURED_ITSELF
    return Exit.OK if best is not None and not search.ended else Exit.FOUND_PROBLEMS


async def _measure(
    test: LoadTest, plan: LoadPlan, info: ServerInfo, terminal: Terminal, stop: Stop, clock: Clock | None
) -> Measured:
    terminal.note(plan.sentence())
    parts = split(plan, info, f"load-{secrets.token_hex(3)}")
    started = time.monotonic()
    seconds = plan.warmup_s + plan.duration_s
    async with terminal.progress("measuring", seconds, "s", lambda: min(seconds, time.monotonic() - started)):
        return report.measured(plan, await run_parts(parts, test.endpoint, stop, clock))


def _save(test: LoadTest, values: Mapping[str, Any], terminal: Terminal) -> str:
    """Write the JSON where it was asked for; where it is, as the end of a sentence."""
    if terminal.as_json:
        terminal.result(values)
    if test.save is None:
        return ""
    try:
        test.save.write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        terminal.error(f"{test.save} cannot be written: {error.strerror}")
        return ""
    return f"; saved in {test.save}"


def _plot(test: LoadTest, result: Measured, info: ServerInfo) -> str:
    """Draw it where asked to; where it is, as the end of a sentence."""
    if test.plot is None or not len(result.samples):
        return ""
    from instep_tools.plot import plot

    plot(result, test.plot, f"{result.plan.sentence()}\n{report.setting(info)}")
    return f"; drawn in {test.plot}"


def _check_plot(path: Path) -> None:
    """Find out before the work, not after it, whether it can be drawn there."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise CommandProblem(
            f"a plot is a PNG, an SVG or a PDF: call it {path.with_suffix('.png')}, or another of these"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandProblem(
            "a plot needs the package 'matplotlib', which is not installed: "
            'pip install "instep[cli]", or pip install -e ".[cli]" in a checkout'
        )
    _check_writable(path)


def _check_writable(path: Path) -> None:
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None


def _problems(result: Measured) -> str:
    parts = [f"{counted(frames, 'frame')} refused ({code})" for code, frames in result.refused.items()]
    if result.unanswered:
        parts.append(f"{counted(result.unanswered, 'frame')} unanswered")
    if result.unsent:
        parts.append(f"{counted(result.unsent, 'frame')} not sent")
    period_s = result.plan.steps / result.plan.rate_hz if result.plan.mode is Mode.OPEN else 0.0
    if result.gap_s > max(LONG_GAP_S, 3 * period_s):
        parts.append(f"nothing was answered for {result.gap_s:.1f} s")
    if result.lost:
        parts.append(f"ended after {result.seconds:.1f} s: {result.lost}")
    return "".join(f", {part}" for part in parts)


def _measured_itself(result: Measured) -> str:
    """That this side was too slow, and by how much."""
    due = result.plan.offered_frames_s * result.plan.duration_s
    sent = f"it sent {max(0.0, 1 - result.unsent / due):.0%} of the frames due, "
    late = f"{three_digits(result.latencies['late_us'].p99 / 1000)} ms late at p99"
    return f"measured the load generator, not the server: {sent}{late}; {ADVICE}"


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
