"""Histograms of durations and sizes, with fixed entries, quantiles accurate to an eighth, and exact sums."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.compiled import inlined, kernel
from instep.core.typing import I32, I64

_PARTS: Final = 8  # entries for each doubling
ENTRIES: Final = _PARTS * 61


@inlined
def entry_of(value: int) -> int:
    """The entry for a value of 0 or more: exact below 8, then 8 entries for each doubling."""
    shift = 0
    while value >> shift >= 2 * _PARTS:
        shift += 1
    return (value >> shift) + shift * _PARTS


@inlined
def _add(histogram: I64, value: int, times: int) -> None:
    counted = max(value, 0)
    histogram[entry_of(counted)] += times
    histogram[ENTRIES] += counted * times


@kernel
def add_to(histogram: I64, value: int, times: int) -> None:
    """Add a value to a histogram `times` times."""
    _add(histogram, value, times)


@kernel
def add_steps(compute_us: I64, batch_size: I64, streams: int, step_ns: int, steps: int) -> None:
    """Add the steps of a run to the histograms of step times and batch sizes.

    Args:
        compute_us: the histogram of step times.
        batch_size: the histogram of batch sizes minus one, so that a batch of 2^k streams is the largest of its entry.
        streams: of each batch.
        step_ns: the time of each step.
        steps: the count of steps.
    """
    _add(compute_us, step_ns // 1000, steps)
    _add(batch_size, streams - 1, steps)


@kernel
def add_replies(latency_us: I64, send_us: I64, arrived_ns: I64, numbers: I32, now_ns: int, send_ns: int) -> None:
    """Add messages that are answered now to the histograms of their times.

    Args:
        latency_us: from the arrival of a message to its answer.
        send_us: from the end of the step of its last frames to its answer.
        arrived_ns: by message.
        numbers: int32 [M], the messages.
        now_ns: the present time.
        send_ns: how long ago that step ended.
    """
    for number in numbers:
        _add(latency_us, (now_ns - arrived_ns[number]) // 1000, 1)
    _add(send_us, send_ns // 1000, len(numbers))


def new_histogram() -> I64:
    """Make an empty histogram: int64 [ENTRIES + 1]; its last element is the sum of all values."""
    return np.zeros(ENTRIES + 1, np.int64)


def largest_of(entry: int) -> int:
    """Return the largest value that an entry counts."""
    if entry < 2 * _PARTS:
        return entry
    shift = entry // _PARTS - 1
    return ((entry - shift * _PARTS + 1) << shift) - 1


def quantile(histogram: I64, share: float) -> float:
    """Return the quantile of a share between 0 and 1, or up to an eighth more; 0 if nothing was counted."""
    counted = np.cumsum(histogram[:ENTRIES])
    if not counted[-1]:
        return 0.0
    return float(largest_of(int(np.searchsorted(counted, share * counted[-1]))))
