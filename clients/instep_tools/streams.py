"""`instep streams …`: list the streams of a server, and close or park some."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

import typer

from instep_client.aio import AsyncClient, StreamPlace
from instep_client.protocol.wire import shard_of
from instep_client.replies import ListedStream
from instep_tools.command_line import CommandLine, PlainCommands
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.terminal import Terminal
from instep_tools.words import counted, three_digits


class _ListsByDefault(PlainCommands):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_list = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        return super().parse_args(ctx, ["list", *args] if is_list else args)


app: Final = CommandLine(cls=_ListsByDefault, help="List the streams of a server, and close or park some.")

Pattern = Annotated[
    str | None, typer.Option("--streams", metavar="PATTERN", help="Only streams whose names match, as in 'mic-*'.")
]
Where = Annotated[
    StreamPlace | None,
    typer.Option("--place", metavar="WHERE", help="Only streams that are connected, parked or hibernating."),
]
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="The streams.")]


@app.server_command("list", examples=["instep streams list", "instep streams list --streams 'mic-*' --place parked"])
async def show(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    pattern: Pattern = None,
    place: Where = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Show at most N, longest idle first.")] = 50,
) -> Exit:
    """List the server's streams.

    The table shows where each one is (connected, parked or hibernating), its next seq, and how long the server keeps it
    if it stays idle; of a cluster also its shard.
    """
    async with connected(target, "streams", terminal, stop, reconnect_s=0.0) as client:
        found, info = await _matching(client, pattern, place), client.info
    found.sort(key=lambda stream: -stream.idle_s)
    shown = found[:limit]
    if terminal.as_json:
        terminal.result({"model": info.model, "streams": [stream._asdict() for stream in shown], "count": len(found)})
        return Exit.OK
    if found:
        columns = ("name", "where", "next seq", "pending", "idle s", "expires in s", "shard")[: 6 + (info.shards > 1)]
        rows = (
            (
                stream.name,
                stream.place,
                "–" if stream.next_seq is None else f"{stream.next_seq:,}",
                f"{stream.pending:,}",
                three_digits(stream.idle_s),
                "never" if stream.expires_in_s is None else three_digits(stream.expires_in_s),
                f"{shard_of(stream.name, info.shards)}",
            )[: len(columns)]
            for stream in shown
        )
        terminal.table(columns, rows, slice(2, None))
    left_out = f"; {len(found) - limit:,} more are not shown (--limit)" if len(found) > limit else ""
    terminal.summary(f"{counted(len(found), 'stream')} of {info.model}{left_out}")
    return Exit.OK


@app.server_command("close", examples=["instep streams close mic-7", "instep streams close --place parked"])
async def close(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The streams.")] = [],  # noqa: B006
    pattern: Pattern = None,
    place: Where = None,
    park: Annotated[bool, typer.Option("--park", help="Take them from their clients, and let them wait.")] = False,
) -> Exit:
    """Close streams by name, or all that match a pattern or are at a place.

    Their states are lost. With --park, streams keep them and wait to be resumed. Their clients are notified.
    At a server with keys, only operators may do so.
    """
    if not names and pattern is None and place is None:
        raise CommandProblem("say which streams: their names, --streams, or --place")
    if names and (pattern is not None or place is not None):
        raise CommandProblem("give names, or --streams and --place, not both")
    async with connected(target, "streams", terminal, stop, reconnect_s=0.0) as client:
        by_name = bool(names)
        if not by_name:
            names = [stream.name for stream in await _matching(client, pattern, place)]
        missing = await client.remove_streams(names, park) if names else []
    removed, done = [name for name in names if name not in set(missing)], "parked" if park else "closed"
    if terminal.as_json:
        terminal.result({done: removed, "missing": missing})
    ended = "not there" if by_name else "gone meanwhile"
    gone = f"; {counted(len(missing), 'stream')} {ended}: {', '.join(missing[:5])}" if missing else ""
    good = not (by_name and missing)
    terminal.summary(f"{counted(len(removed), 'stream')} {done}{gone}", good=good)
    return Exit.OK if good else Exit.FOUND_PROBLEMS


async def _matching(client: AsyncClient, pattern: str | None, place: StreamPlace | None) -> list[ListedStream]:
    if pattern is None:
        return await client.list_streams(place=place)
    prefix = re.split(r"[*?[]", pattern)[0]  # the server finds these
    return [stream for stream in await client.list_streams(prefix, place) if fnmatchcase(stream.name, pattern)]
