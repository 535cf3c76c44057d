"""`instep-client streams`, `models` and `stats`: what is open on a server, and making room there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from instep_client.aio import AsyncClient, StreamPlace
from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import Code
from instep_client.replies import ListedStream
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.terminal import Terminal
from instep_tools.words import counted, three_digits

_HAS_ENDED: Final = frozenset({Code.UNKNOWN_STREAM, Code.EXPIRED})
_MEASURED: Final = ("_us_p50", "_us_p99", "batch_size_mean", "batch_fill")
"""How the numbers end that are more than 0 where there was anything to measure."""


async def show(
    target: Target, prefix: str, place: StreamPlace | None, most: int, terminal: Terminal, stop: Stop
) -> Exit:
    """List streams, those first that have done nothing for longest."""
    async with connected(target, "streams", terminal, stop) as client:
        found, model = await client.list_streams(prefix, place), client.info.model
    found.sort(key=lambda stream: -stream.idle_s)
    if terminal.as_json:
        shown = [stream._asdict() for stream in found[:most]]
        terminal.result({"model": model, "streams": shown, "count": len(found)})
        return Exit.OK
    if found:
        terminal.out.print(_table(found[:most]))
    left_out = f"; {len(found) - most:,} more are not shown (--limit)" if len(found) > most else ""
    terminal.summary(f"{counted(len(found), 'stream')} of {model}{left_out}")
    return Exit.OK


def _table(streams: Sequence[ListedStream]) -> Table:
    rows = Table("name", "where", "next seq", "pending", "idle s", "expires in s", box=None, pad_edge=False)
    for column in rows.columns[2:]:
        column.justify = "right"
    for stream in streams:
        rows.add_row(
            stream.name,
            stream.place,
            "–" if stream.next_seq is None else f"{stream.next_seq:,}",
            f"{stream.pending:,}",
            three_digits(stream.idle_s),
            "never" if stream.expires_in_s is None else three_digits(stream.expires_in_s),
        )
    return rows


async def free(
    target: Target,
    names: Sequence[str],
    prefix: str | None,
    place: StreamPlace | None,
    park: bool,
    terminal: Terminal,
    stop: Stop,
) -> Exit:
    """Take streams from their owners, who are told, and close or park them: by name, or all that a list shows.

    Raises:
        CommandProblem: when it is not said which, or the server parks no streams.
    """
    verb, done = ("park", "parked") if park else ("close", "closed")
    if not names and prefix is None and place is None:
        raise CommandProblem("say which streams: their names, --prefix, or --place")
    taken: list[str] = []
    missing: list[str] = []
    async with connected(target, f"streams {verb}", terminal, stop, park=park) as client:
        if park and client.info.park_s <= 0:
            raise CommandProblem(
                f"the server at {target.endpoint} parks no streams (its limits.park_s is 0): close them"
            )
        if not names:
            names = [stream.name for stream in await client.list_streams(prefix or "", place)]
        count = [0]
        async with terminal.progress("parking" if park else "closing", len(names), "streams", lambda: count[0]):
            for name in names:
                (taken if await _take(client, name, park) else missing).append(name)
                count[0] += 1
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


async def stats(target: Target, terminal: Terminal, stop: Stop) -> Exit:
    """Show the numbers of a model."""
    async with connected(target, "stats", terminal, stop) as client:
        numbers, model = await client.stats(), client.info.model
    if terminal.as_json:
        terminal.result({"model": model, **numbers})
        return Exit.OK
    rows = Table("", "", box=None, pad_edge=False, show_header=False)
    rows.columns[1].justify = "right"
    rows.add_row("model", escape(model))
    for name, value in numbers.items():
        if name != "recent_time_s":  # when the newest row of the history was made: for programs
            rows.add_row(name, _number(name, value))
    terminal.out.print(rows)
    return Exit.OK


async def models(target: Target, terminal: Terminal, stop: Stop) -> Exit:
    """List the models of a server, the default one first."""
    async with connected(target, "models", terminal, stop) as client:
        found = await client.list_models()
    if terminal.as_json:
        terminal.result({"models": [model._asdict() for model in found]})
        return Exit.OK
    rows = Table("name", "features", "outputs", "connections", "streams", "frames", box=None, pad_edge=False)
    for column in rows.columns[1:]:
        column.justify = "right"
    for model in found:
        numbers = (model.features, model.outputs, model.connections, model.streams, model.frames)
        rows.add_row(escape(model.name), *(f"{number:,}" for number in numbers))
    terminal.out.print(rows)
    return Exit.OK


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if value == 0 and name.endswith(_MEASURED):
        return "–"
    if value == int(value):
        return f"{value:,.0f}"
    return three_digits(value) if value >= 1e-3 else f"{value:.3g}"
