"""The error of this package, and sentences that several modules use."""

from __future__ import annotations

from pathlib import Path


class ModelError(Exception):
    """A model that cannot be served; the message is a sentence that names the file or tensor and says what to do."""


def no_folder(folder: Path) -> tuple[str, str]:
    """The sentence that reports a missing model folder and how to make one."""
    return f"there is no model folder {folder}", "correct the path, or make one with `instep model import`"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
