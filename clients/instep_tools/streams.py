"""`instep-client streams …`: list and close the streams of a server."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from instep_client.aio import StreamPlace
from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import Code
from instep_tools.command_line import CommandLine
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.terminal import Terminal, progress
from instep_tools.words import counted, three_digits

app: Final = CommandLine(help="List the streams of a server, and close some.")

Prefix = Annotated[str | None, typer.Option(metavar="TEXT", help="Only streams whose names begin with TEXT.")]
Where = Annotated[
    StreamPlace | None,
    typer.Option("--place", metavar="WHERE", help="Only streams that are connected, parked or hibernating."),
]

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
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Show at most N, longest idle first.")] = 50,
) -> Exit:
    """List the server's streams.

    The table shows where each one is (connected, parked or hibernating), its next seq, and how long the server keeps it
    if it stays idle.
    """
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


@app.server_command(
    "close", examples=["instep-client streams close mic-7", "instep-client streams close --place parked"]
)
async def close(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The streams to close.")] = [],  # noqa: B006
    prefix: Prefix = None,
    place: Where = None,
) -> Exit:
    """Close streams by name, or all with a prefix or at a place.

    Their states are lost, and the clients that own them are notified.
    """
    if not names and prefix is None and place is None:
        raise CommandProblem("say which streams: their names, --prefix, or --place")
    closed: list[str] = []
    missing: list[str] = []
    async with connected(target, "streams close", terminal, stop) as client:
        by_name = bool(names)
        if not by_name:
            names = [stream.name for stream in await client.list_streams(prefix or "", place)]
        with progress(terminal.err, "closing", len(names), "streams", lambda: len(closed) + len(missing)):
            for name in names:
                try:
                    await (await client.resume(name, take_over=True)).close()
                    closed.append(name)
                except Refused as refused:
                    if refused.code not in _HAS_ENDED:
                        raise
                    missing.append(name)
    if terminal.as_json:
        terminal.result({"closed": closed, "missing": missing})
    ended = "not there" if by_name else "gone meanwhile"
    gone = f"; {counted(len(missing), 'stream')} {ended}: {', '.join(missing[:5])}" if missing else ""
    good = not (by_name and missing)
    terminal.summary(f"{counted(len(closed), 'stream')} closed{gone}", good=good)
    return Exit.OK if good else Exit.FOUND_PROBLEMS
