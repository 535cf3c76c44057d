"""The commands `instep recordings`, as typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instep import interrupts
from instep_tools.command_line import CommandLine

if TYPE_CHECKING:
    from rich.console import Console

app = CommandLine(help="Show, repair and cut recordings, and compute the state before any frame.")

Recording = Annotated[Path, typer.Argument(metavar="FILE", help="The recording.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command(examples=["instep recordings info today.instep", "instep recordings info /var/lib/instep"])
def info(
    recording: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="The recording, or a folder of recordings.")],
    json: Json = False,
) -> None:
    """Summarize a recording, or list the recordings in a folder.

    The command does not read every frame, as `instep verify` does. Exit status 1: one is damaged. 2: one cannot be
    read.
    """
    from instep.recording import commands

    raise typer.Exit(commands.info(recording, make_console(), json=json))


@app.command(examples=["instep recordings repair today.instep saved.instep"])
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
    commands.repair_file(recording, out, make_console())


@app.command(
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
            metavar="POSITION|TIME",
            help="Begin at the last kept checkpoint before this: 1200, or 2026-11-26T18:30 (UTC).",
            show_default=False,
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="POSITION|TIME", help="End here. Default: the end of the recording.", show_default=False
        ),
    ] = None,
) -> None:
    """Copy a recording, or a range of it, to a new recording.

    A range begins at the start of the recording or at a kept checkpoint, so it may begin before --from. Checkpoints
    are kept every 256 MiB, or every eighth of `recording.keep_bytes` or `recording.keep_s`.

    Exit status 0: the file was written. 2: it was not.
    """
    from instep.recording import commands

    interrupts.raise_stopped()
    commands.cut_file(recording, output, begin, end, make_console())


def make_console() -> Console:
    """Standard output; `rich` is imported when a command runs."""
    from rich.console import Console

    return Console()
