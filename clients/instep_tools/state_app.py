"""The command line of `instep-client state`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from instep_client.protocol.wire import DEFAULT_ENDPOINT
from instep_tools import state
from instep_tools.command_line import AsJson, CommandLine, Endpoint, ModelName
from instep_tools.connect import Target
from instep_tools.terminal import Terminal, run_undrained

app: Final = CommandLine(
    help="Read, save, restore, copy and replace the state of a stream.\n\n"
    "The exit status is 0 on success, and 2 with an error that says why.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="The stream, whoever has it.")]


@app.command("read", examples=["instep-client state read mic-7"])
def read_command(
    name: Name, endpoint: Endpoint = DEFAULT_ENDPOINT, model: ModelName = "", as_json: AsJson = False
) -> None:
    """Show the seq of a stream's next frame and its state. Its owner is not disturbed.

    --json gives all values.
    """
    raise typer.Exit(run_undrained(partial(state.read, Target(endpoint, model), name), Terminal(as_json)))


@app.command("snapshot", examples=["instep-client state snapshot mic-7 --to mic-7.safetensors"])
def snapshot_command(
    name: Name,
    to: Annotated[
        Path,
        typer.Option(
            "--to", metavar="FILE", show_default=False, help="A new file; existing files are never overwritten."
        ),
    ],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Save a stream's seq and state in a new safetensors file. Its owner notices nothing."""
    raise typer.Exit(run_undrained(partial(state.snapshot, Target(endpoint, model), name, to), Terminal(as_json)))


@app.command("restore", examples=["instep-client state restore mic-7.safetensors --as mic-7-again"])
def restore_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="A file that `state snapshot` made.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", show_default=False, help="The new stream. Default: the name it had."),
    ] = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Open a stream that continues from a snapshot, on this or another server of the same model.

    The server keeps it parked until a producer resumes it, for as long as the answer says.
    """
    raise typer.Exit(run_undrained(partial(state.restore, Target(endpoint, model), file, name), Terminal(as_json)))


@app.command("fork", examples=["instep-client state fork mic-7 mic-7-copy"])
def fork_command(
    name: Name,
    copy: Annotated[str, typer.Argument(metavar="NEW", show_default=False, help="The new stream.")],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Open a stream that continues from the state of another one, without disturbing its owner.

    The server keeps it parked until a producer resumes it, for as long as the answer says.
    """
    raise typer.Exit(run_undrained(partial(state.fork, Target(endpoint, model), name, copy), Terminal(as_json)))


@app.command("reset", examples=["instep-client state reset mic-7 --take-over"])
def reset_command(
    name: Name,
    file: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="FILE", show_default=False, help="A snapshot's state, in place of the initial one."
        ),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Take the stream from its owner, who is told, or refused when it resumes."),
    ] = False,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Replace a stream's state by the initial one, or a snapshot's; its seqs continue.

    It needs --take-over, since the owner must be told: at once (FENCED) if it is connected, otherwise when it resumes.
    Either may take the stream over again.
    """
    command = partial(state.reset, Target(endpoint, model), name, file, take_over)
    raise typer.Exit(run_undrained(command, Terminal(as_json)))
