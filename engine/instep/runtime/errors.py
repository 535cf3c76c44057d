"""What goes wrong with states."""

from __future__ import annotations


class StateLost(Exception):
    """The states of the streams that were stepped can no longer be trusted."""
