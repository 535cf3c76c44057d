"""The commands `produce` and `replay`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Final

import typer

from instep_tools.command_line import CommandLine, positive
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.live import Pace
from instep_tools.outputs import OutputFormat
from instep_tools.pacing import Stop, WallClock
from instep_tools.problems import Exit
from instep_tools.produce import Produce, produce
from instep_tools.replay import ReplayJob, replay
from instep_tools.terminal import Terminal

app: Final = CommandLine()


def _speed(text: str) -> float:
    if text == "max":
        return math.inf
    try:
        speed = float(text.strip("x×"))
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise typer.BadParameter("it must be 1 (real time), xN (N times as fast) or max (as fast as possible)")
    return speed


Save = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Save frames and outputs: a .csv, .npz, .parquet or .mcap file.", dir_okay=False),
]
Named = Annotated[bool, typer.Option("--named", help="The first column of text or Parquet names the stream.")]
Columns = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="The columns of the frame, or patterns: 'mfcc*'. (default: x0,x1,… or all)"),
]
Time = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="The column of times, for --speed. (default: time, time_ns or time_s)"),
]
Only = Annotated[str, typer.Option(metavar="PATTERN", help="Only streams whose names match, as in 'mic-*'.")]
Speed = Annotated[
    float | None,
    typer.Option(
        parser=_speed,
        metavar="1|xN|max",
        help="1: in real time; xN: N times as fast; max: as fast as possible. "
        "(default: 1 where the times are known, else max)",
    ),
]
RATE_HELP: Final = "Frames per second for each stream, instead of the file's times."


@app.server_command(
    "produce",
    drains=True,
    examples=[
        "instep produce sensor.csv --columns x,y,z --time at_s",
        "read-microphone | instep produce --name mic --format jsonl",
    ],
)
async def produce_command(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="A recording, Parquet, MCAP, NPZ, NPY, CSV or other text, or JSON lines. Without FILE, or with -, "
            "lines are read from standard input.",
        ),
    ] = None,
    named: Named = False,
    columns: Columns = None,
    time: Time = None,
    only: Only = "*",
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name the stream, or several NAME-0, NAME-1, … (default: as in the file)"),
    ] = None,
    speed: Speed = None,
    rate: Annotated[float | None, typer.Option(metavar="HZ", callback=positive, help=RATE_HELP)] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", min=1, help="The most frames of each stream.")] = None,
    format: Annotated[OutputFormat | None, typer.Option(help="How outputs are printed. (default: csv)")] = None,
    save: Save = None,
) -> Exit:
    """Send frames live from lines or a file, and print or save the outputs.

    A line is one frame: numbers separated by commas or white space. A bad line is reported on stderr and skipped, and
    the exit status is then 1. A file is read before the first frame is sent.

    Each output is printed as a line of stream, seq and values, or as JSON with its frame. With --json, only the result
    of the command is printed. Sending stops when the server has ended all streams.
    """
    what = Produce(
        target=target,
        pace=Pace(rate, frames, speed),
        file=None if file == Path("-") else file,
        choice=_choice(named, columns, time, only),
        name=name,
        save=save,
        format=format,
    )
    with WallClock() as clock:
        return await produce(what, terminal, stop, clock)


@app.server_command(
    "replay",
    drains=True,
    examples=[
        "instep replay today.instep --check",
        "instep replay today.parquet --speed max --save again.parquet",
        "instep replay bag.mcap --only /imu --save y.csv",
    ],
)
async def replay_command(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A recording, Parquet, MCAP, NPZ, NPY, CSV or other text, or JSON lines."),
    ],
    named: Named = False,
    columns: Columns = None,
    time: Time = None,
    only: Only = "*",
    speed: Speed = None,
    rate: Annotated[float | None, typer.Option(metavar="HZ", callback=positive, help=RATE_HELP)] = None,
    save: Save = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the outputs with the file's, bit for bit.")] = False,
) -> Exit:
    """Replay recorded sequences in real time, N times as fast, or as fast as possible.

    Each sequence is a new stream with its name in the file, or with a suffix where the server has a stream of that
    name.

    With --check the exit status is 0 when all outputs equal those in the file, 1 when one differs, and 2 when one
    could not be compared.
    """
    what = ReplayJob(target, file, speed, rate, _choice(named, columns, time, only), save, check)
    with WallClock() as clock:
        return await replay(what, terminal, stop, clock)


def _choice(named: bool, columns: str | None, time: str | None, only: str) -> Choice:
    return Choice(named, tuple(filter(None, map(str.strip, (columns or "").split(",")))), time, only)
