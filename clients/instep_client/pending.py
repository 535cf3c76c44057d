"""What the session has asked and waits for: numbered requests, outgoing messages, and whom the driver has to wake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from instep_client.arrays import NOBODY, Indices
from instep_client.calls import Call, Request
from instep_client.handles import StreamHandle
from instep_client.protocol import wire
from instep_client.protocol.wire import MAX_BLOCK_STREAMS, MAX_NAME_BYTES, Frame, Kind, Message, ServerInfo

MAX_REPLY_BYTES: Final = 64 * 2**20
"""The largest frame the client lets the server send; requests are cut so that no honest reply is larger."""


def parts(count: int, info: ServerInfo) -> list[Indices]:
    """The numbers below `count`, cut so that the names or states of each part's streams fit into one message."""
    row_bytes = info.state.row_bytes
    stream_bytes = max(MAX_NAME_BYTES + 1, row_bytes)  # a name ends its line
    most = max(1, min(info.max_message_bytes // stream_bytes, MAX_REPLY_BYTES // row_bytes, MAX_BLOCK_STREAMS))
    return [np.arange(start, min(start + most, count)) for start in range(0, count, most)]


class Asked(NamedTuple):
    """A message that waits for its one reply."""

    request: Request[Any]
    part: Indices
    """Which of the request's streams it is about."""


class Pending:
    """Requests of one connection. STEPs are numbered with them, and kept by `InFlight`."""

    def __init__(self) -> None:
        self.unanswered: dict[int, Asked] = {}
        """By number."""
        self.messages: list[Message] = []
        """To be sent, in order."""
        self.woken: list[Call[Any] | StreamHandle] = []
        """Whom the driver has to wake: calls that ended or were sent, and stream handles whose outputs changed."""
        self._last_number = 0
        self._last_taken = 0

    def next_number(self) -> int:
        """The number of the next message; they grow."""
        self._last_number += 1
        return self._last_number

    def ask(
        self, request: Request[Any], *fields: int | str, frames: Sequence[Frame] = (), part: Indices = NOBODY
    ) -> None:
        """Send a message of a request."""
        number = self.next_number()
        self.unanswered[number] = Asked(request, part)
        self.messages.append([wire.pack_header(request.kind, number, *fields), *frames])

    def waits_for(self, reply: Kind) -> bool:
        """Whether any message waits for a reply of this kind."""
        return any(asked.request.reply is reply for asked in self.unanswered.values())

    def under_way(self, reply: Kind) -> dict[int, Asked]:
        """Requests that the driver has taken and the server will answer with this kind, by number."""
        return {
            number: asked
            for number, asked in self.unanswered.items()
            if asked.request.reply is reply and number <= self._last_taken
        }

    def forget(self) -> list[Request[Any]]:
        """The connection is lost: nothing will be answered. What was asked, in order."""
        asked = dict.fromkeys(each.request for each in self.unanswered.values())
        self.unanswered.clear()
        self.messages.clear()
        return list(asked)

    def take_messages(self) -> list[Message]:
        """The messages to be sent, in order."""
        messages, self.messages = self.messages, []
        self._last_taken = self._last_number
        return messages

    def take_woken(self) -> list[Call[Any] | StreamHandle]:
        """Whom the driver has to wake."""
        woken, self.woken = self.woken, []
        return woken
