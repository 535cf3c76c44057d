"""Staying awake: for a moment after each thing that happened, the loop looks for the next one rather than sleep.

To sleep and be woken costs more than a small step does: the core has to wake up, and its caches are cold. (For the
latency of one stream, see docs/performance.md.) Every look gives the core to whoever else has something to do, so it is
idle time that is used up, and power.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Final

_SLICE_NS: Final = 50_000
"""How long it looks before the other work of the loop gets its turn."""


class Vigil:
    """Keeps an event loop awake.

    Args:
        loop: the loop.
        look: does what there is to do; nothing true where there is nothing.
        expected_ns: how long what is under way is expected to take; what comes meanwhile waits for it anyway, so
            there is no staying awake where that is as long as `spin_ns`.
        spin_ns: how long to stay awake; 0 for not at all.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        look: Callable[[], bool | None],
        expected_ns: Callable[[], int],
        spin_ns: int,
    ) -> None:
        self._loop = loop
        self._look = look
        self._expected_ns = expected_ns
        self._spin_ns = spin_ns
        self._until_ns = 0
        self._is_kept = False

    def stay(self) -> None:
        """Something happened: look for more from now on."""
        if self._expected_ns() >= self._spin_ns:
            return
        self._until_ns = time.monotonic_ns() + self._spin_ns
        if not self._is_kept:
            self._is_kept = True
            self._loop.call_soon(self._watch)

    def _watch(self) -> None:
        now_ns = time.monotonic_ns()
        slice_ends_ns = now_ns + _SLICE_NS
        while now_ns < self._until_ns and now_ns < slice_ends_ns and not self._look():
            os.sched_yield()
            now_ns = time.monotonic_ns()
        self._is_kept = now_ns < self._until_ns
        if self._is_kept:
            self._loop.call_soon(self._watch)
