"""`instep loadtest`: its options, one load measured, or the largest one within a service level."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from instep_client.protocol.wire import ServerInfo
from instep_tools.command_line import CommandLine, positive
from instep_tools.connect import Target, connected
from instep_tools.load.plan import REAL_TIME_RATE_HZ, LoadPlan, split
from instep_tools.load.processes import run_parts
from instep_tools.load.result import ADVICE, PERCENTILES, TRIAL_TITLES, LoadResult, server_as_json, trial_rows
from instep_tools.load.search import Search
from instep_tools.pacing import Clock, Stop
from instep_tools.problems import BadFile, CommandProblem, Exit
from instep_tools.terminal import Terminal, progress
from instep_tools.words import counted

app: Final = CommandLine()
WARM_UP_S: Final = 2.0
WARM_UP_SHARE: Final = 0.2
"""Of the measured time: a shorter test warms up for less than `WARM_UP_S`."""
_STYLES: Final = {"met": "green", "not met": "red", "invalid": "yellow"}


@app.server_command(
    "loadtest",
    drains=True,
    examples=[
        "instep loadtest --streams 1024",
        "instep loadtest --streams 64 --rate 50 --report load.html",
        "instep loadtest --slo-ms 20 --rate 50 --processes 2",
    ],
)
async def loadtest(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    streams: Annotated[int, typer.Option(metavar="N", min=1, help="Streams; with --slo-ms, of the first try.")] = 256,
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that generate load.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="HZ",
            callback=positive,
            help="Frames per second for each stream, sent when due (open loop). "
            "(default: as fast as answers come, a closed loop; with --slo-ms, 100)",
        ),
    ] = None,
    duration: Annotated[
        float,
        typer.Option(metavar="SECONDS", callback=positive, help="How long to measure."),
    ] = 10.0,
    slo_ms: Annotated[
        float | None,
        typer.Option(
            callback=positive,
            metavar="MS",
            help="Find the most streams with 99 % of frames answered within MS milliseconds.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write an HTML report.", dir_okay=False),
    ] = None,
) -> Exit:
    """Measure throughput and latency, or the largest load within a service level.

    With --rate, latency counts from the time at which a frame was due, so a slow answer cannot hide the frames that
    queue behind it. The table shows which part of it is the server's.

    The exit status is 0 when every frame was answered, 1 when some were refused or unanswered, 2 when it could not run,
    and 3 when the load generator could not keep up, so the result says nothing about the server.
    """
    plan = LoadPlan(
        streams=streams,
        connections=processes,
        processes=processes,
        rate_hz=REAL_TIME_RATE_HZ if rate is None and slo_ms is not None else rate,
        duration_s=duration,
        warmup_s=min(WARM_UP_S, duration * WARM_UP_SHARE),
        slo_ms=slo_ms,
    )
    return await LoadTest(target, plan, report, terminal, stop).run()


@dataclass
class LoadTest:
    """Runs a plan and reports the result. With `slo_ms`, the plan is the first one that a search tries."""

    target: Target
    plan: LoadPlan
    report: Path | None
    """The path of the HTML page."""
    terminal: Terminal
    stop: Stop
    clock: Clock | None = None
    _info: ServerInfo = field(init=False)

    async def run(self) -> Exit:
        """Run the whole command.

        Raises:
            InstepError: as the client does.
            CommandProblem: the load does not fit the server, or the page cannot be written.
        """
        if self.report is not None:
            import instep_tools.load.page  # noqa: F401  # name a missing library before the work
            from instep_tools.page import check_report_path

            check_report_path(self.report)
        async with connected(self.target, "loadtest", self.terminal, self.stop) as client:
            self._info = info = client.info
        model = f"model {info.model!r} ({info.features} to {info.outputs}) on {info.device}, {info.exactness}"
        self.terminal.note(f"{model}: {self.plan.sentence()}")
        return await (self._measure_once() if self.plan.slo_ms is None else self._search(self.plan.slo_ms))

    async def _measure_once(self) -> Exit:
        result = await self._measure(self.plan)
        if not self.terminal.as_json and len(result.answered):
            self._show_latencies(result)
        ending = Exit.OK if result.whole else Exit.FOUND_PROBLEMS
        ending = Exit.MEASURED_ITSELF if result.measured_itself else ending
        sentence = result.sentence()
        if result.measured_itself:
            sentence = f"measured the load generator, not the server: {ADVICE}; {sentence}"
        return self._tell(result.as_json(), result, None, sentence, ending)

    async def _search(self, slo_ms: float) -> Exit:
        plan, limit = self.plan, self._info.max_streams
        if plan.streams > limit:
            raise CommandProblem(f"the server keeps {limit} streams at most; begin the search with fewer")

        async def attempt(streams: int, processes: int) -> LoadResult:
            connections = min(max(plan.connections, processes), streams)
            tried = replace(plan, streams=streams, connections=connections, processes=processes)
            trial = await self._measure(tried, f"try {len(search.trials) + 1}")
            if not self.stop.requested:  # else it says nothing
                where = f"{counted(streams, 'stream')} from {counted(processes, 'process', 'processes')}"
                self.terminal.note(f"{where}: {trial.verdict(slo_ms)}: {trial.sentence()}")
            return trial

        search = Search(attempt, slo_ms, plan.processes, self.stop)
        await search.run(plan.streams, limit)
        if search.trials and not self.terminal.as_json:
            rows: list[list[str | Text]] = [
                [*cells, Text(verdict, _STYLES[verdict])] for *cells, verdict in trial_rows(search.trials, slo_ms)
            ]
            self.terminal.table(TRIAL_TITLES, rows, slice(-1))
            if search.best is not None:
                self._show_latencies(search.best)
        good = search.best is not None and not search.ended
        ending = Exit.MEASURED_ITSELF if search.measured_itself else Exit.OK if good else Exit.FOUND_PROBLEMS
        return self._tell(search.as_json(), search.best, search, search.sentence(), ending)

    async def _measure(self, plan: LoadPlan, title: str = "measuring") -> LoadResult:
        parts = split(plan, self._info, f"load-{secrets.token_hex(3)}")
        seconds, began = plan.warmup_s + plan.duration_s, time.monotonic()
        with progress(self.terminal.err, title, seconds, "s", lambda: min(seconds, time.monotonic() - began)):
            return LoadResult(plan, await run_parts(parts, self.target, self.stop, self.clock))

    def _show_latencies(self, result: LoadResult) -> None:
        headings = (f"ms, {counted(len(result.samples), 'block')}", *PERCENTILES)
        self.terminal.table(headings, ((title, *values) for title, values in result.latency_rows()))

    def _tell(
        self, values: Mapping[str, Any], best: LoadResult | None, search: Search | None, sentence: str, ending: Exit
    ) -> Exit:
        if self.terminal.as_json:
            self.terminal.result({"server": server_as_json(self._info), **values})
        if self.stop.requested:
            sentence += f"; {self.stop.words}"
        summary = sentence
        has_found = search.trials if search is not None else best and (len(best.samples) or best.found.refused)
        if self.report is not None and not has_found:
            summary += f"; {self.report} not written"
        elif self.report is not None:
            from instep_tools.load.page import load_page
            from instep_tools.page import write_page

            try:
                page = load_page(self.target.endpoint, self._info, self.plan, best, search, sentence, ending)
                write_page(self.report, page)
                summary += f"; report in {self.report}"
            except BadFile as error:
                self.terminal.error(str(error))
                ending = ending or Exit.COULD_NOT_RUN
        self.terminal.summary(summary, good=ending is Exit.OK)
        return ending
