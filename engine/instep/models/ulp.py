"""Equal bits, and distances between float32 values in units in the last place."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, Bool

NOT_COMPARABLE: Final = 2**32
"""The distance between a NaN and anything that has other bits; no two numbers are as far apart."""

_SIGN: Final = np.int64(0x7FFF_FFFF)
_INFINITY: Final = 0x7F80_0000


def ulp_distance(a: F32, b: F32) -> I64:
    """How many float32 values apart, elementwise; 0 exactly where the bits are equal.

    So -0.0 and 0.0 are neighbours (1), NaNs of the same bits are 0 apart, and a NaN is `NOT_COMPARABLE` with the rest.

    Raises:
        ValueError: when the shapes differ or an array is not float32.
    """
    if a.shape != b.shape or a.dtype != np.float32 or b.dtype != np.float32:
        raise ValueError(f"two float32 arrays of one shape are needed, not {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    bits_a, bits_b = _bits(a), _bits(b)
    distance = np.abs(_ordered(bits_a) - _ordered(bits_b))
    not_a_number = ((bits_a & _SIGN) > _INFINITY) | ((bits_b & _SIGN) > _INFINITY)
    return np.where(not_a_number & (bits_a != bits_b), np.int64(NOT_COMPARABLE), distance)


def bits_differ(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Bool:
    """Elementwise, of one shape and dtype. All NaNs are alike: the processor's kernel chooses the one it gives."""
    bits = f"u{one.itemsize}"
    differ: Bool = (one.view(bits) != other.view(bits)) & ~(np.isnan(one) & np.isnan(other))
    return differ


def _bits(values: F32) -> I64:
    return np.ascontiguousarray(values).view(np.int32).astype(np.int64).reshape(values.shape)


def _ordered(bits: I64) -> I64:
    """The rank of each value among all float32 values: floats of one sign are ordered as their bits are."""
    return np.where(bits < 0, -1 - (bits & _SIGN), bits)
