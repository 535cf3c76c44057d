"""Histograms of durations and sizes: fixed entries, one increment a value, quantiles within an eighth."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.compiled import inlined, kernel
from instep.core.typing import I64

_PARTS: Final = 8  # entries for each doubling
_PART_BITS: Final = 3
ENTRIES: Final = _PARTS * 61


@inlined
def entry_of(value: int) -> int:
    """The entry that counts a value of 0 or more: exact below 8, then 8 entries for each doubling."""
    shift = 0
    while value >> shift >= 2 * _PARTS:
        shift += 1
    return (value >> shift) + shift * _PARTS


@kernel
def add_to(histogram: I64, value: int, times: int) -> None:
    """Count a value so many times."""
    histogram[entry_of(max(value, 0))] += times


def new_histogram() -> I64:
    """An empty histogram: int64 [ENTRIES]."""
    return np.zeros(ENTRIES, np.int64)


def largest_of(entry: int) -> int:
    """The largest value that an entry counts."""
    if entry < 2 * _PARTS:
        return entry
    shift = entry // _PARTS - 1
    return ((entry - shift * _PARTS + 1) << shift) - 1


def quantile(histogram: I64, share: float) -> float:
    """The largest value of the entry that holds this quantile; 0 where nothing was counted."""
    counted = np.cumsum(histogram)
    if not counted[-1]:
        return 0.0
    return float(largest_of(int(np.searchsorted(counted, share * counted[-1]))))
