"""Cosines and sines with the same bits on every machine; those of mathematical libraries differ in the last bits."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_BITS: Final = 100


def exact_cosines(count: int) -> npt.NDArray[np.float64]:
    """cos(2πk/count) for k from 0 to count - 1, computed with whole numbers."""
    return np.array([_cosine(k, count) / 2**_BITS for k in range(count)])


def exact_sines(count: int) -> npt.NDArray[np.float64]:
    """sin(2πk/count) likewise."""
    return np.array([_cosine(4 * k - count, 4 * count) / 2**_BITS for k in range(count)])


def _cosine(k: int, count: int) -> int:
    """In units of 2^-100, by its series, after the angle was folded into the first eighth of a turn."""
    k = abs(k) % count
    k = min(k, count - k)
    if 4 * k > count:
        return -_cosine(count - 2 * k, 2 * count)
    angle = 2 * _pi() * k // count
    term, total, n = 1 << _BITS, 0, 0
    while term:
        total += term
        term = -(term * angle >> _BITS) * angle >> _BITS
        term = -(-term // ((n + 1) * (n + 2))) if term < 0 else term // ((n + 1) * (n + 2))
        n += 2
    return total


def _pi() -> int:
    """π in the same units, by Machin's formula."""

    def arctan_of_inverse(x: int) -> int:
        total, power, n, sign = 0, (1 << (_BITS + 10)) // x, 1, 1
        while power:
            total, power, n, sign = total + sign * (power // n), power // (x * x), n + 2, -sign
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239)) >> 10
