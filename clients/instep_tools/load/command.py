"""`instep-client loadtest`: one load measured, or the largest one within a service level."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from instep_client.protocol.wire import ServerInfo
from instep_tools.connect import Target, connected
from instep_tools.load import report, saved
from instep_tools.load.plan import LoadPlan, split
from instep_tools.load.processes import counters, run_parts
from instep_tools.load.result import Measured, measured, search_as_json, server_as_json
from instep_tools.load.search import Search
from instep_tools.pacing import Clock, Stop
from instep_tools.page import as_html, check_report_path
from instep_tools.problems import BadFile, CommandProblem, Exit, check_writable, write_file
from instep_tools.stream_plot import check_plot_path, rendered
from instep_tools.terminal import Terminal, progress
from instep_tools.words import counted, three_digits

SILENT_S: Final = 2.0
"""Without an answer for this time, the progress says so."""


@dataclass(frozen=True, slots=True)
class LoadTest:
    """What to do."""

    target: Target
    plan: LoadPlan
    """With `slo_ms`, search for the largest number of streams within it; `streams` is the first one tried."""
    plot: Path | None = None
    save: Path | None = None
    """Where the JSON of the result goes as well."""
    hdr: Path | None = None
    report: Path | None = None
    """Where the page goes."""


@dataclass
class LoadTester:
    """Runs a test and reports."""

    test: LoadTest
    terminal: Terminal
    stop: Stop
    clock: Clock | None = None
    _info: ServerInfo = field(init=False)

    async def run(self) -> Exit:
        """The whole command.

        Raises:
            InstepError: as the client does.
            CommandProblem: when the load does not fit the server, or a file cannot be written.
        """
        test = self.test
        if test.plot is not None:
            check_plot_path(test.plot)
        if test.report is not None:
            check_report_path(test.report)
        for path in (test.save, test.hdr):
            if path is not None:
                check_writable(path)
        async with connected(test.target, "loadtest", self.terminal, self.stop) as client:
            self._info = client.info
        self.terminal.note(report.setting(self._info))
        return await (self._measure_once() if test.plan.slo_ms is None else self._search(test.plan.slo_ms))

    async def _measure_once(self) -> Exit:
        self.terminal.note(self.test.plan.sentence())
        result = await self._measure(self.test.plan)
        if not self.terminal.as_json and len(result.answered):
            report.show_latencies(self.terminal, result)
        found = (report.early_end(result), report.numbers(result))
        sentence = "; ".join(filter(None, found)) + report.problems(result)
        if result.measured_itself:
            sentence = f"{report.blame(result)}: {sentence}"
        if self.stop.requested:
            after = f" after {result.seconds:.1f} s" if len(result.answered) else ""
            sentence += f"; stopped{after}, all streams closed"
        ending = Exit.OK if result.whole else Exit.FOUND_PROBLEMS
        ending = Exit.MEASURED_ITSELF if result.measured_itself else ending
        return self._tell(result.as_json(), [result], result, sentence, ending)

    async def _search(self, slo_ms: float) -> Exit:
        plan, limit = self.test.plan, self._info.max_streams
        if plan.streams > limit:
            raise CommandProblem(f"the server keeps {limit} streams at most; begin the search with fewer")

        async def attempt(streams: int, processes: int) -> Measured:
            connections = min(max(plan.connections, processes), streams)
            tried = replace(plan, streams=streams, connections=connections, processes=processes)
            trial = await self._measure(tried, f"try {len(search.trials) + 1}")
            where = f"{counted(streams, 'stream')} from {counted(processes, 'process', 'processes')}"
            p99_ms, late_ms = (three_digits(each.p99 / 1000) for each in (trial.latency, trial.parts["late_us"]))
            verdict = f"{trial.verdict(slo_ms)}: p99 {p99_ms} ms, sent {late_ms} ms late"
            early = report.early_end(trial)
            if not self.stop.requested:  # else it says nothing
                self.terminal.note(f"{where}: {verdict}{report.problems(trial)}{early and f'; {early}'}")
            return trial

        self.terminal.note(plan.sentence())
        self.terminal.note(report.effort(plan, limit))
        search = Search(attempt, slo_ms, plan.processes, self.stop)
        await search.run(plan.streams, limit)
        best = search.best
        if search.trials and not self.terminal.as_json:
            report.show_trials(self.terminal, search.trials, slo_ms)
            if best is not None:
                report.show_latencies(self.terminal, best)
        if best is not None:
            least = "at least " if search.ended else ""
            level = f"in real time at {plan.rate_hz:g} Hz within p99 of {slo_ms:g} ms"
            p99_ms = three_digits(best.latency.p99 / 1000)
            sentence = f"{least}{counted(best.plan.streams, 'stream')} {level} (p99 {p99_ms} ms)"
        elif search.trials and search.is_all_invalid:
            sentence = "the load generator was too slow to find out what the server can do"
        elif search.trials:
            fewest = min(trial.plan.streams for trial in search.trials if trial.verdict(slo_ms) == "not met")
            sentence = f"not even {counted(fewest, 'stream')} stayed within {slo_ms:g} ms at p99 ({plan.rate_hz:g} Hz)"
        else:
            sentence = "nothing was measured"
        if search.ended or search.limited:
            sentence += f"; {search.ended or 'that is all the server has room for'}"
        good = best is not None and not search.ended
        ending = Exit.MEASURED_ITSELF if search.measured_itself else Exit.OK if good else Exit.FOUND_PROBLEMS
        values = search_as_json(search.trials, slo_ms, best, search.limited, search.ended)
        return self._tell(values, search.trials, best, sentence, ending)

    async def _measure(self, plan: LoadPlan, title: str = "measuring") -> Measured:
        parts = split(plan, self._info, f"load-{secrets.token_hex(3)}")
        try:
            answered = counters(len(parts))
        except OSError as error:
            raise CommandProblem(
                f"there is no shared memory for the counters of a load test: {error.strerror or error}; look at the "
                "limit on the size of files (ulimit -f) and at the room in /dev/shm"
            ) from None
        meter = _Meter(lambda: sum(counter.value for counter in answered))
        seconds = plan.warmup_s + plan.duration_s
        async with progress(self.terminal.err, title, seconds, "s", lambda: min(seconds, meter.seconds), meter.rate):
            return measured(plan, await run_parts(parts, self.test.target, self.stop, self.clock, answered))

    def _tell(
        self, values: Mapping[str, Any], trials: list[Measured], best: Measured | None, sentence: str, ending: Exit
    ) -> Exit:
        """Print the JSON and the summary, and write what is to be written."""
        values = {"server": server_as_json(self._info), **values}
        if self.terminal.as_json:
            self.terminal.result(values)
        test, info, summary = self.test, self._info, sentence
        drawn = [trial for trial in trials if len(trial.samples)]
        page = partial(_report, test, info, trials, best, sentence, ending)
        has_found = bool(drawn) or any(trial.found.refused for trial in trials)
        files: tuple[tuple[Path | None, str, Callable[[], bytes] | None], ...] = (
            (test.save, "saved in", (lambda: json.dumps(values, indent=2).encode() + b"\n") if drawn else None),
            (test.hdr, "percentiles in", partial(saved.as_hgrm, best) if best and len(best.samples) else None),
            (test.plot, "drawn in", partial(_picture, test, drawn, info) if drawn else None),
            (test.report, "report in", page if has_found else None),
        )
        for path, said, content in files:
            if path is None:
                continue
            if content is None:
                summary += f"; {path} not written"
                continue
            try:
                write_file(path, content())
                summary += f"; {said} {path}"
            except BadFile as error:
                self.terminal.error(str(error))
                ending = ending or Exit.COULD_NOT_RUN
        self.terminal.summary(summary, good=ending is Exit.OK)
        return ending


def _picture(test: LoadTest, trials: list[Measured], info: ServerInfo) -> bytes:
    from instep_tools.load import plot

    assert test.plot is not None
    return rendered((plot.run if test.plan.slo_ms is None else plot.search)(trials, info), test.plot)


def _report(
    test: LoadTest, info: ServerInfo, trials: list[Measured], best: Measured | None, sentence: str, ending: Exit
) -> bytes:
    from instep_tools.load.page import load_page

    return as_html(load_page(test.target.endpoint, info, test.plan, trials, best, sentence, ending)).encode()


class _Meter:
    """How many frames are answered, for the progress."""

    def __init__(self, frames: Callable[[], int]) -> None:
        self._frames = frames
        self._began = self._first_at = self._changed_at = time.monotonic()
        self._last = 0

    @property
    def seconds(self) -> float:
        """How long it runs."""
        return time.monotonic() - self._began

    def rate(self) -> str:
        """`14,784 frames/s`, or for how long nothing was answered."""
        now, frames = time.monotonic(), self._frames()
        if not frames:
            self._first_at = now
            return "no answer yet"
        if frames != self._last:
            self._last, self._changed_at = frames, now
        silent_s = now - self._changed_at
        if silent_s >= SILENT_S:
            return f"no answer for {silent_s:.0f} s"
        return f"{frames / max(1e-3, now - self._first_at):,.0f} frames/s"
