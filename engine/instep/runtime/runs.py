"""Runs: the same streams stepped several times in a row, without a word to the event loop in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from instep.core.typing import I64

MOST_STEPS: Final = 8
"""The longest run."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended."""

    began_ns: int
    ended_ns: int
    """Both of the monotonic clock."""
    steps: int
    """How many steps were applied, the first ones."""
    error: Exception | None
    """What the next one raised; None where all were applied."""


def run_steps(step: Callable[[I64, I64], None], slots: I64, rows: I64) -> Ended:
    """Step the streams of `slots`, int64 [B], with the frames of each of `rows`, int64 [steps, B], until one fails."""
    began_ns, steps, error = time.monotonic_ns(), 0, None
    try:
        for rows_of_step in rows:
            step(slots, rows_of_step)
            steps += 1
    except Exception as raised:
        error = raised
    return Ended(began_ns, time.monotonic_ns(), steps, error)
