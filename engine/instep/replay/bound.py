"""The bound on the distance between float32 results and the float64 reference, for one stream's frames.

The float64 reference is taken as the truth: its own rounding is 2^29 times finer. The error that float32 can reach is
measured rather than assumed: the reference runs again with every operation in float32, on the stream's own frames and
on copies of them whose inputs are one unit in the last place off. The served network and these runs evaluate the same
equations with the same rounding in another order, so their errors have the same size. With the scale of a stream (its
largest output so far, at least 1; for a leaf of its state, the largest value in that), the bound at a frame is

    scale · (32 · (largest error of these runs so far, relative to the scale) + 64 · 2^-23)

The largest error so far counts because an error persists in the state. The factor of 32 and the copies allow for one
order of summation being luckier than another, which a network that amplifies its state makes worse. The last term
covers frames in which float32 happens to hit the truth. The bound of a stream depends on its own values alone.

A fixed tolerance would be too loose for a network that forgets, whose errors stay near 1e-7, and too tight for one that
amplifies, which may be far from float64 after a thousand frames without any fault. A wrong weight, gate, order or state
moves outputs by far more than float32 does.

The bound says nothing once a stream is **lossy**: a frame or a state was so large (`LARGE`) that float32 may round the
sums of the gates by whole units, so that another order of summation opens or closes a gate, or float32 overflowed in
one of the runs. From that frame on, outputs beyond the bound are undecided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, Bool
from instep.models.base import Reference

F64: TypeAlias = npt.NDArray[np.float64]
Leaves: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""States by leaf, [R, *shape]."""

FACTOR: Final = 32.0
FLOOR: Final = 64 * 2.0**-23
RUNS: Final = 8
"""The number of float32 runs per stream."""
LARGE: Final = 2.0**20
BLOCK_BYTES: Final = 2**18
"""The size of differences computed at once, which fit into the cache."""


class Limits(NamedTuple):
    """The largest accepted distances between two computations: [T, R] for outputs, [R] for states."""

    distance: F64
    lossy: Bool
    """Whether an element beyond its limit is undecided instead of wrong."""


class ErrorBound:
    """The bound of some streams, advanced frame by frame.

    Args:
        rounded: the reference in float32.
        states: the initial states, with floats in float32.
        relative_error: [R], the distance that the initial states may already have from the served ones.

    Attributes:
        relative_error: [R], up to the newest timestep.
    """

    def __init__(self, rounded: Reference, states: Leaves, relative_error: F64 | None = None) -> None:
        floats = _floats(states)
        rows = len(next(iter(states.values())))
        self._rounded = rounded
        self._states: Leaves = {name: np.repeat(leaf, RUNS, axis=0) for name, leaf in states.items()}
        self._random = np.random.default_rng(0)
        self.relative_error: F64 = np.zeros(rows) if relative_error is None else relative_error
        self._carried = self.relative_error
        self._scale: F64 = np.ones(rows)
        self._lossy: Bool = np.zeros(rows, np.bool_)
        for leaf in floats.values():
            self._lossy |= ~(np.abs(leaf).max(axis=1) < LARGE)

    def outputs(self, x: F32, truth: F64, valid: Bool, active: I64) -> Limits:
        """Limits of the next timesteps.

        Args:
            x: frames [T, R, features].
            truth: outputs of the float64 reference [T, R, outputs].
            valid: [T, R]: whether the row has a frame there.
            active: [T], as in `Reference.run`.
        """
        rounded = self._run(x, active)
        error = largest_errors(rounded[:, :, 0], truth)
        for run in range(1, RUNS):
            error = np.maximum(error, largest_errors(rounded[:, :, run], truth))
        scales = scales_of(truth, valid, self._scale)
        overflows = ~np.isfinite(error)
        relative = np.where(valid & ~overflows, error / scales, 0) + self._carried
        relative = np.maximum(np.maximum.accumulate(relative), self.relative_error)
        lossy = valid & (overflows | ~(np.abs(x).max(axis=2) < LARGE))
        lossy = np.logical_or.accumulate(lossy) | self._lossy
        self._scale, self.relative_error, self._lossy = scales[-1], relative[-1], lossy[-1]
        return Limits(scales * (FACTOR * relative + FLOOR), lossy)

    def states(self, truth: Leaves) -> dict[str, Limits]:
        """Limits of the floating-point leaves, [R], after the timesteps so far."""
        runs, limits = _floats(self._states), dict[str, Limits]()
        for name, floats in _floats(truth).items():
            rounded = runs[name].reshape(len(floats), RUNS, -1)
            error = absolute_error(rounded, floats[:, None]).max(axis=(1, 2))
            overflows = ~np.isfinite(error)
            scales = leaf_scales(floats)
            relative = np.maximum(np.where(overflows, 0, error) / scales, self.relative_error)
            limits[name] = Limits(scales * (FACTOR * relative + FLOOR), self._lossy | overflows)
        return limits

    def _run(self, x: F32, active: I64) -> F32:
        """Outputs of the float32 runs [T, R, RUNS, outputs]."""
        frames = np.repeat(x[:, :, None], RUNS, axis=2)
        others = frames[:, :, 1:]
        # Every stream is nudged alike, whichever streams are checked side by side.
        towards = self._random.choice(np.array([-np.inf, np.inf], np.float32), (len(x), 1, *others.shape[2:]))
        with np.errstate(over="ignore"):  # the neighbour of the largest float32 is infinity
            others[...] = np.nextafter(others, towards)
        flat = frames.reshape(len(x), -1, x.shape[2])
        y, self._states = self._rounded.run(flat, self._states, active * RUNS)
        return y.reshape(*x.shape[:2], RUNS, -1)


