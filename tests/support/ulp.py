"""Distances between float32 values in units in the last place."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.typing import F32, I64

NOT_COMPARABLE: Final = 2**32
"""The distance between a NaN and anything that has other bits; no two numbers are as far apart."""


def ulp_distance(a: F32, b: F32) -> I64:
    """How many float32 values apart, elementwise; 0 exactly where the bits are equal."""
    ranks = [_rank(each) for each in np.broadcast_arrays(a, b)]
    is_nan = np.isnan(a) | np.isnan(b)
    distance: I64 = np.abs(ranks[0] - ranks[1])
    return np.where(is_nan & (distance != 0), np.int64(NOT_COMPARABLE), distance)


def _rank(values: F32) -> I64:
    """Floats of one sign are ordered as their bits are."""
    bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -1 - (bits & 0x7FFF_FFFF), bits)
