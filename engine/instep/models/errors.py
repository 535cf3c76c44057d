"""The one error of this package, and what others say."""

from __future__ import annotations

from pathlib import Path


class ModelError(Exception):
    """A model that cannot be served; the message is a sentence that names the file or tensor and says what to do."""


def no_folder(folder: Path) -> tuple[str, str]:
    """The sentence about a missing model folder, and its cure."""
    return f"there is no model folder {folder}", "correct the path, or make one with `instep model import`"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or else its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