def absolute_error(values: npt.NDArray[Any], truth: npt.NDArray[Any]) -> F64:
    """|values - truth| by element: 0 for the same infinity or two NaN, otherwise inf if either is not finite."""
    with np.errstate(invalid="ignore"):
        error: F64 = np.abs(np.subtract(values, truth, dtype=np.float64))
    odd = ~np.isfinite(error)
    if odd.any():
        value, nearest = values[odd], as_float32(np.broadcast_to(truth, error.shape)[odd])
        same = (value == nearest) | (np.isnan(value) & np.isnan(nearest))
        error[odd] = np.where(same, 0, np.inf)
    return error


def largest_errors(values: F32, truth: npt.NDArray[Any], block_bytes: int = BLOCK_BYTES) -> F64:
    """The largest `absolute_error` of each frame.

    Args:
        values: [T, R, outputs].
        truth: [T, R, outputs].
        block_bytes: of the timesteps that are computed at once.

    Returns:
        [T, R].
    """
    largest: F64 = np.empty(truth.shape[:2])
    for part, room in _blocks(truth, block_bytes):
        with np.errstate(invalid="ignore"):
            np.subtract(values[part], truth[part], out=room, dtype=np.float64)
        np.abs(room, out=room).max(axis=2, out=largest[part])
    odd = ~np.isfinite(largest)
    if odd.any():
        largest[odd] = absolute_error(values[odd], truth[odd]).max(axis=1)
    return largest


def as_float32(truth: npt.NDArray[Any]) -> F32:
    """Round to float32; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return truth.astype(np.float32)


def scales_of(truth: F64, valid: Bool, before: F64) -> F64:
    """The scales [T, R] of outputs [T, R, outputs], given the scales [R] before them."""
    scales: F64 = np.maximum(np.maximum.accumulate(np.where(valid, _magnitudes(truth), 0)), before)
    return scales


def _floats(states: Leaves) -> dict[str, npt.NDArray[Any]]:
    return {name: leaf.reshape(len(leaf), -1) for name, leaf in states.items() if leaf.dtype.kind == "f"}


def leaf_scales(truth: F64) -> F64:
    """The scales of one leaf's values [R, elements], as [R]."""
    scale: F64 = np.maximum(_magnitudes(truth[None])[0], 1)
    return scale


def _magnitudes(values: F64) -> F64:
    """The largest finite |value| of each frame, [T, R, size] to [T, R]; 0 if it has none."""
    largest: F64 = np.empty(values.shape[:2])
    for part, room in _blocks(values):
        np.abs(values[part], out=room).max(axis=2, out=largest[part])
    odd = ~np.isfinite(largest)
    if odd.any():
        largest[odd] = np.where(np.isfinite(values[odd]), np.abs(values[odd]), 0).max(axis=1)
    return largest


def _blocks(values: npt.NDArray[Any], block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[slice, F64]]:
    """Split timesteps into blocks that fit into the cache, and yield one reused buffer for the values of each."""
    steps = max(block_bytes // max(values[:1].nbytes, 1), 1)
    room: F64 = np.empty((steps, *values.shape[1:]))
    for start in range(0, len(values), steps):
        part = slice(start, min(start + steps, len(values)))
        yield part, room[: part.stop - start]
