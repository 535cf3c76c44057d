"""The command `ping`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Final

import typer

from instep_client.protocol.errors import ConnectionFailed, Refused
from instep_client.protocol.wire import Code, ServerInfo
from instep_client.replies import ServedModel
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
_GROUPS: Final = {
    "server": r"uptime_s|loop_\w+|connections",
    "frames": r"(frames|received|repeated)_\w+|messages_total",
    "steps": r"(batch|batches|executor|step)_\w+",
    "times": r"\w+_us_p\d+",
    "streams": r"(streams|opened|closed|parked|resumed|hibernated|woken|evicted)_\w+",
    "refused": r"refused_\w+|busy_total|credit_stalls_total",
    "recording": r"recording_\w+|checkpoint_age_s|replay_s",
    "verification": r"(verify|verified)_\w+",
}
"""Numbers of STATISTICS, as regular expressions of their names. Others are for programs."""
_UNITS: Final = {"us": "µs", "s": "s", "bytes": "bytes"}
_MEASURED: Final = ("_us_p50", "_us_p99", "batch_size_mean")
"""Suffixes of numbers that are 0 until something has been measured."""


@app.server_command("ping", examples=["instep ping", "instep ping -e tcp://gpu-1:5757 --all"])
async def ping(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    all: Annotated[bool, typer.Option("--all", help="Also show the counters and times of the model.")] = False,
) -> Exit:
    """Show whether the server is ready, its models, device and exactness, and the round trip.

    The exit status is 0 when it accepts connections, streams and frames, 1 when it answers and is not ready, and 2 when
    nobody answers. A cluster is ready when all its shards are. docs/operations.md explains the numbers as metrics.
    """
    models: list[ServedModel] = []
    numbers: dict[str, float] = {}
    info: ServerInfo | None = None
    round_trip_ms: float | None = None
    why: str | None = None
    try:
        async with connected(target, "ping", terminal, stop, reconnect_s=0.0) as client:
            info = client.info
            round_trip_ms = min([await client.ping() for _ in range(ROUND_TRIPS)]) * 1000
            numbers, models = await client.stats(), await client.list_models()
            if numbers.get("ready") != 1:
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
                "models": [model._asdict() for model in models],
                **({"numbers": numbers} if all else {}),
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
    if not terminal.as_json and len(models) > 1:
        fields = ("name", "features", "outputs", "connections", "streams", "frames")
        terminal.table(
            fields, ((model.name, *(f"{getattr(model, name):,}" for name in fields[1:])) for model in models)
        )
    if not terminal.as_json and all:
        terminal.table(("", "", "", ""), _rows(numbers), slice(2, 3))
    return Exit.OK if why is None else Exit.FOUND_PROBLEMS


def _rows(numbers: Mapping[str, float]) -> Iterator[tuple[str, str, str, str]]:
    """Group, name, value and unit."""
    for group, pattern in _GROUPS.items():
        shown = group
        for name, value in numbers.items():
            if re.fullmatch(pattern, name) and not name.startswith("recent_"):
                words = name.split("_")
                unit = "".join(_UNITS.get(word, "") for word in words)
                yield shown, " ".join(word for word in words if word not in _UNITS), _number(name, value), unit
                shown = ""


def _number(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if value == 0 and name.endswith(_MEASURED):
        return "–"
    if value == int(value):
        return f"{value:,.0f}"
    return three_digits(value) if value >= 1e-3 else f"{value:.3g}"
