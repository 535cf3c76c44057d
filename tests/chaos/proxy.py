"""A relay that breaks connections in the middle of a message and lets others wait."""

from __future__ import annotations

import asyncio
import random

from tests.support.relay import Link, Relay

_MOST_CHUNKS = 60
"""Chunks until a connection breaks, at most; the first few are ZeroMQ's greeting, HELLO and RESUME."""
_STALLS = 0.01
"""How many of the chunks wait."""
_LONGEST_STALL_S = 0.05


class Proxy(Relay):
    """Forwards to one endpoint; from `misbehave` to `behave` it resets and stalls at random.

    Args:
        target: `tcp://HOST:PORT` of the server.
        random_: decides what happens when.
    """

    def __init__(self, target: str, random_: random.Random) -> None:
        super().__init__(target)
        self._random = random_
        self._misbehaves = False
        self._patience: dict[Link, int] = {}
        self.resets = 0
        """Connections broken so far."""

    def misbehave(self) -> None:
        """Break every connection after some chunks."""
        self._misbehaves = True

    def behave(self) -> None:
        """Forward everything from now on."""
        self._misbehaves = False

    async def forward(self, chunk: bytes, sink: asyncio.StreamWriter, link: Link) -> None:
        if self._misbehaves:
            patience = self._patience.pop(link, None)
            if patience is None:
                patience = self._random.randrange(_MOST_CHUNKS)
            if patience == 0:
                sink.write(chunk[: self._random.randrange(len(chunk))])
                self.resets += 1
                link.cut()
                return
            self._patience[link] = patience - 1
            if self._random.random() < _STALLS:
                await asyncio.sleep(self._random.uniform(0, _LONGEST_STALL_S))
        await super().forward(chunk, sink, link)
