"""How far a served network's outputs are from those of the module that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class Arrangement:
    """The order of a module's outputs."""

    steps: int
    """T where it answers every frame of a sequence, 1 where it answers only the last one."""
    order: tuple[int, ...]
    """Which of the axes T, R and outputs is first, second and third."""

    def apply(self, y: F32, rows: int, outputs: int) -> F32:
        """A module's outputs as [T or 1, R, outputs]."""
        extents = (self.steps, rows, outputs)
        return y.reshape([extents[axis] for axis in self.order]).transpose(np.argsort(self.order))


@dataclass(frozen=True, slots=True)
class Agreement:
    """A module's outputs compared with those of the served network."""

    error: float
    """The largest difference from the network's outputs for one frame at a time."""
    tolerance: float
    """The largest error that rounding in float32 explains."""
    rows_axis: int
    """Which axis of the module's input counts sequences; negative where it has none."""
    steps_axis: int
    """Which one counts timesteps; negative where it has none."""
    arrangement: Arrangement
    """How the module's outputs stand."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences."""
        return self.error <= self.tolerance


@one_thread()
def agreement(network: RecurrentModel, x: F32, y: F32) -> Agreement | None:
    """Run a network on a module's input and compare the outputs.

    The axes of both may stand in any order. The order is found by trying: another one than the module's own gives other
    values.

    Args:
        network: what is served.
        x: the module's input, with axes for frames, sequences (or for one of both) and features.
        y: its outputs, for each frame or for the last one of each sequence.

    Returns:
        None when no order of the axes gives `y` a shape that fits.
    """
    attempts = [each for order in _orders(x, network.description.features) for each in _attempts(network, x, order, y)]
    if not attempts:
        return None
    best = min(attempts, key=lambda each: each.error)
    frames, stepped, arrangement = best.frames, best.stepped, best.arrangement
    arranged = arrangement.apply(y, *stepped.shape[1:])
    return Agreement(
        error=distance(arranged, stepped[-arrangement.steps :]),
        tolerance=rounding_tolerance(network, frames, stepped),
        rows_axis=best.order[1] - (3 - x.ndim),
        steps_axis=best.order[0] - (3 - x.ndim),
        arrangement=arrangement,
    )


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


def _orders(x: F32, features: int) -> Iterator[tuple[int, ...]]:
    """The orders of three axes that make [T, R, features] of a module's input."""
    shape = _in_three_axes(x).shape
    return (order for order in permutations(range(3)) if shape[order[2]] == features)


def _in_three_axes(x: F32) -> F32:
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One order of the axes of a module's input, and one of its outputs."""

    order: Sequence[int]
    frames: F32
    stepped: F32
    """The network's outputs for these frames."""
    arrangement: Arrangement
    error: float


def _attempts(network: RecurrentModel, x: F32, order: Sequence[int], y: F32) -> Iterator[_Attempt]:
    frames = np.ascontiguousarray(_in_three_axes(x).transpose(order))
    stepped = stepped_outputs(network, frames)
    steps, rows, outputs = stepped.shape
    for count in sorted({1, steps}):
        if y.size == count * rows * outputs:
            for each in permutations(range(3)):
                arrangement = Arrangement(count, each)
                error = distance(arrangement.apply(y, rows, outputs), stepped[-count:])
                yield _Attempt(order, frames, stepped, arrangement, error)


def distance(one: F32, other: F32) -> float:
    """The largest difference; the largest float64 where only one of two values is finite."""
    with np.errstate(invalid="ignore"):
        error = np.abs(one.astype(np.float64) - other)
    error = np.where(one == other, 0, np.nan_to_num(error, nan=np.inf))  # equal infinities are no NaN apart
    return float(np.minimum(error, _FARTHEST).max())


def stepped_outputs(network: RecurrentModel, frames: F32) -> F32:
    """Outputs [T, R, outputs] for frames [T, R, features], one step for each frame."""
    return step_frames(network, frames, network.state.initial(frames.shape[1]))[0]


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
