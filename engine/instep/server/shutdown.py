"""How the server ends: by request, drained or forced, or by a failure."""

from __future__ import annotations

import asyncio

import structlog

from instep.runtime.executor import ExecutorDied


class Shutdown:
    """The one place that decides that the server ends; a failure is told to the log."""

    def __init__(self, log: structlog.stdlib.BoundLogger) -> None:
        self.requested = asyncio.Event()
        self.drains = True
        """Whether everything that was admitted is still answered."""
        self.failure: str | None = None
        """Why the server had to end, if it had to."""
        self.was_crash = False
        """Whether that is a signal that has killed a process that steps."""
        self._log = log

    def stop(self, *, drain: bool = True) -> None:
        """End the server; one request not to drain is enough."""
        self.drains = self.drains and drain
        self.requested.set()

    def fail(self, reason: str) -> None:
        """Something the server cannot work without is broken: end it at once."""
        if self.failure is None:
            self.failure = reason
            self._log.error("failed", reason=reason)
        self.stop(drain=False)

    def bug(self, error: BaseException) -> None:
        """Fail because an executor has died or a bug has raised: clients would otherwise wait for ever."""
        if isinstance(error, ExecutorDied):
            self.was_crash |= self.failure is None and error.killed_by is not None
            self.fail(str(error))
        else:
            self._log.error("bug in the server's loop", exc_info=error)
            self.fail(f"a bug in the server's loop: {error!r}")
