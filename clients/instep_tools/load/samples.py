"""The samples of a load test, one for each answered block, and their percentiles."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

SAMPLE: Final = np.dtype(
    [
        ("at_s", "<f8"),  # when the answer came, in seconds after the warm-up
        ("latency_us", "<f8"),  # from when the block was due until the answer came; the sum of those that follow:
        ("late_us", "<f8"),  # until the client library began to send: the load generator's own share
        ("away_us", "<f8"),  # while there was no connection
        ("queue_us", "<f8"),  # the server's own split
        ("compute_us", "<f8"),
        ("send_us", "<f8"),
        ("rest_us", "<f8"),  # the wire, and the client library's part of receiving
        ("held_up_us", "<f8"),  # how long of the time since it was sent the load generator stood still
        ("frames", "<i8"),
    ]
)
"""Where a block was not answered, the latency is the time that it had waited by then, and NaN stands for what is not
known of its split."""
SampleArray = npt.NDArray[np.void]

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9, 100.0)
P999_SAMPLES: Final = 1000
"""With fewer, 99.9 % is the largest of them all."""


def as_samples(numbers: array[float]) -> SampleArray:
    """The fields of samples, one sample behind the other, as an array of `SAMPLE`."""
    columns = np.frombuffer(numbers).reshape(-1, len(SAMPLE.descr)).T
    samples = np.empty(columns.shape[1], SAMPLE)
    for name, column in zip(SAMPLE.names or (), columns, strict=True):
        samples[name] = column
    return samples


def held_up_us(samples: SampleArray, stalls: Sequence[tuple[float, float]]) -> F64:
    """How long the process stood still between the sending of each block and its answer.

    `stalls` are the times in which it did, in seconds after the warm-up: in order, and without overlap.
    """
    if not stalls:
        return np.zeros(len(samples))
    moments = np.array(stalls).ravel()
    passed = np.cumsum(np.diff(moments, prepend=moments[0]) * (np.arange(len(moments)) % 2))
    sent_s = samples["at_s"] - (samples["latency_us"] - samples["late_us"]) / 1e6
    held_up: F64 = 1e6 * (np.interp(samples["at_s"], moments, passed) - np.interp(sent_s, moments, passed))
    return held_up


def percentiles(values: F64, weights: I64, at: Sequence[float] | F64 = PERCENTILES) -> F64:
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
    """Percentiles of a latency over all frames, in microseconds; NaN where there are none."""

    p50: float
    p90: float
    p99: float
    p999: float
    """NaN with fewer than `P999_SAMPLES`."""
    max: float


def distribution(values: F64, frames: I64) -> Distribution:
    """The percentiles over all frames of a value that whole blocks have; NaN values are left out."""
    known = ~np.isnan(values)
    p50, p90, p99, p999, most = percentiles(values[known], frames[known]).tolist()
    return Distribution(p50, p90, p99, p999 if known.sum() >= P999_SAMPLES else math.nan, most)
