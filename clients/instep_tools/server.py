"""The commands `ping`, `models` and `stats`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Final

from instep_client.protocol.errors import ConnectionFailed, Refused
from instep_client.protocol.wire import Code, ServerInfo
from instep_tools.command_line import CommandLine
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.terminal import Terminal
from instep_tools.words import three_digits

app: Final = CommandLine()

ROUND_TRIPS: Final = 5
"""The round trips of a ping, of which the best counts; the first one warms up."""

_NOT_NOW: Final = frozenset({Code.SHUTTING_DOWN, Code.BUSY})
"""Codes with which a running server refuses connections."""
_MEASURED: Final = ("_us_p50", "_us_p99", "batch_size_mean")
"""Suffixes of numbers that are 0 until something has been measured."""


@app.server_command("ping", examples=["instep ping", "instep ping -e tcp://gpu-1:5757 --json"])
async def ping(target: Target, terminal: Terminal, stop: Stop) -> Exit:
    """Show whether the server is ready, its model, device and exactness, and the round trip.

    The exit status is 0 when it accepts connections, streams and frames, 1 when it answers and is not ready, and 2 when
    nobody answers. A cluster is ready when all its shards are.
    """
    info: ServerInfo | None = None
    round_trip_ms: float | None = None
    why: str | None = None
    try:
        async with connected(target, "ping", terminal, stop, reconnect_s=0.0) as client:
            info = client.info
            round_trip_ms = min([await client.ping() for _ in range(ROUND_TRIPS)]) * 1000
            if (await client.stats()).get("ready") != 1:
                why = "the server takes nothing new: it is shutting down, or its recording has failed"
    except Refused as refused:
        if refused.code not in _NOT_NOW:
            raise
        why = refused.sentence
    except ConnectionFailed as failed:
        if info is None or info.shards == 1:
            raise
        why = str(failed)
    if terminal.as_json:
        terminal.result(
            {
                "endpoint": target.endpoint,
                "ready": why is None,
                "why": why,
                "round_trip_ms": round_trip_ms,
                "server": None if info is None else asdict(info) | {"state": info.state.encode()},
            }
        )
    elif why is not None or info is None:
        terminal.say(f"{target.endpoint}: not ready: {why}")
    else:
        terminal.say(
            f"{target.endpoint}: ready, model {info.model} "
            f"({info.features} to {info.outputs}, {info.fingerprint[:12]}) on {info.device}, "
            f"{info.exactness} ({info.arithmetic}), {f'{info.shards} shards, ' if info.shards > 1 else ''}"
            f"round trip {round_trip_ms:.3f} ms"
        )
    return Exit.OK if why is None else Exit.FOUND_PROBLEMS


@app.server_command("models", examples=["instep models", "instep models --json"], names_model=False)
async def models(target: Target, terminal: Terminal, stop: Stop) -> Exit:
    """List the server's models; the first one is the default."""
    async with connected(target, "models", terminal, stop, reconnect_s=0.0) as client:
        found = await client.list_models()
    if terminal.as_json:
        terminal.result({"models": [model._asdict() for model in found]})
        return Exit.OK
    fields = ("name", "features", "outputs", "connections", "streams", "frames")
    terminal.table(fields, ((model.name, *(f"{getattr(model, name):,}" for name in fields[1:])) for model in found))
    return Exit.OK


@app.server_command("stats", examples=["instep stats", "instep stats --json"])
async def stats(target: Target, terminal: Terminal, stop: Stop) -> Exit:
    """Show the counters and times of a model: streams, frames and batches.

    docs/operations.md explains them as metrics.
    """
    async with connected(target, "stats", terminal, stop, reconnect_s=0.0) as client:
        numbers, model = await client.stats(), client.info.model
    if terminal.as_json:
        terminal.result({"model": model, **numbers})
        return Exit.OK
    numbers.pop("recent_time_s", None)  # when the newest row of the history was made: for programs
    terminal.table(("", ""), [("model", model), *((name, _number(name, each)) for name, each in numbers.items())])
    return Exit.OK


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if value == 0 and name.endswith(_MEASURED):
        return "–"
    if value == int(value):
        return f"{value:,.0f}"
    return three_digits(value) if value >= 1e-3 else f"{value:.3g}"
