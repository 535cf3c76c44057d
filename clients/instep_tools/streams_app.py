"""The command line of `instep-client streams`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

import typer

from instep_client.aio import StreamPlace
from instep_client.protocol.wire import DEFAULT_ENDPOINT
from instep_tools import streams
from instep_tools.command_line import AsJson, CommandLine, Endpoint, ModelName
from instep_tools.connect import Target
from instep_tools.terminal import Terminal, run_undrained

app: Final = CommandLine(help="List the streams of a server, and close or park some.")

Prefix = Annotated[str | None, typer.Option(metavar="TEXT", help="Only streams whose names begin with TEXT.")]
Where = Annotated[
    StreamPlace | None,
    typer.Option("--place", help="Only streams of connected clients, parked ones, or hibernating ones."),
]


Names = Annotated[list[str], typer.Argument(metavar="NAME", show_default=False, help="The streams.")]


@app.command("list", examples=["instep-client streams list", "instep-client streams list --prefix mic- --place parked"])
def list_command(
    prefix: Prefix = None,
    place: Where = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many, longest idle first.")] = 50,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Show the server's streams: the place of each, its next seq, and how long the server keeps it if it stays idle."""
    command = partial(streams.show, Target(endpoint, model), prefix or "", place, limit)
    raise typer.Exit(run_undrained(command, Terminal(as_json)))


@app.command("close", examples=["instep-client streams close mic-7", "instep-client streams close --place parked"])
def close_command(
    names: Names = [],  # noqa: B006
    prefix: Prefix = None,
    place: Where = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Close streams by name, or all with a prefix or at a place.

    Their states are lost. A client that owns one of them is told that the stream was taken over.
    """
    _free(names, prefix, place, False, Target(endpoint, model), as_json)


@app.command("park", examples=["instep-client streams park mic-7", "instep-client streams park --prefix lab-"])
def park_command(
    names: Names = [],  # noqa: B006
    prefix: Prefix = None,
    place: Where = None,
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    model: ModelName = "",
    as_json: AsJson = False,
) -> None:
    """Take streams from their clients and leave them parked, for another client to resume.

    A client that owns one of them is told that the stream was taken over. The server keeps a parked stream for
    limits.park_s, and then closes it.
    """
    _free(names, prefix, place, True, Target(endpoint, model), as_json)


def _free(
    names: list[str], prefix: str | None, place: StreamPlace | None, park: bool, target: Target, as_json: bool
) -> None:
    command = partial(streams.free, target, names, prefix, place, park)
    raise typer.Exit(run_undrained(command, Terminal(as_json)))
