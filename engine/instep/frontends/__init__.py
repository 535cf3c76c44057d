"""Front ends: where producers connect. This is the interface between the server and each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from instep.frontends.models import Served


class CannotListen(Exception):
    """A front end cannot be opened for connections; the message says why, or what to do."""


class Frontend(Protocol):
    """Where producers connect, to models that they find in `frontends.models.Models`."""

    is_paused: bool
    """While True, nothing is received: streams are being moved."""

    @property
    def endpoint(self) -> str:
        """Where producers can reach it."""

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

    def tick(self, now_ns: int) -> None:
        """Do what is due now and then, as finding producers that have died."""

    def added(self, served: Served) -> None:
        """Another model is served, or a version of one under its name."""

    def removed(self, served: Served, reason: str) -> None:
        """A model is served no longer: tell its connections why, and end them."""

    def moved(self, former: Served, served: Served) -> None:
        """The streams of a model, and so its connections, belong to another version now."""

    def drain(self, *, asks: bool) -> bool:
        """Whether everything that was delivered has been read, as far as that is known; `asks` producers about it."""

    def say_goodbye(self, reason: str) -> None:
        """Tell all producers that the server ends."""

    def close(self) -> None:
        """Let go of the transport."""
