"""How far float32 may be from the truth, for this network on these frames.

The float64 reference is taken as the truth: its own rounding is 2^29 times finer. What float32 can reach is measured,
not assumed: the reference runs a second time with every operation in float32. The served network and this run evaluate
the same equations on the same frames with the same unit of rounding, only in another order, so their errors are of the
same kind and size. With the scale of a stream, the largest value of it so far and at least 1, its bound at a frame is

    scale · (32 · (largest error of any float32 run beside it so far, relative to that run's scale) + 64 · 2^-23)

The largest so far, because an error once made lives on in the state; of any run beside it, and 32, because one order
of summation can be luckier than another; the last term for frames in which float32 happens to hit the truth. A network
that amplifies what it remembers multiplies luck too, so where fewer than 8 runs are side by side, there are copies
whose inputs are one unit in the last place off. A fixed tolerance would be wrong both ways: a network that forgets
keeps errors near 1e-7, and one that amplifies may be far from float64 after a thousand frames without any fault. Where
float32 overflows and the truth does not, no bound is promised and none widened: an overflow is a difference.

A wrong weight, gate, order or state moves outputs by far more than float32 does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, Bool
from instep.models.base import Reference

F64: TypeAlias = npt.NDArray[np.float64]

FACTOR: Final = 32.0
FLOOR: Final = 64 * 2.0**-23
LEAST_RUNS: Final = 8
BLOCK_BYTES: Final = 2**18
"""Of the differences that are looked at together."""


class LeastBound:
    """What the bound is at least, whatever float32 does with the frames: the last term alone, found without a run.

    What is within it is within the bound. What is not may be within the bound all the same.

    Args:
        rows: how many streams.
    """

    def __init__(self, rows: int) -> None:
        self._scale: F64 = np.ones(rows)

    def of_outputs(self, truth: F64, valid: Bool) -> F64:
        """The least bounds of the next timesteps.

        Args:
            truth: the reference's outputs in float64 [T, R, outputs].
            valid: [T, R]: whether the row has a frame there.

        Returns:
            [T, R].
        """
        scales = _scales(truth, valid, self._scale)
        self._scale = scales[-1]
        return scales * FLOOR

    def of_states(self, truth: F64) -> F64:
        """The least bounds of the final states [layers, R, hidden size], as [R]."""
        return _state_scale(truth) * FLOOR


class ErrorBound:
    """The bound of some streams, frame after frame.

    Args:
        rounded: the reference in float32.
        h: initial states [layers, R, hidden size].
    """

    def __init__(self, rounded: Reference, h: F32) -> None:
        rows = h.shape[1]
        self._rounded = rounded
        self._copies = -(-LEAST_RUNS // rows)
        self._states: F32 = np.repeat(h, self._copies, axis=1)
        self._random = np.random.default_rng(0)
        self._relative_error = 0.0
        self._scale: F64 = np.ones(rows)

    def run(self, x: F32, active: I64) -> F32:
        """Run float32 over the next timesteps.

        Args:
            x: frames [T, R, features].
            active: [T], as in `Reference.run`.

        Returns:
            Outputs [T, R, copies, outputs].
        """
        frames = np.repeat(x[:, :, None], self._copies, axis=2)
        others = frames[:, :, 1:]
        towards = self._random.choice(np.array([-np.inf, np.inf], np.float32), others.shape)
        with np.errstate(over="ignore"):  # the neighbour of the largest float32 is infinity
            others[...] = np.nextafter(others, towards)
        flat = frames.reshape(len(x), -1, x.shape[2])
        y, state = self._rounded.run(flat, {"h": self._states.swapaxes(0, 1)}, active * self._copies)
        self._states = state["h"].swapaxes(0, 1)
        return y.reshape(*x.shape[:2], self._copies, -1)

    def of_outputs(self, truth: F64, rounded: F32, valid: Bool) -> F64:
        """The bounds of the timesteps that `run` gave.

        Args:
            truth: the reference's outputs in float64 [T, R, outputs].
            rounded: what `run` returned.
            valid: [T, R]: whether the row has a frame there.

        Returns:
            [T, R].
        """
        error = largest_errors(rounded[:, :, 0], truth)
        for copy in range(1, self._copies):
            error = np.maximum(error, largest_errors(rounded[:, :, copy], truth))
        scales = _scales(truth, valid, self._scale)
        relative = np.where(valid & np.isfinite(error), error / scales, 0).max(axis=1)
        relative = np.maximum(np.maximum.accumulate(relative), self._relative_error)
        self._scale, self._relative_error = scales[-1], float(relative[-1])
        return scales * (FACTOR * relative[:, None] + FLOOR)

    def of_states(self, truth: F64) -> F64:
        """The bounds of the final states [layers, R, hidden size], as [R]; after all outputs."""
        layers, rows, size = truth.shape
        rounded = self._states.reshape(layers, rows, self._copies, size)
        error = absolute_error(rounded, truth[:, :, None]).max(axis=(0, 2, 3))
        scale = _state_scale(truth)
        relative = max(float((np.where(np.isfinite(error), error, 0) / scale).max()), self._relative_error)
        bound: F64 = scale * (FACTOR * relative + FLOOR)
        return bound


def absolute_error(values: F32, truth: F64) -> F64:
    """|values - truth|, elementwise; 0 where both overflow alike or both are NaN, inf where only one does or is."""
    with np.errstate(invalid="ignore"):
        error: F64 = np.abs(values - truth)
    odd = ~np.isfinite(error)
    if odd.any():
        value, nearest = values[odd], as_float32(np.broadcast_to(truth, error.shape)[odd])
        same = (value == nearest) | (np.isnan(value) & np.isnan(nearest))
        error[odd] = np.where(same, 0, np.inf)
    return error


def largest_errors(values: F32, truth: F64) -> F64:
    """The largest `absolute_error` of each frame.

    Args:
        values: [T, R, outputs].
        truth: [T, R, outputs].

    Returns:
        [T, R].
    """
    largest: F64 = np.empty(truth.shape[:2])
    for part, room in _blocks(truth):
        with np.errstate(invalid="ignore"):
            np.subtract(values[part], truth[part], out=room)
        np.abs(room, out=room).max(axis=2, out=largest[part])
    odd = ~np.isfinite(largest)
    if odd.any():
        largest[odd] = absolute_error(values[odd], truth[odd]).max(axis=1)
    return largest


def as_float32(truth: F64) -> F32:
    """Rounded to float32; infinity beyond its range."""
    with np.errstate(over="ignore"):
        return truth.astype(np.float32)


def _scales(truth: F64, valid: Bool, before: F64) -> F64:
    """The scales [T, R] of outputs [T, R, outputs], from those before them [R]."""
    scales: F64 = np.maximum(np.maximum.accumulate(np.where(valid, _magnitudes(truth), 0)), before)
    return scales


def _state_scale(truth: F64) -> F64:
    """The scales of final states [layers, R, hidden size], as [R]."""
    scale: F64 = np.maximum(_magnitudes(truth).max(axis=0), 1)
    return scale


def _magnitudes(values: F64) -> F64:
    """The largest |value| of each frame that is finite, 0 where none is: [T, R, size] to [T, R]."""
    largest: F64 = np.empty(values.shape[:2])
    for part, room in _blocks(values):
        np.abs(values[part], out=room).max(axis=2, out=largest[part])
    odd = ~np.isfinite(largest)
    if odd.any():
        largest[odd] = np.where(np.isfinite(values[odd]), np.abs(values[odd]), 0).max(axis=1)
    return largest


def _blocks(values: F64) -> Iterator[tuple[slice, F64]]:
    """Split timesteps into blocks that stay in a cache, each with room for its values, which is used again."""
    steps = max(BLOCK_BYTES // max(values[:1].nbytes, 1), 1)
    room: F64 = np.empty((steps, *values.shape[1:]))
    for start in range(0, len(values), steps):
        part = slice(start, min(start + steps, len(values)))
        yield part, room[: part.stop - start]
