"""What a load test measures: one sample an answered block, in arrays made beforehand, and their percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

SAMPLE: Final = np.dtype(
    [
        ("at_s", "<f8"),  # when the answer came, in seconds after the start
        ("late_us", "<f8"),  # from the scheduled send time until it was sent: the load test's own share
        ("latency_us", "<f8"),  # from the scheduled send time until the answer came
        ("queue_us", "<f8"),  # the server's own split of it
        ("compute_us", "<f8"),
        ("send_us", "<f8"),
        ("frames", "<i8"),
    ]
)
SampleArray = npt.NDArray[np.void]

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9, 100.0)


class Samples:
    """An array of samples that is filled without allocating; its room doubles where it was too small."""

    def __init__(self, capacity: int = 65_536) -> None:
        self._room: SampleArray = np.zeros(max(1, capacity), SAMPLE)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def add(
        self,
        at_s: float,
        late_us: float,
        latency_us: float,
        queue_us: float,
        compute_us: float,
        send_us: float,
        frames: int,
    ) -> None:
        """One answered block; the fields are those of `SAMPLE`."""
        if self._used == len(self._room):
            self._room = np.concatenate([self._room, np.zeros(len(self._room), SAMPLE)])
        self._room[self._used] = (at_s, late_us, latency_us, queue_us, compute_us, send_us, frames)
        self._used += 1

    def array(self) -> SampleArray:
        """The samples so far, without a copy."""
        return self._room[: self._used]


def percentiles(values: F64, weights: npt.NDArray[np.int64], at: Sequence[float] = PERCENTILES) -> F64:
    """Weighted percentiles: the smallest value that at least `p` percent of the weight does not exceed.

    With weights of 1 this is numpy's `inverted_cdf`. NaN where there are no values.
    """
    if not len(values):
        return np.full(len(at), np.nan)
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    wanted = np.asarray(at) / 100 * cumulative[-1]
    places = np.searchsorted(cumulative, wanted - 1e-9 * cumulative[-1])
    chosen: F64 = values[order][places]
    return chosen


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of a latency over all frames, in microseconds."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


def distribution(values: F64, frames: npt.NDArray[np.int64]) -> Distribution:
    """The percentiles over all frames of a value that blocks of so many frames have; NaN values are left out."""
    known = ~np.isnan(values)
    return Distribution(*(float(value) for value in percentiles(values[known], frames[known])))
