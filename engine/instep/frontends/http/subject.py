"""What the admin server looks at: the interface of the server, as far as HTTP needs it."""

from __future__ import annotations

from typing import Protocol

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
    def services(self) -> list[ModelService]:
        """The models now, the one for connections that name none first."""
