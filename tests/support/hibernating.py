"""Streams that hibernate soon, on a clock that tests turn."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from instep.core.typing import U64
from instep.streaming.hibernation import IdleLimits
from tests.support.streaming import StreamingEngine

SOON_NS = 10**9
"""After so long streams hibernate here."""
LATER_NS = 100 * SOON_NS
LIMITS = IdleLimits(max_idle_ns=LATER_NS, park_ns=LATER_NS, max_parked=1000, hibernate_after_ns=SOON_NS)
ZERO = np.zeros(1, np.uint64)


async def tick(kit: StreamingEngine, after_ns: int = 2 * SOON_NS, count: int = 1) -> None:
    """What is due after such a time."""
    for _ in range(count):
        kit.reaper.tick(time.monotonic_ns() + after_ns)
        kit.hibernation.tick(time.monotonic_ns() + after_ns)
        await kit.settle()
        await kit.durable()
        while len(kit.tasks):
            await asyncio.sleep(0.001)


def have(*seqs: int) -> U64:
    return np.array(seqs, np.uint64)
