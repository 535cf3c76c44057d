"""How far a served network's outputs are from those of the module that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, Final

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.base import Floats, RecurrentModel, step_frames
from instep.models.errors import ModelError
from instep.models.numerics import one_thread

FACTOR: Final = 16
FLOOR: Final = 8 * 2.0**-23
"""A float32 result may be off by this many times what the reference loses in float32, and this part of the largest."""
_FARTHEST: Final = float(np.finfo(np.float64).max)


@dataclass(frozen=True, slots=True)
class Agreement:
    """A module's outputs compared with those of the served network."""

    error: float
    """The largest difference from the network's outputs for one frame at a time."""
    tolerance: float
    """The largest error that rounding in float32 explains."""
    steps_axis: int
    """Which axis of the module's input counts timesteps; negative where it has none."""
    rows_axis: int
    """Which one counts sequences; negative where it has none."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences."""
        return self.error <= self.tolerance


@one_thread()
def agreement(network: RecurrentModel, x: F32, y: F32) -> Agreement | None:
    """Run a network on a module's input and compare the outputs.

    Which axis counts timesteps is found by trying: another one gives other values.

    Args:
        network: what is served.
        x: the module's input, with axes for T, R and features in any order, or with one of T and R left out.
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
                    error = distance(y.reshape(wanted.shape), wanted)
                    attempts.append((error, order[0] - missing, order[1] - missing, frames, stepped))
    if not attempts:
        return None
    error, steps_axis, rows_axis, frames, stepped = min(attempts, key=lambda each: each[0])
    return Agreement(error, rounding_tolerance(network, frames, stepped), steps_axis, rows_axis)


def first_output(result: Any, module: str) -> torch.Tensor:
    """The first tensor among what a module returned.

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


def distance(one: F32, other: F32) -> float:
    """The largest difference; the largest float64 where only one of two values is finite."""
    with np.errstate(invalid="ignore"):
        error = np.abs(one.astype(np.float64) - other)
    error = np.where(one == other, 0, np.nan_to_num(error, nan=np.inf))  # equal infinities are no NaN apart
    return float(np.minimum(error, _FARTHEST).max())


def rounding_tolerance(network: RecurrentModel, frames: F32, outputs: F32) -> float:
    """What rounding explains between two float32 results for these frames, relative to the largest output."""
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
