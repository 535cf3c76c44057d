"""Outgoing messages: numbered requests, the subject of each, and the calls that the driver has to wake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from instep_client.arrays import Indices
from instep_client.blocks import StepBlock
from instep_client.calls import Call
from instep_client.protocol import step_messages, wire
from instep_client.protocol.wire import MAX_BLOCK_STREAMS, Frame, Kind, Message
from instep_client.streams import StreamHandle

MAX_REPLY_BYTES: Final = 64 * 2**20
"""The largest frame the client lets the server send; requests are cut so that no honest reply is larger."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that waits for its one reply."""

    kind: Kind
    what: Call[Any] | StepBlock | None
    """The call or block that it belongs to; None when nobody waits."""
    part: Indices | None = None
    """Which of the call's streams it is about, when it is about streams."""


class Outbox:
    """Requests of one connection."""

    def __init__(self) -> None:
        self.unanswered: dict[int, Asked] = {}
        """By request number."""
        self.messages: list[Message] = []
        """To be sent, in order."""
        self.woken: list[Call[Any] | StreamHandle] = []
        """Calls that ended or were sent, and stream handles whose outputs changed."""
        self._last_request = 0

    def ask(
        self,
        kind: Kind,
        what: Call[Any] | None,
        *fields: int | str,
        frames: Sequence[Frame] = (),
        part: Indices | None = None,
    ) -> int:
        """Send a request other than STEP; its number."""
        self._last_request += 1
        self.unanswered[self._last_request] = Asked(kind, what, part)
        self.messages.append([wire.pack_header(kind, self._last_request, *fields), *frames])
        return self._last_request

    def step(self, block: StepBlock) -> int:
        """Send a STEP; its number."""
        self._last_request += 1
        self.unanswered[self._last_request] = Asked(Kind.STEP, block)
        timesteps, _, features = block.x.shape
        header = step_messages.pack_step(self._last_request, timesteps, features, block.columns.tobytes())
        self.messages.append([header, wire.raw(block.x)])
        return self._last_request

    def forget(self) -> list[Asked]:
        """The connection is lost: nothing of what was asked will be answered; what that was, in order."""
        asked = list(self.unanswered.values())
        self.unanswered.clear()
        self.messages.clear()
        return asked

    def answer_ping(self, number: int) -> None:
        """Tell the server, which asked, that we are here and have read everything up to its PING."""
        self.messages.append([wire.pack_header(Kind.PONG, number)])

    def wake(self, whom: Call[Any] | StreamHandle) -> None:
        """Tell the driver that a call ended or was sent, or that a stream handle's outputs changed."""
        self.woken.append(whom)


def parts(count: int, most: int) -> list[Indices]:
    """The numbers below `count` in parts of at most `most`, and of what one message may carry."""
    most = max(1, min(most, MAX_BLOCK_STREAMS))
    return [np.arange(start, min(start + most, count)) for start in range(0, count, most)]
