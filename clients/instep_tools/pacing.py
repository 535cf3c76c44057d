"""Clocks, and requests to stop a command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

LONGEST_NAP_S: Final = 0.1
"""The longest interval at which a wait checks for a requested stop."""

_LOOP_GRAIN_S: Final = 0.002
"""asyncio rounds waits up to whole milliseconds; the rest of a wait is slept in a thread, to some 0.1 ms."""


class Clock(Protocol):
    """The clock of the commands; tests use their own."""

    def now(self) -> float:
        """Seconds since a fixed time; never decreases."""
        ...

    async def sleep_until(self, moment: float) -> None:
        """Return at `moment`, or immediately if it has passed."""
        ...


class WallClock:
    """The machine's monotonic clock, for one event loop, as a context manager."""

    def __init__(self) -> None:
        self._sleeper = ThreadPoolExecutor(1, "instep-clock")

    def now(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()

    async def sleep_until(self, moment: float) -> None:
        """Return at `moment`, up to some 0.1 ms late; one sleeper at a time."""
        left = moment - time.monotonic()
        if left > _LOOP_GRAIN_S:
            await asyncio.sleep(left - _LOOP_GRAIN_S)
            left = moment - time.monotonic()
        if left > 0:
            await asyncio.get_running_loop().run_in_executor(self._sleeper, time.sleep, left)

    def __enter__(self) -> WallClock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._sleeper.shutdown()


@dataclass(frozen=True, slots=True)
class Pace:
    """The rate and the amount of sending."""

    rate_hz: float | None = None
    """Frames per second for each stream; None for as fast as possible, or for the frames' own times."""
    frames: int | None = None
    """The most frames of each stream."""
    speed: float | None = None
    """The factor on real time; infinite for as fast as possible; None for 1 if times are known, else infinite."""


class Stop:
    """A request to end the command: it sends nothing new, drains and closes."""

    def __init__(self) -> None:
        self.connected = False
        """Whether there ever was a connection, so that answers may be outstanding."""
        self.gave_up = False
        """Whether the command ended without a connection, so it could neither drain nor close."""
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._event.is_set()

    @property
    def words(self) -> str:
        """A phrase about how the command ended after a request."""
        if self.gave_up:
            return "stopped without a connection, so the last frames that were sent may have no answer"
        return "stopped, all streams closed"

    def request(self) -> None:
        """Request a stop; further calls change nothing. Call this in the event loop's thread."""
        self._event.set()

    async def wait(self) -> None:
        """Return when a stop is requested."""
        await self._event.wait()


async def wait_until(moment: float, clock: Clock, stop: Stop) -> bool:
    """Wait for `moment`; False if a stop is requested first. Always yields to other tasks."""
    await asyncio.sleep(0)
    while not stop.requested:
        left = moment - clock.now()
        if left <= 0:
            return True
        await clock.sleep_until(moment if left <= LONGEST_NAP_S else clock.now() + LONGEST_NAP_S)
    return False


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """A factory of uvloop's event loop, if installed, which makes a faster load generator."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
