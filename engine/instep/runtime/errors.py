"""What goes wrong with states."""

from __future__ import annotations

from instep.core.typing import I64


class StateLost(Exception):
    """The states of some streams can no longer be trusted, or are gone.

    Args:
        message: what happened.
        slots: whose, int64 [N]; None for all that were stepped.
    """

    def __init__(self, message: str, slots: I64 | None = None) -> None:
        super().__init__(message)
        self.slots = slots
