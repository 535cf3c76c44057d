"""Streams that ask for everything twice: over the connection that gave it, and over the next one.

Their client is written by hand, since the library's never asks for what it was given.
"""

from __future__ import annotations

import numpy as np
import zmq

from instep.core.typing import F32
from instep_client.protocol.wire import Code, Kind
from tests.chaos.load import Kept
from tests.support.keys import Curve
from tests.support.models import SMALL
from tests.support.raw import RawClient, Reply

STREAMS = 4
_MOST_KEPT = 6
"""Outputs of each stream that it has and does not acknowledge."""
_OPTIONS = {zmq.PROBE_ROUTER: 1, zmq.IMMEDIATE: 1, zmq.RECONNECT_IVL: 50}
"""Each connection is announced by HELLO_FIRST, as protocol.md says."""


class _Lost(Exception):
    """There is another connection, or none."""


class Repeater:
    """A few streams in lockstep, one frame a message.

    Args:
        seed: decides what is sent and what is asked for again.
        name: what the streams' names begin with.
        curve: its keys; None for a server without.
    """

    def __init__(self, seed: int, name: str = "again", curve: Curve | None = None) -> None:
        self._curve = curve
        self._rng = np.random.default_rng(seed)
        self._stops = False
        self._epochs: list[int] = []
        self._acked = 0
        self._takes_over = False
        self.kept = Kept([f"{name}-{number}" for number in range(STREAMS)])
        self.repeated = 0
        """Outputs that came again."""
        self.differing = 0
        """Those of them that were others then."""
        self.lost = 0
        """Frames that were answered and that the server did not have when the streams were resumed."""

    async def open(self, endpoint: str) -> None:
        """Open the streams."""
        async with RawClient(endpoint, curve=self._curve) as client:
            await client.hello()
            self._epochs = (await client.open(*self.kept.names)).epochs()

    async def run(self, endpoint: str) -> None:
        """Send until `stop`, then close; a lost connection is followed by another."""
        while self.kept.finals is None:
            try:
                async with RawClient(endpoint, options=_OPTIONS, curve=self._curve) as client:
                    await self._live(client)
            except _Lost:
                continue

    def stop(self) -> None:
        """Let it end with the step it is in."""
        self._stops = True

    async def _live(self, client: RawClient) -> None:
        """One connection, until it is lost or everything is done."""
        announced = await client.receive()
        assert announced.code is Code.HELLO_FIRST
        await self._ask(client, client.hello_message(), Kind.WELCOME)
        names, have = self.kept.names, [self._acked] * STREAMS
        # Else its epoch counts, also after a resume whose answer was lost, unless that took the streams over.
        self._takes_over = self._takes_over or bool(self._rng.random() < 0.5)
        resume = client.resume_message(names, have, self._epochs, take_over=self._takes_over)
        resumed = await self._ask(client, resume, Kind.RESUMED)
        self._takes_over = False
        assert resumed.failures() == []
        self._epochs = resumed.epochs()
        self.lost += sum(max(0, len(self.kept.got) - seq) for seq in resumed.seqs())
        handles = resumed.handles()
        if len(self.kept.sent) > self._acked:
            await self._step(client, handles)
        while not self._stops:
            if len(self.kept.got) - self._acked >= self._rng.integers(1, _MOST_KEPT):
                self._acked = int(self._rng.integers(self._acked, len(self.kept.got) + 1))
            if self._rng.random() < 0.7 or self._acked == len(self.kept.got):
                x = self._rng.standard_normal((1, STREAMS, SMALL.description.features)).astype(np.float32)
                self.kept.sent.append(x)
            await self._step(client, handles)
        closed = await self._ask(client, client.close_message(handles), Kind.CLOSED)
        self.kept.finals = closed.floats().reshape(STREAMS, *SMALL.description.state.leaves[0].shape)

    async def _step(self, client: RawClient, handles: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        """Send all frames that are not acknowledged; what was answered before must come again."""
        x = np.concatenate(self.kept.sent[self._acked :])
        acked = [self._acked] * STREAMS
        reply = await self._ask(client, client.step_message(handles, acked, x, acked), Kind.STEPPED)
        assert reply.failures() == []
        y: F32 = reply.floats().reshape(len(x), STREAMS, -1)
        former = self.kept.got[self._acked :]
        for known, now in zip(former, y, strict=False):
            self.repeated += STREAMS
            self.differing += int((known[0].view(np.int32) != now.view(np.int32)).any(axis=1).sum())
        self.kept.got += [row[None].copy() for row in y[len(former) :]]

    async def _ask(self, client: RawClient, message: list[bytes], kind: Kind) -> Reply:
        reply = await client.ask(*message)
        while reply.kind is not kind and reply.kind in (Kind.WELCOME, Kind.MOVED):  # another version goes on
            reply = await client.receive()
        if reply.kind is Kind.ERROR and reply.code is Code.HELLO_FIRST:
            raise _Lost
        assert reply.kind is kind, reply.header
        return reply
