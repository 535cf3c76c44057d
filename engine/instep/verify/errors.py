"""Why a recording could not be checked."""

from __future__ import annotations


class CannotVerify(Exception):
    """The check could not be made; the message is a sentence saying why and what to do."""


class Refuted(Exception):
    """A bit differs that was only presumed to be the same: what this machine can do has to be found out."""
