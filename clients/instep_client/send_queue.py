"""What one stream handle has to send, in the order in which it was asked for."""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import Any, ClassVar

from instep_client.protocol.errors import StreamEvicted
from instep_client.sleepers import WakingRequest
from instep_client.steps import StepCall
from instep_client.streams import StreamHandle


class TurnRequest(WakingRequest[Any]):
    """A request that waits until everything sent through its handle was answered, and comes before anything later."""

    handle: StreamHandle
    stamp: int
    """When it was queued, on the session's counter."""
    needs_all_awake: ClassVar[bool] = True
    """Whether it is asked only when no stream of its handle hibernates."""

    def streams_ended(self, error: StreamEvicted) -> bool:
        """Streams of its handle have ended before its turn came; whether it is given up, and fails with that error."""
        return True


class Turn(Enum):
    """What a stream handle's next call waits for."""

    IDLE = auto()
    """Its making; or answers, if there is one."""
    IN_LINE = auto()
    ASKING = auto()
    """The reply to a request."""
    WAKING = auto()
    """Streams that hibernate, and were asked for."""
    FULL = auto()
    """That the user takes outputs."""


# To look a member up in its class takes 0.2 µs (Python 3.11), and this is done several times for every frame.
IDLE, IN_LINE, ASKING, WAKING, FULL = Turn


class SendQueue:
    """The calls of one stream handle that were not sent, or not sent completely, in the order they were made."""

    def __init__(self, handle: StreamHandle) -> None:
        self.handle = handle
        self.steps: deque[StepCall] = deque()
        self.requests: deque[TurnRequest] = deque()
        self.turn = IDLE

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self.steps and not self.requests

    def next_request(self) -> TurnRequest | None:
        """The request whose turn it is, if it is not a step's."""
        if not self.requests or (self.steps and self.steps[0].stamp < self.requests[0].stamp):
            return None
        return self.requests[0]
