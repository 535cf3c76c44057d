"""The command line of `instep-client`: options in, one command's description out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Final

import typer

from instep_tools.command_line import CommandLine, add_version, positive
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.live import Pace
from instep_tools.load.app import EXAMPLES, loadtest
from instep_tools.outputs import OutputFormat
from instep_tools.pacing import Stop, WallClock
from instep_tools.problems import Exit
from instep_tools.produce import Produce, produce
from instep_tools.replay import ReplayJob, replay
from instep_tools.server import models, ping, stats
from instep_tools.signals import Signal
from instep_tools.state import app as state_app
from instep_tools.streams import app as streams_app
from instep_tools.terminal import Terminal
from instep_tools.top import top

app: Final = CommandLine(
    name="instep-client",
    help="Send frames to an instep server, live, recorded or as a load test, and manage its streams.",
)

app.add_typer(state_app, name="state")
app.add_typer(streams_app, name="streams")
app.server_command("ping", examples=["instep-client ping", "instep-client ping -e tcp://gpu-1:5757 --json"])(ping)
app.server_command("models", examples=["instep-client models", "instep-client models --json"], names_model=False)(
    models
)
app.server_command("stats", examples=["instep-client stats", "instep-client stats --json"])(stats)
app.server_command("loadtest", examples=EXAMPLES, drains=True)(loadtest)
app.server_command("top", examples=["instep-client top", "instep-client top -e tcp://gpu-1:5757 --model ears"])(top)

SIGNAL_RATE_HZ: Final = 10.0
"""The rate of a generated signal where none is given: slow enough to read along."""


def _speed(text: str) -> float:
    """`max`, or a number that may have an x at either end."""
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
    str | None, typer.Option(metavar="A,B,…", help="The columns of the frame. (default: x0,x1,… or all that fit)")
]
Time = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="The column of times, for --speed. (default: time, time_ns or time_s)"),
]
Only = Annotated[str, typer.Option(metavar="PATTERN", help="Only streams whose names fit, as in 'mic-*'.")]
Speed = Annotated[
    float | None,
    typer.Option(
        parser=_speed,
        metavar="1|xN|max",
        help="1: real time, xN: N times as fast, max: as fast as possible. "
        "Default: 1 where the times are known, else max.",
    ),
]
RATE_HELP: Final = "Frames a second for each stream, whatever its times say."


add_version(app)


@app.server_command(
    "produce",
    drains=True,
    examples=[
        "instep-client produce sensor.csv --columns x,y,z --time at_s",
        "read-microphone | instep-client produce --name mic --format jsonl",
        "instep-client produce --signal sine --streams 4 --seconds 10 --save y.parquet",
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
            help="Text with one frame a line, NPZ, NPY, Parquet, MCAP, or an engine's recording. None, or -: lines "
            "from standard input.",
        ),
    ] = None,
    signal: Annotated[Signal | None, typer.Option(help="Send a generated signal instead.")] = None,
    named: Named = False,
    columns: Columns = None,
    time: Time = None,
    only: Only = "*",
    streams: Annotated[
        int | None, typer.Option(min=1, help="How many streams. Default: one for each sequence of a file, 1 for text.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX", help="Call the streams PREFIX-0, … (default: as in the file, or else produce-PID)"
        ),
    ] = None,
    speed: Speed = None,
    rate: Annotated[
        float | None, typer.Option(metavar="HZ", callback=positive, help=f"{RATE_HELP} Signals: 10 if not given.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Send at most this many frames of each stream.")] = None,
    seconds: Annotated[float | None, typer.Option(callback=positive, help="Send for at most this long.")] = None,
    format: Annotated[OutputFormat | None, typer.Option(help="How outputs are printed. (default: csv)")] = None,
    save: Save = None,
) -> Exit:
    """Stream frames live from lines, files or a generated signal; print or save the outputs.

    Lines hold numbers separated by commas or white space, one frame a line; with several streams they go to the
    streams in turn. A bad line is named on stderr and costs its stream this one frame; the exit status is 1 then.

    Every output is printed as a line of stream, seq and values. With --json these are JSON lines, and the last line is
    the result of the command. Sending stops when the server has ended all streams, as a restart without a recording
    does.
    """
    rate_hz = SIGNAL_RATE_HZ if rate is None and signal is not None else rate
    what = Produce(
        target=target,
        pace=Pace(rate_hz, frames, seconds, speed),
        file=None if file == Path("-") else file,
        choice=_choice(named, columns, time, only),
        signal=signal,
        streams=streams,
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
        "instep-client replay today.instep --check",
        "instep-client replay today.parquet --speed max --plot today.png",
        "instep-client replay bag.mcap --only /imu --save y.csv",
    ],
)
async def replay_command(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An engine's recording, Parquet, MCAP, NPZ, NPY, CSV or other text.")
    ],
    named: Named = False,
    columns: Columns = None,
    time: Time = None,
    only: Only = "*",
    speed: Speed = None,
    rate: Annotated[float | None, typer.Option(metavar="HZ", callback=positive, help=RATE_HELP)] = None,
    save: Save = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw inputs and outputs: a PNG, SVG or PDF.", dir_okay=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the outputs with the file's, bit for bit.")] = False,
) -> Exit:
    """Send recorded sequences again: in real time, N times as fast, or as fast as possible.

    At the server each sequence is a new stream (replay-…), so that no stream of the same name is disturbed. What is
    printed, saved or drawn has the names in the file.

    With --check the exit status is 0 when all outputs equal those in the file, 1 when one differs, and 2 when one
    could not be compared.
    """
    what = ReplayJob(target, file, speed, rate, _choice(named, columns, time, only), save, plot, check)
    with WallClock() as clock:
        return await replay(what, terminal, stop, clock)


def _choice(named: bool, columns: str | None, time: str | None, only: str) -> Choice:
    names = () if columns is None else tuple(filter(None, (name.strip() for name in columns.split(","))))
    if columns is not None and len(set(names)) < max(len(names), 1):
        raise typer.BadParameter("name each column once, as in --columns x0,x1", param_hint="--columns")
    return Choice(named, names, time, only)
