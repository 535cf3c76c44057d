"""The largest number of streams that still meets a service level: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

RESOLUTION: Final = 1 / 32
"""The search ends when the answer is known to this part of itself."""

FAILURES_TO_BELIEVE: Final = 2
"""A size counts as too large when it failed this often in a row: one hiccup of the machine decides nothing."""


@dataclass(frozen=True, slots=True)
class Found:
    """The search's result."""

    streams: int
    """The largest number that met the level; 0 when not even one stream did."""
    limited: bool
    """Whether the search ended at its upper limit: more may be possible."""


async def largest_within(measure: Callable[[int], Awaitable[bool]], start: int, limit: int) -> Found:
    """Search for the largest number of streams that meets the level.

    Doubles from `start` while the level is met (halves while it is not), then bisects to within `RESOLUTION`.

    Args:
        measure: serves that many streams and says whether the level was met.
        start: the first number tried, 1 to `limit`.
        limit: the largest number tried.
    """

    async def meets(streams: int) -> bool:
        for _ in range(FAILURES_TO_BELIEVE):
            if await measure(streams):
                return True
        return False

    good, bad = 0, limit + 1
    streams = start
    while good < limit and bad - good > max(1, int(good * RESOLUTION)):
        if await meets(streams):
            good = streams
        else:
            bad = streams
        if bad > limit:
            streams = min(2 * good, limit)
        elif good == 0:
            streams = max(1, bad // 2)
        else:
            streams = (good + bad) // 2
    return Found(good, limited=good == limit)
