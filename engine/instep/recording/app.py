"""The commands `instep recordings`, as typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instep import interrupts
from instep_tools.command_line import CommandLine

if TYPE_CHECKING:
    from rich.console import Console

app = CommandLine(help="Manage recordings: check, show, list, repair, cut, and go back to any frame.")

Recording = Annotated[Path, typer.Argument(metavar="FILE", help="The recording.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command(examples=["instep recordings check today.instep"])
def check(recording: Recording, json: Json = False) -> None:
    """Read all of a recording and report whether it is undamaged.

    Exit status 0: it is. 1: it is damaged. 2: it could not be read.
    """
    from instep.recording import commands

    raise typer.Exit(commands.check(recording, make_console(), json=json))


@app.command(examples=["instep recordings info today.instep"])
def info(recording: Recording, json: Json = False) -> None:
    """Show a recording's model, size, streams, frames and conditions."""
    from instep.recording import commands

    raise typer.Exit(commands.info(recording, make_console(), json=json))


@app.command("list", examples=["instep recordings list /var/lib/instep"])
def list_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder, without its subfolders.")] = Path(),
    json: Json = False,
) -> None:
    """List the recordings in a folder, one per line."""
    from instep.recording import commands

    raise typer.Exit(commands.list_folder(folder, make_console(), json=json))


@app.command(examples=["instep recordings repair today.instep saved.instep"])
def repair(
    recording: Recording,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The new file. Default: next to the damaged one.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, as an option.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Write a new file with everything before the first damage. The damaged file stays as it is.

    Exit status 0: it was written, or nothing is damaged. 2: nothing could be saved, or the new file not be written.
    """
    from instep.recording import commands

    if out is not None and output is not None:
        raise typer.BadParameter("the new file is given twice: leave this out", param_hint="--output")
    interrupts.raise_stopped()
    raise typer.Exit(commands.repair(recording, out or output, make_console(), json=json))


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
            help="Begin at the last checkpoint that was kept up to here: 1200, or 2026-11-26T18:30 (UTC).",
            show_default=False,
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="POSITION|TIME", help="End here. Default: the end of the recording.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a range of a recording to a new recording, which can be verified and exported.

    A range can begin only where the recording does, or at a checkpoint that was kept: there is one every 256 MiB, or
    every eighth of `recording.keep_bytes` or `recording.keep_s`. So it may begin earlier than --from.

    Exit status 0: it was written. 1: the recording is damaged. 2: it was not written for another reason.
    """
    from instep.recording import commands

    interrupts.raise_stopped()
    raise typer.Exit(commands.cut_out(recording, output, begin, end, make_console(), json=json))


def make_console() -> Console:
    """Standard output; `rich` is imported when a command runs."""
    from rich.console import Console

    return Console()
