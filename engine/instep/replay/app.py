"""The commands `instep recordings`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instep import interrupts
from instep_client.protocol.codes import DEFAULT_ENDPOINT
from instep_tools.command_line import CommandLine, Endpoint, ModelName

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


@recordings.command(examples=["instep recordings repair today.instep --output saved.instep"])
def repair(
    recording: Recording,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The new file. Default: next to the damaged one.", show_default=False),
    ] = None,
) -> None:
    """Write a new file with everything before the first damage. The damaged file stays as it is.

    Exit status 0: the file was written, or nothing is damaged. 2: nothing could be saved or written.
    """
    from instep.recording import commands

    interrupts.raise_stopped()
    commands.repair_file(recording, output, _console())


@recordings.command(
    examples=[
        "instep recordings cut today.instep --output backup.instep",
        "instep recordings cut today.instep --output am.instep --to 2026-11-26T12:00",
    ]
)
def cut(
    recording: Recording,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The new file.", show_default=False)],
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
        "instep recordings state today.instep mic-7 --output mic-7.safetensors",
        "instep recordings state today.instep mic-7 --seq 1200 --open what-if",
    ]
)
def state(
    recording: Recording,
    stream: Stream,
    seq: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="The state before frame N. Default: after the last.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Save the state for `instep state restore`.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--open", metavar="NAME", help="Open a stream on a running server with the state.", show_default=False
        ),
    ] = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    folder: ModelFolder = None,
    json: Json = False,
) -> None:
    """Compute the exact state of a recorded stream before any of its frames: to show, save or continue from it.

    The frames since the newest recorded state are stepped again. A stream that is opened is parked until a producer
    resumes it. Exit status 0: done. 2: the exact state cannot be computed, or not be used, and the message says why.
    """
    if name == "" or (name and output):
        raise typer.BadParameter("it takes a name, and goes without --output", param_hint="--open")

    from instep.replay.recorded_state import open_stream, show_state
    from instep_tools.connect import Target

    interrupts.raise_stopped()
    if name is None:
        show_state(recording, stream, seq, folder, output, _console(), json=json)
    else:
        raise typer.Exit(open_stream(recording, stream, seq, folder, name, Target(endpoint, model), json=json))


def _console() -> Console:
    from rich.console import Console  # imported when a command runs

    return Console()
