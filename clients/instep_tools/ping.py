"""`instep-client ping`: is it there and ready, what does it run, and how long does a message take?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import Code, ServerInfo
from instep_tools.connect import Target, connected
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.terminal import Terminal

ROUND_TRIPS = 5
"""The first one still warms things up; the best one counts."""

_NOT_NOW: Final = frozenset({Code.SHUTTING_DOWN, Code.BUSY})
"""Why a server that is there takes no connection."""


async def ping(target: Target, terminal: Terminal, stop: Stop) -> Exit:
    """One line: whether it takes new work, model, device, exactness, round trip.

    Returns:
        OK when it is ready, FOUND_PROBLEMS when it answers and is not.

    Raises:
        ConnectionFailed: nobody answers.
        Refused: the server takes no client like this one, at no time.
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
        terminal.out.print(f"{target.endpoint}: not ready: {why}", markup=False)
    else:
        terminal.out.print(
            f"{target.endpoint}: ready, model {info.model} "
            f"({info.features} to {info.outputs}, {info.fingerprint[:12]}) on {info.device}, {info.exactness}, "
            f"round trip {round_trip_ms:.3f} ms",
            markup=False,
        )
    return Exit.OK if why is None else Exit.FOUND_PROBLEMS
