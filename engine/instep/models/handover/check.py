"""`instep model check`: how far a served network's outputs are from those of the module that it was made from."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from instep.core.typing import F32
from instep.models.base import Floats, RecurrentModel, step_frames
from instep.models.errors import ModelError, first_line
from instep.models.folder import load_model
from instep.models.numerics import difference, evaluating, one_thread, prepare
from instep.models.registry import build

FACTOR: Final = 16
FLOOR: Final = 8 * 2.0**-23
"""Bounds for a float32 result: this multiple of the reference's own loss in float32, and this fraction of the largest
value.
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A module's outputs compared with those of the served network."""

    error: float
    """The largest difference from the network's outputs for one frame at a time."""
    tolerance: float
    """The largest error that rounding in float32 explains."""
    steps_axis: int
    """The axis of timesteps in the module's input; negative if there is none."""
    rows_axis: int
    """The axis of sequences; negative if there is none."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences."""
        return self.error <= self.tolerance


@one_thread()
def agreement(network: RecurrentModel, x: F32, y: F32) -> Agreement | None:
    """Run a network on a module's input and compare the outputs.

    It finds the axis of timesteps by trying each, because a wrong one gives other values.

    Args:
        network: the served network.
        x: the module's input, with the axes T, R and features in any order; T or R may be missing.
        y: its outputs in the same order, or with the outputs last, for each frame or for the last one of each sequence.

    Returns:
        None when no order gives `y` a shape that fits.
    """
    attempts, missing = [], 3 - x.ndim
    whole = x[None] if missing == 1 else x
    for order in permutations(range(3)) if whole.ndim == 3 else ():
        if whole.shape[order[2]] != network.description.features:
            continue
        frames = np.ascontiguousarray(whole.transpose(order))
        stepped, _ = step_frames(network, frames, network.state.initial(frames.shape[1]))
        for answered in (stepped, stepped[-1:]):
            for back in {tuple(np.argsort(order)), (0, 1, 2) if order[0] < order[1] else (1, 0, 2)}:
                wanted = answered.transpose(back)
                if wanted.size == y.size:
                    error = difference(y.reshape(wanted.shape), wanted)
                    attempts.append((error, order[0] - missing, order[1] - missing, frames, stepped))
    if not attempts:
        return None
    error, steps_axis, rows_axis, frames, stepped = min(attempts, key=lambda each: each[0])
    return Agreement(error, rounding_tolerance(network, frames, stepped), steps_axis, rows_axis)


def outputs_of(module: nn.Module, x: torch.Tensor, others: Sequence[Any], subject: str) -> F32:
    """Run a network over sequences and return its first output.

    Args:
        module: the network.
        x: its frames.
        others: its further arguments.
        subject: its name in error messages.

    Raises:
        ModelError: when it fails, or returns no tensor.
    """
    try:
        with evaluating(module):
            result = module(x.clone(), *others)
    except Exception as error:  # whatever the user's forward raises
        raise ModelError(
            f"{subject} fails on frames {list(x.shape)} ({first_line(error):.200}); a network over sequences of any "
            "length is needed here, while instep.models.export_step takes a step"
        ) from error
    y: F32 = _first_output(result, subject).float().cpu().numpy()
    return y


def _first_output(result: Any, module: str) -> torch.Tensor:
    """The first tensor in a result.

    Raises:
        ModelError: when there is none.
    """
    while isinstance(result, list | tuple) and result:
        result = result[0]
    if not isinstance(result, torch.Tensor):
        raise ModelError(
            f"{module} returns a {type(result).__name__}; return a tensor of outputs, or a tuple that begins with one"
        )
    return result


def rounding_tolerance(network: RecurrentModel, frames: F32, outputs: F32) -> float:
    """The largest difference between two float32 results for these frames that rounding can cause."""
    truth, rounded = (_referred(network, frames, dtype) for dtype in (np.float64, np.float32))
    if truth is None or rounded is None:
        finite = outputs[np.isfinite(outputs)]
        return 2 * FLOOR * float(np.abs(finite).max(initial=0))
    return 2 * (FACTOR * float(np.abs(rounded - truth).max()) + FLOOR * float(np.abs(truth).max()))


def _referred(network: RecurrentModel, frames: F32, dtype: type[np.floating[Any]]) -> Floats | None:
    reference = network.reference(dtype)
    if reference is None:
        return None
    steps, rows, _ = frames.shape
    state = {
        name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf
        for name, leaf in network.state.unpack(network.state.initial(rows)).items()
    }
    return reference.run(frames.astype(dtype), state, np.full(steps, rows))[0]


ROWS: Final = 32
STEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Check:
    """A module's outputs compared with the served ones over random frames."""

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
        """The result as lines of text."""
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
    """Compare a model folder, run frame by frame, with the user's module over random sequences.

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
    if attribute and file.endswith(".py") and not os.path.isfile(file):
        raise ModelError(f"--against {against}: there is no file {file}")
    if not attribute or not os.path.isfile(file):
        raise ModelError(f"--against {against}: name a Python file and the module in it, as in net.py:net")
    folder = str(Path(file).resolve().parent)
    sys.path.insert(0, folder)  # for its own imports
    try:
        value: Any = SimpleNamespace(**run_path(file, run_name="checked"))
        for name in attribute.split("."):
            if not hasattr(value, name):
                known = sorted(key for key, each in vars(value).items() if isinstance(each, nn.Module))
                raise ModelError(
                    f"{file} has no {attribute!r}: its modules are {', '.join(known) or 'made in functions'}"
                )
            value = getattr(value, name)
        if callable(value) and not isinstance(value, nn.Module | type):
            value = value()
    except ModelError:
        raise
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
