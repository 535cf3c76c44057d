"""The one error of this package, and what others say."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be served; the message is a sentence that names the file or tensor and says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
