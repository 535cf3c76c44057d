"""The audit: who did what, in lines of JSON that never hold up the server."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

MOST_LINES: Final = 4096
"""Lines that wait for the disk; further ones are dropped."""
_CLOSE_S: Final = 1.0
_AUDITED: Final = frozenset(
    {
        *("configuration", "ready", "stopping", "stopped"),
        *("connected", "disconnected", "refused", "handshakes failed", "audited request"),
        *("reloaded", "not reloaded", "peers reloaded", "peers not reloaded", "reload kept"),
        *("loaded", "swapped", "unloaded", "models reloaded", "models not reloaded"),
    }
)
"""The lines of the log, whatever their level, that belong to the audit."""


class Audit:
    """A processor of structlog that also appends some lines of the log, whatever `log.level` is, to a file.

    Without a path, it does nothing.

    A thread writes them. Lines that it cannot write in time, or not at all, are dropped and counted, and the file says
    how many with the next line. It is opened for each line, and so follows its name as `log.file` does.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_LINES)
        self._writer: threading.Thread | None = None
        self.log: structlog.stdlib.BoundLogger | None = None
        """Where the first line of several is reported that cannot be written."""
        self._surplus = 0
        """Lines that came too fast."""
        self.failed = 0
        """Lines that could not be written."""
        self._refusals: dict[tuple[object, object], float] = {}
        """By principal and code, when a refusal was last taken."""

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Take a line of the log, at most one a second of each kind of refusal."""
        if self._path is None or event["event"] not in _AUDITED:
            return event
        line = {"timestamp": datetime.now(UTC).isoformat(), **event}
        if line["event"] == "refused":
            kind, now_s = (line.get("principal"), line.get("code")), time.monotonic()
            if now_s - self._refusals.get(kind, -1.0) < 1:
                return event
            self._refusals[kind] = now_s
        if self._writer is None:  # not earlier, because a process that was forked since would have no thread
            self._writer = threading.Thread(target=self._write, args=(self._path,), name="instep-audit", daemon=True)
            self._writer.start()
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._surplus += 1
        return event

    def _write(self, path: Path) -> None:
        told, is_failing = 0, False
        while (line := self._lines.get()) is not None:
            if (dropped := self._surplus + self.failed) > told:
                line["dropped_before"] = dropped - told
            try:
                with open(path, "a", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
                    file.write(f"{json.dumps(line, default=str)}\n")
                told, is_failing = dropped, False
            except OSError as error:
                if self.log is not None and not is_failing:
                    self.log.warning("audit not written", file=str(path), reason=error.strerror)
                self.failed += 1
                is_failing = True

    def close(self) -> None:
        """Wait until everything is written, but not for long."""
        if self._writer is not None:
            with suppress(queue.Full):
                self._lines.put(None, timeout=_CLOSE_S)
            self._writer.join(_CLOSE_S)
