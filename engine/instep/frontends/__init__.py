"""Front ends accept producers. This is the interface between the server and each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from instep.frontends.models import Served
    from instep.security.principals import Principals


class CannotListen(Exception):
    """A front end cannot listen; the message gives the reason or the cure."""


class Frontend(Protocol):
    """Accepts producers, for the models in `frontends.models.Models`."""

    is_paused: bool
    """While True, nothing is received, because streams are being moved."""

    @property
    def endpoint(self) -> str:
        """The address at which producers reach it."""

    @property
    def signal_fd(self) -> int | None:
        """A file that becomes readable when something has arrived; None if the front end wakes the loop itself."""

    @property
    def is_readable(self) -> bool:
        """Whether something has arrived; if not, the next arrival is signalled."""

    def receive(self, budget_ns: int) -> bool:
        """Receive messages for about `budget_ns`; return whether there were any.

        Frames are submitted to their model's engine. A request that changes streams is started as a task, and nothing
        more is received in this turn; the loop receives again when the request has begun. So earlier messages are
        admitted before the request, and later ones are received after it.
        """

    def tick(self, now_ns: int) -> None:
        """Do periodic work, such as finding producers that have died."""

    def added(self, served: Served) -> None:
        """Begin to serve a model, or another version under a model's name."""

    def removed(self, served: Served, reason: str) -> None:
        """Stop serving a model: notify its connections with the reason, and end them."""

    def moved(self, former: Served, served: Served) -> None:
        """Hand the connections of a model, whose streams have moved, to another version."""

    def admit(self, principals: Principals) -> int:
        """Let in who these are, and end the connections of all others; return the number of those."""

    def used(self) -> dict[str, dict[str, float]]:
        """What principals with keys use, by name: their numbers by name."""

    def drain(self, *, asks: bool) -> bool:
        """Whether all delivered replies have been read, as far as known; with `asks`, ask the producers."""

    def say_goodbye(self, reason: str) -> None:
        """Notify all producers that the server ends."""

    def close(self) -> None:
        """Close the transport."""
