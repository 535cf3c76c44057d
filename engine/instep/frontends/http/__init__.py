"""The admin server: what streams and models do, over HTTP. It only reads.

`admin` holds the socket and the connections, `security` decides who is answered, `app` has the paths, and each kind of
answer is in a file of its own. `Subject` is all that it knows of the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from instep.streaming.service import ModelService


class Subject(Protocol):
    """A server, as it is shown."""

    @property
    def endpoint(self) -> str:
        """The ZeroMQ endpoint."""

    @property
    def is_draining(self) -> bool:
        """Whether it was told to end."""

    @property
    def outdated(self) -> str:
        """Why what runs is not what the configuration says; empty where it is."""

    @property
    def services(self) -> list[ModelService]:
        """The models now, the one for connections that name none first."""
