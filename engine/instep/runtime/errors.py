"""Errors of states."""

from __future__ import annotations


class StateLost(Exception):
    """The states of the streams that were stepped can no longer be trusted."""
