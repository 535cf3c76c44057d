"""When each producer sends: mixed speeds, staggered starts, some in bursts. Pure: no clock, no sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

F64: TypeAlias = npt.NDArray[np.float64]

FASTEST_S: Final = 0.005
SLOWEST_S: Final = 0.25
"""The fastest producer has a frame every `FASTEST_S` seconds, the slowest every `SLOWEST_S`."""
WINDOW_S: Final = 7.0
"""Producers start when they will be done about then."""
BURSTY_SHARE: Final = 0.2
BURST_FRAMES: Final = 4
"""A bursty producer collects so many frames, as sound cards do, and sends them as one chunk."""
_SEED: Final = 370


@dataclass(frozen=True, eq=False)
class Part:
    """The work of one producer."""

    due_s: F64
    """float64 [T]: when each frame is due to be sent, in seconds after the common start; never decreasing."""
    chunk: int
    """So many frames are due, and sent, at once; the last chunk may be shorter."""


def timetable(lengths: Sequence[int], speed: float = 1.0) -> list[Part]:
    """The parts of all producers, the same each time.

    Args:
        lengths: frames of each producer's recording.
        speed: 2 for everything twice as fast.
    """
    random = np.random.default_rng(_SEED)
    count = len(lengths)
    periods_s = random.permutation(np.linspace(FASTEST_S, SLOWEST_S, count))
    is_bursty = random.permutation(np.arange(count) < round(BURSTY_SHARE * count))
    parts = []
    for length, period_s, bursty in zip(lengths, periods_s, is_bursty, strict=True):
        chunk = BURST_FRAMES if bursty else 1
        at = np.arange(length)
        # A chunk goes when its last frame is there.
        sent_at = np.minimum(at // chunk * chunk + chunk - 1, length - 1)
        start_s = random.uniform(0.0, max(0.0, WINDOW_S - length * period_s))
        parts.append(Part(due_s=(start_s + sent_at * period_s) / speed, chunk=chunk))
    return parts


def most_at_once(parts: Sequence[Part]) -> int:
    """How many producers are between their first and their last frame at the busiest moment."""
    starts = np.sort([part.due_s[0] for part in parts])
    ends = np.sort([part.due_s[-1] for part in parts])
    begun = np.arange(1, len(parts) + 1)
    return int((begun - np.searchsorted(ends, starts)).max())
