"""The commands `instep recordings` and `instep replay-from`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instep import interrupts
from instep_client.protocol.codes import DEFAULT_ENDPOINT
from instep_tools.command_line import CommandLine, Endpoint

if TYPE_CHECKING:
    from rich.console import Console

recordings = CommandLine(help="Show, repair and cut recordings, and compute the state before any frame.")

Recording = Annotated[Path, typer.Argument(metavar="FILE", help="The recording.", show_default=False)]
Stream = Annotated[str, typer.Argument(metavar="STREAM", help="The stream's name or number.", show_default=False)]
ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--folder", metavar="FOLDER", help="The model's folder. Default: the recorded path.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@recordings.command(examples=["instep recordings info today.instep", "instep recordings info /var/lib/instep"])
def info(
    recording: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="The recording, or a folder of recordings.")],
    json: Json = False,
) -> None:
    """Summarize a recording, or list the recordings in a folder.

    The command does not read every frame, as `instep verify` does. Exit status 1: one is damaged. 2: one cannot be
    read.
    """
    from instep.recording import commands

    raise typer.Exit(commands.info(recording, _console(), json=json))


@recordings.command(examples=["instep recordings repair today.instep saved.instep"])
def repair(
    recording: Recording,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The new file. Default: next to the damaged one.", show_default=False),
    ] = None,
) -> None:
    """Write a new file with everything before the first damage. The damaged file stays as it is.

    Exit status 0: the file was written, or nothing is damaged. 2: nothing could be saved or written.
    """
    from instep.recording import commands

    interrupts.raise_stopped()
    commands.repair_file(recording, out, _console())


@recordings.command(
    examples=[
        "instep recordings cut today.instep backup.instep",
        "instep recordings cut today.instep am.instep --to 2026-11-26T12:00",
    ]
)
def cut(
    recording: Recording,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The new file.")],
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TIME",
            help="Begin at the last kept checkpoint before this, such as 2026-11-26T18:30 (UTC).",
            show_default=False,
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="End here. Default: the end of the recording.", show_default=False),
    ] = None,
) -> None:
    """Copy a recording, or a range of it, to a new recording.

    A range begins at the start of the recording or at a kept checkpoint, so it may begin before --from. Checkpoints
    are kept every 256 MiB, or every eighth of `recording.keep_bytes` or `recording.keep_s`.

    Exit status 0: the file was written. 2: it was not.
    """
    from instep.recording import commands

    interrupts.raise_stopped()
    commands.cut_file(recording, output, begin, end, _console())


@recordings.command(
    examples=[
        "instep recordings state today.instep mic-7 --seq 1200",
        "instep recordings state today.instep mic-7 --seq 1200 --out then.safetensors",
    ]
)
def state(
    recording: Recording,
    stream: Stream,
    seq: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="The state before frame N. Default: after the last.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.safetensors", help="Save the state as a snapshot.", show_default=False),
    ] = None,
    model: ModelFolder = None,
    json: Json = False,
) -> None:
    """Compute the exact state of a recorded stream before any of its frames.

    The frames since the newest recorded state are stepped again. `instep state restore` opens a stream with the
    file of --out. Exit status 0: done. 2: the exact state cannot be computed, and the message gives the reason.
    """
    from instep.replay.recorded_state import show_state

    interrupts.raise_stopped()
    show_state(recording, stream, seq, model_folder=model, out=out, json=json, console=_console())


def replay_from(
    recording: Recording,
    stream: Stream,
    seq: Annotated[
        int, typer.Option(min=0, metavar="N", help="The new stream continues with frame N.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="The new stream's name. Default: STREAM@N.", show_default=False),
    ] = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelFolder = None,
    json: Json = False,
) -> None:
    """Branch a live stream from any recorded frame.

    Opens a stream on a running server with the state before frame N, and leaves it parked until a producer resumes it.
    Exit status 0: done. 2: the stream could not be opened.
    """
    if name == "":
        raise typer.BadParameter("a stream needs a name: write one, or leave --as out for STREAM@N", param_hint="--as")

    from instep.replay.recorded_state import replay_from as run

    interrupts.raise_stopped()
    options: dict[str, Any] = {"name": name, "model_folder": model, "endpoint": endpoint}
    raise typer.Exit(run(recording, stream, seq, json=json, **options))


def _console() -> Console:
    from rich.console import Console  # imported when a command runs

    return Console()
