"""Front ends: where producers connect. This is the interface between the server's loop and each of them."""

from __future__ import annotations

from typing import Protocol


class CannotListen(Exception):
    """A front end cannot be opened for connections; the message says why, or what to do."""


class Frontend(Protocol):
    """An entrance for producers, as the loop sees it."""

    @property
    def signal_fd(self) -> int | None:
        """Becomes readable when something has arrived; None where the front end wakes the loop itself."""

    @property
    def is_readable(self) -> bool:
        """Whether something has arrived; where nothing has, the next arrival is signalled."""

    def receive(self, budget_ns: int) -> bool:
        """Take what has arrived, for about that long; whether there was anything.

        Frames are submitted to the engine of their model. A request that changes streams is started as a task, and
        nothing more is taken in this turn; the loop receives again when the request has begun. So what came before it
        is admitted before it, and what came after it is taken after it.
        """
