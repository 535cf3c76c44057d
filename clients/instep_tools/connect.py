"""Connecting, as all commands do it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from instep_client.aio import AsyncClient
from instep_tools.pacing import Stop
from instep_tools.terminal import Terminal

PATIENCE_S: Final = 5.0
"""How long a silent server is waited for."""
RECONNECT_S: Final = 30.0
"""For how long another connection is tried for when one is lost."""


@asynccontextmanager
async def connected(
    endpoint: str,
    command: str,
    terminal: Terminal,
    stop: Stop,
    reconnect_s: float = RECONNECT_S,
    park: bool = False,
) -> AsyncIterator[AsyncClient]:
    """A client of the server there, called after the command; it says so when the server takes its time.

    Its streams are closed at the end, or with `park` left to the server to be parked, whatever happens.

    Ctrl-C ends the command at once until there is a connection; from then on it requests a stop.

    Raises:
        ConnectionFailed: nobody answers.
        Refused: the server does not take this client.
    """
    client = AsyncClient(endpoint, f"instep-client {command}", PATIENCE_S, reconnect_s)
    async with terminal.waiting(f"waiting for a server at {endpoint}"):
        await client.connect()
    stop.connected = True
    try:
        yield client
    finally:
        await client.close(park)
