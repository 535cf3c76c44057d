"""`instep-client streams …`: what is open on a server, and making room there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from instep_client.aio import AsyncClient, StreamPlace
from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import Code
from instep_tools.command_line import CommandLine
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.terminal import Terminal, progress
from instep_tools.words import counted, three_digits

app: Final = CommandLine(help="List the streams of a server, and close or park some.")

Prefix = Annotated[str | None, typer.Option(metavar="TEXT", help="Only streams whose names begin with TEXT.")]
Where = Annotated[
    StreamPlace | None,
    typer.Option("--place", help="Only streams of connected clients, parked ones, or hibernating ones."),
]
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="The streams.")]

Freeing = Callable[[Target, Terminal, Stop, "Chosen"], Awaitable[Exit]]

_HAS_ENDED: Final = frozenset({Code.UNKNOWN_STREAM, Code.EXPIRED})


@app.server_command(
    "list", examples=["instep-client streams list", "instep-client streams list --prefix mic- --place parked"]
)
async def show(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    prefix: Prefix = None,
    place: Where = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many, longest idle first.")] = 50,
) -> Exit:
    """Show the server's streams: the place of each, its next seq, and how long the server keeps it if it stays idle."""
    async with connected(target, "streams", terminal, stop) as client:
        found, model = await client.list_streams(prefix or "", place), client.info.model
    found.sort(key=lambda stream: -stream.idle_s)
    shown = found[:limit]
    if terminal.as_json:
        terminal.result({"model": model, "streams": [stream._asdict() for stream in shown], "count": len(found)})
        return Exit.OK
    if found:
        rows = (
            (
                stream.name,
                stream.place,
                "–" if stream.next_seq is None else f"{stream.next_seq:,}",
                f"{stream.pending:,}",
                three_digits(stream.idle_s),
                "never" if stream.expires_in_s is None else three_digits(stream.expires_in_s),
            )
            for stream in shown
        )
        terminal.table(("name", "where", "next seq", "pending", "idle s", "expires in s"), rows, slice(2, None))
    left_out = f"; {len(found) - limit:,} more are not shown (--limit)" if len(found) > limit else ""
    terminal.summary(f"{counted(len(found), 'stream')} of {model}{left_out}")
    return Exit.OK


@dataclass(frozen=True, slots=True)
class Chosen:
    """Streams by name or, without any, all that a list with this prefix and place shows."""

    names: Sequence[str]
    prefix: str | None
    place: StreamPlace | None


def _of_chosen(command: Freeing) -> Callable[..., Awaitable[Exit]]:
    """The command with the argument and the options that choose streams."""

    async def run(
        target: Target,
        terminal: Terminal,
        stop: Stop,
        names: Names = [],  # noqa: B006
        prefix: Prefix = None,
        place: Where = None,
    ) -> Exit:
        return await command(target, terminal, stop, Chosen(names, prefix, place))

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@app.server_command(
    "close", examples=["instep-client streams close mic-7", "instep-client streams close --place parked"]
)
@_of_chosen
async def close(target: Target, terminal: Terminal, stop: Stop, chosen: Chosen) -> Exit:
    """Close streams by name, or all with a prefix or at a place.

    Their states are lost. A client that owns one of them is told that the stream was taken over.
    """
    return await _free(target, terminal, stop, chosen, park=False)


@app.server_command("park", examples=["instep-client streams park mic-7", "instep-client streams park --prefix lab-"])
@_of_chosen
async def park(target: Target, terminal: Terminal, stop: Stop, chosen: Chosen) -> Exit:
    """Take streams from their clients and leave them parked, for another client to resume.

    A client that owns one of them is told that the stream was taken over. The server keeps a parked stream for
    limits.park_s, and then closes it.
    """
    return await _free(target, terminal, stop, chosen, park=True)


async def _free(target: Target, terminal: Terminal, stop: Stop, chosen: Chosen, *, park: bool) -> Exit:
    """Take streams from their owners, who are told, and close or park them."""
    verb, done = ("park", "parked") if park else ("close", "closed")
    names = chosen.names
    if not names and chosen.prefix is None and chosen.place is None:
        raise CommandProblem("say which streams: their names, --prefix, or --place")
    taken: list[str] = []
    missing: list[str] = []
    async with connected(target, f"streams {verb}", terminal, stop, park=park) as client:
        if park and client.info.park_s <= 0:
            raise CommandProblem(
                f"the server at {target.endpoint} parks no streams (its limits.park_s is 0): close them"
            )
        if not names:
            names = [stream.name for stream in await client.list_streams(chosen.prefix or "", chosen.place)]
        title = "parking" if park else "closing"
        async with progress(terminal.err, title, len(names), "streams", lambda: len(taken) + len(missing)):
            for name in names:
                (taken if await _take(client, name, park) else missing).append(name)
        kept = f", and kept for {client.info.park_s:g} s" if park and taken else ""
    if terminal.as_json:
        terminal.result({done: taken, "missing": missing})
    gone = f"; {counted(len(missing), 'stream')} not there: {', '.join(missing[:5])}" if missing else ""
    terminal.summary(f"{counted(len(taken), 'stream')} {done}{kept}{gone}", good=not missing)
    return Exit.FOUND_PROBLEMS if missing else Exit.OK


async def _take(client: AsyncClient, name: str, park: bool) -> bool:
    """Whether the stream was there; to be parked, it is left to this connection's end."""
    try:
        stream = await client.resume(name, take_over=True)
        if not park:
            await stream.close()
    except Refused as refused:
        if refused.code in _HAS_ENDED:
            return False
        raise
    return True
