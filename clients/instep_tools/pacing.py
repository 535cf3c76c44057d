"""Clocks, and requests to end a command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

LONGEST_NAP_S: Final = 0.1
"""A wait checks at least this often whether a stop was requested."""

_LOOP_GRAIN_S: Final = 0.002
"""asyncio rounds its waits up to whole milliseconds; the rest of a wait is slept in a thread, to some 0.1 ms."""


class Clock(Protocol):
    """The clock of the commands; tests bring their own."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    async def sleep_until(self, moment: float) -> None:
        """Return at `moment`, or at once if it has passed."""
        ...


class WallClock:
    """The machine's monotonic clock, for one event loop, as a context manager."""

    def __init__(self) -> None:
        self._sleeper = ThreadPoolExecutor(1, "instep-client-clock")

    def now(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()

    async def sleep_until(self, moment: float) -> None:
        """Return at `moment`, late by some 0.1 ms; one sleeper at a time."""
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


class Stop:
    """A request to end the command: no new sends, then drain and close."""

    def __init__(self) -> None:
        self.connected = False
        """Whether there ever was a connection, so that answers may be outstanding."""
        self.gave_up = False
        """Whether the command ended without a connection, so that it could neither drain nor close."""
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        """Whether it was asked to end."""
        return self._event.is_set()

    @property
    def words(self) -> str:
        """The end of the command after a request, in words."""
        if self.gave_up:
            return "stopped without a connection, so the last frames that were sent may have no answer"
        return "stopped, all streams closed"

    def request(self) -> None:
        """Request the end; further calls change nothing. Call it in the event loop's thread."""
        self._event.set()

    async def wait(self) -> None:
        """Return when it was asked to end."""
        await self._event.wait()


async def wait_until(moment: float, clock: Clock, stop: Stop) -> bool:
    """Wait for `moment`; True when it came, False when a stop was requested first. Always lets others run."""
    await asyncio.sleep(0)
    while not stop.requested:
        left = moment - clock.now()
        if left <= 0:
            return True
        await clock.sleep_until(moment if left <= LONGEST_NAP_S else clock.now() + LONGEST_NAP_S)
    return False


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The loop of uvloop where it is installed: it makes a faster load generator."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
