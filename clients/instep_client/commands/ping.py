"""`instep-client ping`: is it there, what does it run, and how long does a message take?"""

from __future__ import annotations

from dataclasses import asdict

from instep_client.commands.connect import connected
from instep_client.commands.pacing import Stop
from instep_client.commands.problems import Exit
from instep_client.commands.terminal import Terminal

ROUND_TRIPS = 5
"""The first one still warms things up; the best one counts."""


async def ping(endpoint: str, terminal: Terminal, stop: Stop) -> Exit:
    """One line: model, device, exactness, round trip.

    Raises:
        ConnectionFailed: nobody answers.
    """
    async with connected(endpoint, "ping", terminal, stop) as client:
        info = client.info
        round_trip_ms = min([await client.ping() for _ in range(ROUND_TRIPS)]) * 1000
    if terminal.as_json:
        terminal.result({"endpoint": endpoint, "round_trip_ms": round_trip_ms, "server": asdict(info)})
    else:
        terminal.out.print(
            f"{endpoint}: model {info.model} ({info.features} to {info.outputs}, {info.fingerprint[:12]}) "
            f"on {info.device}, {info.exactness}, round trip {round_trip_ms:.3f} ms",
            markup=False,
        )
    return Exit.OK
