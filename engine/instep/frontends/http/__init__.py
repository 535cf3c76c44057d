"""The admin server: shows streams and models over HTTP. It only reads.

`admin` has the socket and the connections, `security` decides which requests are answered, and `app` has the paths.
`WatchedServer` is the only interface to the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from instep.streaming.service import ModelService


class WatchedServer(Protocol):
    """The parts of a server that are shown."""

    @property
    def endpoint(self) -> str:
        """The ZeroMQ endpoint."""

    @property
    def is_draining(self) -> bool:
        """Whether the server has been asked to end."""

    @property
    def outdated(self) -> str:
        """The reason why the running models differ from the configuration; empty if they do not."""

    @property
    def services(self) -> list[ModelService]:
        """The current models, the default one first."""

    def used(self) -> dict[str, dict[str, float]]:
        """The usage of each principal, by name; see `Frontend.used`."""
