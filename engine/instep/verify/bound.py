"""How far float32 may be from the truth, for this network on these frames.

The float64 reference is taken as the truth: its own rounding is 2^29 times finer. What float32 can reach is measured,
not assumed: the reference runs a second time with every operation in float32. The served network and this run evaluate
the same equations on the same frames with the same unit of rounding, only in another order, so at every frame their
errors are of the same kind and size. At each frame a stream's bound is

    32 · (largest error of the float32 run in the stream so far) + 64 · 2^-23 · (largest value so far, at least 1)

The running maximum, because an error once made lives on in the state; 32, because one order of summation can be luckier
than another; the last term for frames in which the float32 run happens to hit the truth. A fixed tolerance would be
wrong both ways: a network that forgets keeps errors near 1e-7, and one that amplifies what it remembers may be far from
float64 after a thousand frames without any fault.

A wrong weight, gate, order or state moves outputs by far more than that.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, Bool

F64: TypeAlias = npt.NDArray[np.float64]

FACTOR: Final = 32.0
FLOOR: Final = 64 * 2.0**-23


def absolute_error(values: F32, truth: F64) -> F64:
    """|values - truth|, elementwise; 0 where both overflow alike or both are NaN, inf where only one does or is."""
    with np.errstate(invalid="ignore"):
        error: F64 = np.abs(values - truth)
    odd = ~np.isfinite(error)
    if odd.any():
        value, nearest = values[odd], as_float32(truth[odd])
        same = (value == nearest) | (np.isnan(value) & np.isnan(nearest))
        error[odd] = np.where(same, 0, np.inf)
    return error


def as_float32(truth: F64) -> F32:
    """Rounded to float32; infinity beyond its range."""
    with np.errstate(over="ignore"):
        return truth.astype(np.float32)


class ErrorBound:
    """The bound of some streams, frame after frame.

    Args:
        rows: how many streams.
    """

    def __init__(self, rows: int) -> None:
        self._error: F64 = np.zeros(rows)
        self._scale: F64 = np.ones(rows)

    def of_outputs(self, truth: F64, rounded: F32, valid: Bool) -> F64:
        """Take the next timesteps in and give their bounds.

        Args:
            truth: the reference's outputs in float64 [T, R, outputs].
            rounded: the same in float32.
            valid: [T, R]: whether the row has a frame there.

        Returns:
            [T, R].
        """
        error = np.where(valid, absolute_error(rounded, truth).max(axis=2), 0)
        scale = np.where(valid, _finite(truth).max(axis=2), 0)
        errors = np.maximum(np.maximum.accumulate(error, axis=0), self._error)
        scales = np.maximum(np.maximum.accumulate(scale, axis=0), self._scale)
        self._error, self._scale = errors[-1], scales[-1]
        return FACTOR * errors + FLOOR * scales

    def of_states(self, truth: F64, rounded: F32) -> F64:
        """The bound of final states [layers, R, hidden size], as [R]; after all outputs."""
        error = np.maximum(absolute_error(rounded, truth).max(axis=(0, 2)), self._error)
        scale = np.maximum(_finite(truth).max(axis=(0, 2)), 1)
        bound: F64 = FACTOR * error + FLOOR * scale
        return bound


def _finite(values: F64) -> F64:
    magnitude: F64 = np.where(np.isfinite(values), np.abs(values), 0)
    return magnitude
