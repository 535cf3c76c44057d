"""Keeping a process running beside the server, at the lowest priority, that reads what a service records."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from asyncio.subprocess import PIPE, STDOUT, Process
from typing import Any, Final

from instep.background import CANNOT
from instep.streaming.service import ModelService

_LINE_BYTES: Final = 2**24
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_LOOK_S: Final = 1.0
_MOST_WAL_BYTES: Final = 2**28
"""A process that stops in the middle of a read keeps the WAL from being reused, and a WAL of 1 GiB ends the server."""


class BackgroundProcess(ABC):
    """Keeps a process running beside a service that records, and passes on what it reports (`instep.background`)."""

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._last_words = ""
        self._is_ending = False
        """Whether no other process is to follow this one."""
        self._process: Process | None = None
        self._running = asyncio.create_task(self._run())

    # ── For subclasses ─────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def _command(self) -> list[str]:
        """The command line of the next process."""

    @abstractmethod
    def _began(self, pid: int) -> None:
        """A process has begun."""

    @abstractmethod
    def _heard(self, said: dict[str, Any]) -> None:
        """A process has reported this."""

    @abstractmethod
    def _ended(self) -> None:
        """The process has ended, and another one may begin later."""

    @abstractmethod
    def _will_restart(self, reason: str, in_s: float) -> None:
        """Another one begins in some seconds."""

    @abstractmethod
    def _was_killed(self, reason: str) -> None:
        """The process was killed, for the sake of the server."""

    def _write(self, fields: dict[str, Any]) -> None:
        """Write a line to the standard input of the process."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")

    async def _finish(self) -> None:
        """Close the standard input of the process, and wait until it has ended."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await asyncio.wait([self._running])

    async def _end(self) -> None:
        """End the process at once."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    # ── Supervision ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                status = await self._listen()
                ended = f"has ended by {signal.Signals(-status).name}" if status < 0 else f"has ended with {status}"
            except OSError as error:
                status, ended = 1, f"cannot be started: {error}"
            except Exception as error:  # a bug there or here, for which the server need not end
                status, ended = 1, f"was ended: {error!r}"
            if status == CANNOT or self._is_ending:
                return
            reason = f"the process {ended}{self._last_words and f': {self._last_words}'}"
            if time.monotonic() - began > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._will_restart(reason, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _listen(self) -> int:
        """Run a process until it ends; its exit status, negative for a signal."""
        self._last_words = ""
        # In a session of its own, so that Ctrl-C in the terminal is the server's alone.
        process = await asyncio.create_subprocess_exec(
            *self._command(), stdin=PIPE, stdout=PIPE, stderr=STDOUT, limit=_LINE_BYTES, start_new_session=True
        )
        self._process = process
        guarding = asyncio.create_task(self._guard(process, f"{self._service.file}-wal"))
        self._began(process.pid)
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                self._hear(line)
            return await process.wait()
        finally:
            guarding.cancel()
            self._process = None
            self._ended()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            while process.stdout is not None and await process.stdout.read(_LINE_BYTES):
                pass  # `wait` waits for the end of the pipe, which nobody reads on while the reader's buffer is full
            await process.wait()

    async def _guard(self, process: Process, wal: str) -> None:
        """Kill a process that may keep the recording from being written."""
        while True:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(OSError):
                if os.stat(wal).st_size > _MOST_WAL_BYTES:
                    self._was_killed(f"{wal} has grown, perhaps because it reads")
                    process.kill()
                    return

    def _hear(self, line: bytes) -> None:
        try:
            said: Any = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict):
            self._heard(said)
        else:  # Python's own words about a bug, or those of a library
            self._last_words = line.decode(errors="replace").strip() or self._last_words
