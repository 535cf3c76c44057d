"""The server's loop: its turns, their times, and polling in between."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog

from instep.frontends import Frontend
from instep.runtime.executor import ExecutorDied
from instep.streaming.service import ModelService

_RECEIVE_NS: Final = 2_000_000
"""The time for which front ends receive before a step."""
_SLICE_NS: Final = 50_000
"""The polling time before other work of the event loop gets its turn."""
_LATE_NS: Final = 1_000_000_000
"""A turn this late counts as a stall. After it, waiting messages have this time to be read before anything expires."""


class Loop:
    """Turns of the engines, whenever something has happened.

    In a turn every engine does its work without waiting, and each turn begins with another engine. Every engine has an
    executor of its own, so no engine waits for the steps of another.

    For a moment after each event the loop polls for the next one instead of sleeping (busy polling), because waking up
    takes longer than a small step: the core has to leave its idle state and its caches are cold. Each poll yields to
    other programs, so polling uses idle time and power only.

    Args:
        busy_poll_ns: the polling time while every model steps in a process of its own; 0 for none.
        on_bug: gets an exception in a turn, after which clients would wait in vain.
    """

    def __init__(self, busy_poll_ns: int, on_bug: Callable[[BaseException], None]) -> None:
        self.frontends: Sequence[Frontend] = ()
        self._services: deque[ModelService] = deque()
        """The services; the next turn begins with the first."""
        self._busy_poll_ns = busy_poll_ns
        self.busy_ns = 0
        """The total duration of turns, without polling."""
        self._on_bug = on_bug
        self._loop = asyncio.get_running_loop()
        self._is_due = self._is_polling = self._is_stopped = False
        self._poll_until_ns = 0

    def add(self, service: ModelService) -> None:
        """Take turns for a model from now on, also whenever one of its runs ends."""
        self._services.append(service)
        if (fd := service.engine.executor.signal_fd) is not None:
            self._loop.add_reader(fd, partial(self._run_ended, service))

    def remove(self, service: ModelService) -> None:
        """Take no more turns for a model; call this before its executor is stopped."""
        self._services.remove(service)
        if (fd := service.engine.executor.signal_fd) is not None:
            self._loop.remove_reader(fd)

    def start(self) -> None:
        """Take a turn whenever something arrives, from now on."""
        for frontend in self.frontends:
            if frontend.signal_fd is not None:
                self._loop.add_reader(frontend.signal_fd, self.turn)
        self.wake()

    def stop(self) -> None:
        """Take no more turns."""
        self._is_stopped = True
        for frontend in self.frontends:
            if frontend.signal_fd is not None:
                self._loop.remove_reader(frontend.signal_fd)
        for service in list(self._services):
            self.remove(service)

    def wake(self) -> None:
        """Take a turn soon, for an event that has no signal of its own."""
        if not self._is_due and not self._is_stopped:
            self._is_due = True
            self._loop.call_soon(self._turn_is_due)

    def _turn_is_due(self) -> None:
        self._is_due = False  # only here: a turn that something else takes leaves the one that is due in the queue
        self.turn()

    def _run_ended(self, service: ModelService) -> None:
        try:
            service.engine.executor.take_signal()
        except Exception as error:  # it has died
            self._on_bug(error)
        self.turn()

    def turn(self) -> None:
        """Take one turn. Its order alone decides the order of frames and requests on streams."""
        if self._is_stopped:
            return
        began_ns = time.monotonic_ns()
        try:
            has_received = self._turn()
            if has_received:
                self._poll()
            # A send may have taken the signal of an arrival, so it is looked for. At most one turn is due at a time.
            if self._is_request_beginning() or self._has_work():
                self.wake()
        except Exception as error:
            self._on_bug(error)
        self.busy_ns += time.monotonic_ns() - began_ns

    def _turn(self) -> bool:
        has_received = False
        for frontend in self.frontends:
            if self._is_request_beginning():
                break  # what came behind a request is taken once the request has begun
            has_received |= frontend.receive(_RECEIVE_NS)
        self._services.rotate()
        for service in self._services:
            has_received |= self._serve(service)
        return has_received

    def _serve(self, service: ModelService) -> bool:
        """Take the turn of one model; return whether runs have ended."""
        engine = service.engine
        has_ended = engine.collect()
        engine.flush()  # before what arrived meanwhile is admitted: those who waited longer are answered first
        while engine.lost:
            service.operations.lose(engine.lost.pop())
        engine.admit()
        if engine.wanted:
            service.operations.hibernation.wake_wanted()
        engine.schedule()
        if engine.executor.has_ended:  # it ran inline
            engine.collect()
            engine.flush()
            engine.schedule()
        return has_ended

    def _is_request_beginning(self) -> bool:
        return any(service.tasks.are_beginning for service in self._services)

    def _has_work(self) -> bool:
        try:
            for service in self._services:
                executor = service.engine.executor
                if service.engine.is_running:
                    executor.take_signal()
                if executor.has_ended:
                    return True
            # While a request begins nothing is received; `turn` comes back for what is behind it.
            return not self._is_request_beginning() and any(frontend.is_readable for frontend in self.frontends)
        except Exception as error:  # the executor has died
            self._on_bug(error)
            return False

    def _poll(self) -> None:
        """Start polling, unless that delays a step or the work under way takes longer anyway."""
        if any(
            not service.steps_apart or service.engine.expected_ns >= self._busy_poll_ns for service in self._services
        ):
            return
        self._poll_until_ns = time.monotonic_ns() + self._busy_poll_ns
        if not self._is_polling:
            self._is_polling = True
            self._loop.call_soon(self._poll_slice)

    def _poll_slice(self) -> None:
        now_ns = time.monotonic_ns()
        slice_ends_ns = min(now_ns + _SLICE_NS, self._poll_until_ns)
        while now_ns < slice_ends_ns and not self._is_stopped:
            if self._has_work():
                self.turn()
                break
            os.sched_yield()
            now_ns = time.monotonic_ns()
        self._is_polling = now_ns < self._poll_until_ns and not self._is_stopped
        if self._is_polling:
            self._loop.call_soon(self._poll_slice)


class Stall:
    """Detects stalls of the loop, when the process was stopped or the machine was too busy.

    Waiting messages may show that connections and streams are in use, so nothing may end for its silence before those
    are read.
    """

    def __init__(self) -> None:
        self._looked_ns = time.monotonic_ns()
        self._reads_until_ns = 0

    def look(self, now_ns: int) -> bool:
        """Whether waiting messages are still being read at that time; call it many times a second.

        For a loop that is always late, this is the case in every second call.
        """
        is_late, self._looked_ns = now_ns - self._looked_ns > _LATE_NS, now_ns
        if now_ns >= self._reads_until_ns:
            self._reads_until_ns = now_ns + _LATE_NS if is_late and not self._reads_until_ns else 0
        return self._reads_until_ns > 0


class Shutdown:
    """Ends the server, for whatever reason, and logs failures."""

    def __init__(self, log: structlog.stdlib.BoundLogger) -> None:
        self.requested = asyncio.Event()
        self.drains = True
        """Whether admitted frames are still answered."""
        self.failure: str | None = None
        """The reason that the server had to end; empty if there was none."""
        self.was_crash = False
        """Whether that reason is a signal that killed a stepping process."""
        self._log = log

    def stop(self, *, drain: bool = True) -> None:
        """End the server; one request not to drain is enough."""
        self.drains = self.drains and drain
        self.requested.set()

    def fail(self, reason: str) -> None:
        """End the server at once, because a vital part is broken."""
        if self.failure is None:
            self.failure = reason
            self._log.error("failed", reason=reason)
        self.stop(drain=False)

    def bug(self, error: BaseException) -> None:
        """Fail because an executor died or a bug raised an exception; otherwise clients would wait forever."""
        if isinstance(error, ExecutorDied):
            self.was_crash |= self.failure is None and error.killed_by is not None
            self.fail(str(error))
        else:
            self._log.error("bug in the server's loop", exc_info=error)
            self.fail(f"a bug in the server's loop: {error!r}")
