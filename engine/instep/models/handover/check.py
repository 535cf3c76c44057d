"""A model folder compared with the module that it was made from: the command `instep model check`."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn

from instep.models.agreement import agreement
from instep.models.errors import ModelError, first_line
from instep.models.folder import load_model
from instep.models.handover.traced_module import outputs_of
from instep.models.numerics import prepare
from instep.models.registry import build

ROWS: Final = 32
STEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Check:
    """How far a module's outputs are from those that are served, over random frames."""

    model: str
    against: str
    frames: tuple[int, ...]
    """The shape of the random frames."""
    error: float
    """The largest difference from the outputs that are served."""
    tolerance: float
    """The largest difference that rounding explains."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences."""
        return self.error <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"agrees": self.agrees, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.model} and {self.against}, on random frames {list(self.frames)}"
        yield ""
        yield from textwrap.wrap(self._verdict(), 79)

    def _verdict(self) -> str:
        if not self.error:
            return "They agree bit for bit on these frames."
        largest = f"the largest difference is {self.error:.1e}, and rounding explains {self.tolerance:.1e}"
        if self.agrees:
            return f"They agree: {largest}."
        return (
            f"They differ: {largest}. {self.model} holds other weights or other layers than the module: make it again "
            "with instep.models.save_model or export_step. A function that makes a module may give it random weights."
        )


def check(folder: Path, against: str) -> Check:
    """Run a model folder, frame by frame, and a module of the user's over random sequences.

    Args:
        folder: the model.
        against: `net.py:net`, a Python file and an attribute in it: an nn.Module over sequences, or a function that
            returns one.

    Raises:
        ModelError: the folder cannot be read, the file fails or has no such module, or the module takes other frames.
    """
    prepare()
    model = load_model(folder)
    module = _module(against)
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    x = torch.randn(ROWS, STEPS, model.description.features, generator=torch.Generator().manual_seed(0))
    y = outputs_of(module, x.to(device), (), against)
    found = agreement(build(model, torch.device("cpu")), x.numpy(), y)
    if found is None:
        raise ModelError(
            f"{against} gives the shape {list(y.shape)} for frames {list(x.shape)}, and {folder} gives "
            f"{model.description.outputs} values for each frame: name the module that {folder} was made from"
        )
    return Check(str(folder), against, tuple(x.shape), found.error, found.tolerance)


def _module(against: str) -> nn.Module:
    file, _, attribute = against.rpartition(":")
    if not attribute or not os.path.isfile(file):
        raise ModelError(f"--against {against}: name a Python file and the module in it, as in net.py:net")
    folder = str(Path(file).resolve().parent)
    sys.path.insert(0, folder)  # for its own imports
    try:
        value: Any = SimpleNamespace(**run_path(file, run_name="checked"))
        for name in attribute.split("."):
            value = getattr(value, name)
        if callable(value) and not isinstance(value, nn.Module | type):
            value = value()
    except (Exception, SystemExit) as error:
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == file]
        where = f"{file}, line {lines[-1]}" if lines else file
        raise ModelError(
            f"{where}: {type(error).__name__}: {first_line(error)}; the file is run to find {attribute}: put what "
            'makes the folder under if __name__ == "__main__":'
        ) from error
    finally:
        sys.path.remove(folder)
    if not isinstance(value, nn.Module):
        raise ModelError(f"{against} is {value!r:.60}: name a trained nn.Module, or a function that returns one")
    return value
