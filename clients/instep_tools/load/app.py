"""The options of `instep-client loadtest`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

import typer

from instep_tools.command_line import options_given, positive
from instep_tools.connect import Target
from instep_tools.load.command import LoadTest, LoadTester
from instep_tools.load.plan import REAL_TIME_RATE_HZ, LoadPlan, Mode
from instep_tools.load.saved import compare as compare_runs
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.terminal import Terminal

EXAMPLES: Final = (
    "instep-client loadtest --streams 1024 --block 256",
    "instep-client loadtest --streams 64 --rate 50 --duration 1m --plot load.png",
    "instep-client loadtest --slo-ms 20 --rate 50 --processes 2",
    "instep-client loadtest --rate 50 --report load.html",
)
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600}


def _seconds(value: str | float) -> float:
    """`10`, `10s`, `1m` or `1h`."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?([smh]?)", str(value))
    if found is None:
        raise typer.BadParameter(f"{value!r} is not a time: write 10, 10s, 1m or 1h")
    return float(found[1]) * _UNITS[found[2]]


async def loadtest(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    context: typer.Context,
    streams: Annotated[int, typer.Option(min=1, help="How many streams. With --slo-ms: the first number tried.")] = 256,
    connections: Annotated[
        int | None, typer.Option(min=1, help="Connections they are spread over. (default: one for each process)")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes the connections are spread over.")] = 1,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="closed: a block is sent when the one before it is answered. open: when it is due, whatever the "
            "answers do. Default: open with --rate or --slo-ms, else closed."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="HZ", callback=positive, help="Open loop: frames a second for each. (default: 100)"),
    ] = None,
    duration: Annotated[
        float,
        typer.Option(
            metavar="TIME",
            parser=_seconds,
            callback=positive,
            help="How long to measure: 30s, 1m, 1h. (default: 10s)",
            show_default=False,
        ),
    ] = 10.0,
    warmup: Annotated[
        float,
        typer.Option(
            metavar="TIME",
            parser=_seconds,
            help="The time before that, which does not count. (default: 2s)",
            show_default=False,
        ),
    ] = 2.0,
    block: Annotated[
        int | None,
        typer.Option(min=1, help="At most this many streams per message. (default: all of the connection's that fit)"),
    ] = None,
    steps_per_block: Annotated[int, typer.Option(min=1, help="Timesteps a message.")] = 1,
    slo_ms: Annotated[
        float | None,
        typer.Option(
            callback=positive,
            metavar="MS",
            help="Find the largest number of streams of which 99 % of the frames are answered within MS of being due.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the result: a PNG, SVG or PDF.", dir_okay=False)
    ] = None,
    hdr: Annotated[
        Path | None,
        typer.Option(metavar="FILE.hgrm", help="Write the percentiles for HdrHistogram's plotters.", dir_okay=False),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Save the result, for --compare.", dir_okay=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write a page with all of it, to attach or to send.", dir_okay=False
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two saved results; measure nothing.")
    ] = None,
) -> Exit:
    """Measure throughput and latency, or the largest load within a service level.

    In an open loop latency counts from the moment a frame was due, not from when it could be sent: a slow answer cannot
    hide the frames that queue behind it. The server's own share is shown beside it.

    The exit status is 0 when every frame was answered, 1 when some were refused or unanswered, 2 when it could not run,
    and 3 when the load generator could not keep up, so the result says nothing about the server.
    """
    if compare is not None:
        if given := [option for option in options_given(context) if option not in ("--compare", "--json")]:
            raise typer.BadParameter(f"it measures nothing: leave out {', '.join(given)}", param_hint="--compare")
        return compare_runs(*compare, terminal)
    if mode is Mode.CLOSED and (rate is not None or slo_ms is not None):
        raise typer.BadParameter("--rate and --slo-ms need an open loop: leave out --mode closed")
    is_open = mode is Mode.OPEN or rate is not None or slo_ms is not None
    plan = LoadPlan(
        streams=streams,
        connections=connections or processes,
        processes=processes,
        mode=Mode.OPEN if is_open else Mode.CLOSED,
        rate_hz=REAL_TIME_RATE_HZ if rate is None else rate,
        duration_s=duration,
        warmup_s=warmup,
        block=block,
        steps=steps_per_block,
        slo_ms=slo_ms,
    )
    return await LoadTester(LoadTest(target, plan, plot, save, hdr, report), terminal, stop).run()
