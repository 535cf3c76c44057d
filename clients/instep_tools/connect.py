"""Connects the commands to a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import ClientClosed
from instep_tools.pacing import LONGEST_NAP_S, Stop

if TYPE_CHECKING:
    from instep_tools.terminal import Terminal  # it imports rich, which processes of a load test do not need

PATIENCE_S: Final = 5.0
"""The time to wait for a silent server."""
RECONNECT_S: Final = 30.0
"""The time to try for another connection after one was lost."""
STOPPED_RECONNECT_S: Final = 1.0
"""The same time once a stop was requested."""


class Target(NamedTuple):
    """The server and model of a command."""

    endpoint: str
    model: str = ""
    """The model's name; empty for the server's default."""

    def client(self, name: str, reconnect_s: float = RECONNECT_S) -> AsyncClient:
        """A client of the target, to be connected."""
        return AsyncClient(self.endpoint, f"instep {name}", PATIENCE_S, reconnect_s, model=self.model)


def leave_warnings_out() -> None:
    """Let the client library log only errors in this process, because commands report delays themselves."""
    logging.getLogger("instep_client").setLevel(logging.ERROR)


@asynccontextmanager
async def connected(
    target: Target,
    command: str,
    terminal: Terminal,
    stop: Stop,
    reconnect_s: float = RECONNECT_S,
    park: bool = False,
) -> AsyncIterator[AsyncClient]:
    """A client of the target server, named after the command, which reports a server that takes long.

    Its streams are closed at the end in any case or, with `park`, left for the server to park.

    Ctrl-C ends the command at once until there is a connection; from then on it requests a stop. After a loss, a
    stopped command waits only a moment for another connection. Then the client is closed, and calls that wait fail with
    ClientClosed; see `may_give_up`.

    Raises:
        ConnectionFailed: nobody answers.
        Refused: the server does not take this client.
    """
    client = target.client(command, reconnect_s)
    async with terminal.waiting(f"waiting for a server at {target.endpoint}"):
        await client.connect()
    stop.connected = True
    watcher = asyncio.create_task(_close_when_stopped(client, stop))
    try:
        yield client
    finally:
        watcher.cancel()
        await client.close(park)


@contextmanager
def may_give_up(stop: Stop) -> Iterator[None]:
    """End the block quietly if the client was closed because the command was stopped without a connection."""
    try:
        yield
    except ClientClosed:
        if not stop.gave_up:
            raise


async def _close_when_stopped(client: AsyncClient, stop: Stop) -> None:
    await stop.wait()
    lost_s = 0.0
    while lost_s < STOPPED_RECONNECT_S:
        await asyncio.sleep(LONGEST_NAP_S)
        lost_s = 0.0 if client.is_connected else lost_s + LONGEST_NAP_S
    stop.gave_up = True
    await client.close()
