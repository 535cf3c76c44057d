"""Keeping a process running beside the server, at the lowest priority, that reads what a service records."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from instep.background import CANNOT
from instep.interrupts import signal_name
from instep.streaming.service import ModelService

LINE_BYTES: Final = 2**24
"""A process that writes a longer line is ended."""
_LONGEST_PAUSE_S: Final = 60.0
_LOOK_S: Final = 1.0


class Process(Protocol):
    """A child process with pipes; `asyncio.subprocess.Process` is one."""

    @property
    def pid(self) -> int:
        """Its id."""
        ...

    @property
    def stdin(self) -> asyncio.StreamWriter | None:
        """Its standard input."""
        ...

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """Its standard output and error."""
        ...

    def kill(self) -> None:
        """SIGKILL; ProcessLookupError is allowed where it has ended."""

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        ...


async def start_module(words: Sequence[str]) -> Process:
    """Run a module with arguments in a fresh interpreter."""
    # In a session of its own, so that Ctrl-C in the terminal is the server's alone.
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *words),
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
        limit=LINE_BYTES,
        start_new_session=True,
    )


@dataclass(frozen=True, slots=True)
class Background:
    """Settings of the processes that a server runs beside itself.

    Attributes:
        start: starts a process: a module's name, and arguments for its `main`. It may raise OSError.
        first_pause_s: before a process that has ended is followed by another one; each further pause is twice as long.
        most_wal_bytes: of a recording. A process that stops in the middle of a read keeps the WAL from being reused,
            and a WAL of 1 GiB ends the server: beyond this size, the process is killed.
        finish_s: time for checking the newest frames when the server ends in order.
    """

    start: Callable[[Sequence[str]], Awaitable[Process]] = start_module
    first_pause_s: float = 1.0
    most_wal_bytes: int = 2**28
    finish_s: float = 2.0


class BackgroundProcess(ABC):
    """Keeps a process running beside a service that records, and passes on what it reports (`instep.background`)."""

    def __init__(self, service: ModelService, background: Background) -> None:
        self._service = service
        self._background = background
        self._last_words = ""
        self._is_ending = False
        """Whether no other process is to follow this one."""
        self._process: Process | None = None
        self._running = asyncio.create_task(self._run())

    # ── For subclasses ─────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def _command(self) -> list[str]:
        """The module that the next process runs, and its arguments."""

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
        pause_s = self._background.first_pause_s
        while True:
            began = time.monotonic()
            try:
                status = await self._listen()
                ended = f"has ended by {signal_name(-status)}" if status < 0 else f"has ended with {status}"
            except OSError as error:
                status, ended = 1, f"cannot be started: {error}"
            except Exception as error:  # a bug there or here, for which the server need not end
                status, ended = 1, f"was ended: {error!r}"
            if status == CANNOT or self._is_ending:
                return
            reason = f"the process {ended}{self._last_words and f': {self._last_words}'}"
            if time.monotonic() - began > _LONGEST_PAUSE_S:
                pause_s = self._background.first_pause_s
            self._will_restart(reason, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _listen(self) -> int:
        """Run a process until it ends; its exit status, negative for a signal."""
        self._last_words = ""
        self._process = process = await self._background.start(self._command())
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
            while process.stdout is not None and await process.stdout.read(LINE_BYTES):
                pass  # `wait` waits for the end of the pipe, which nobody reads on while the reader's buffer is full
            await process.wait()

    async def _guard(self, process: Process, wal: str) -> None:
        """Kill a process that may keep the recording from being written."""
        while True:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(OSError):
                if os.stat(wal).st_size > self._background.most_wal_bytes:
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
