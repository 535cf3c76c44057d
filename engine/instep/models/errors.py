"""The error of this package, and sentences that several modules use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

DESCRIPTION_FILE: Final = "model.yaml"


class ModelError(Exception):
    """A model that cannot be served; the message is a sentence that names the file or tensor and says what to do."""


def no_folder(folder: Path) -> tuple[str, str] | None:
    """Return what is wrong with a path that holds no model folder, and the cure; None if there is a description."""
    try:
        os.stat(folder / DESCRIPTION_FILE)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if not os.path.exists(folder):
            return f"there is no model folder {folder}", "correct the path, or make one with `instep model import`"
        return f"{folder} is not a model folder: there is no {DESCRIPTION_FILE} in it", (
            "name a folder, which instep.models.save_model or export_step makes of a module, and "
            "`instep model import` of weights or an ONNX graph"
        )
    except OSError as error:
        return f"cannot read the model folder {folder}: {error.strerror}", "let this user read it, or name another"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def in_line(error: Exception) -> str:
    """Where PyYAML found an error, without its words, because they quote a file that may be another one."""
    mark = getattr(error, "problem_mark", None)
    return f": there is an error in line {mark.line + 1}" if mark is not None else ""
