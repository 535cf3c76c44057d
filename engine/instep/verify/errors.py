"""Why a recording could not be checked."""

from __future__ import annotations


class CannotVerify(Exception):
    """The check could not be made; the message is a sentence saying why and what to do."""
