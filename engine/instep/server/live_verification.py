"""Live verification: one process steps the recordings of a server's models again and compares the outputs.

The process is `instep.replay.live_process`. If it dies, another one continues each recording at the same position.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from instep.interrupts import signal_name
from instep.streaming.service import ModelService
from instep.streaming.verification import Verification, WrongFrame

LINE_BYTES: Final = 2**24
"""The longest line of the process; after a longer one it is ended."""
_FIRST_PAUSE_S: Final = 1.0
"""The pause before a process that has ended is replaced; each further pause is twice as long."""
_LONGEST_PAUSE_S: Final = 60.0
_FINISH_S: Final = 2.0
"""The time for checking the newest frames at a clean shutdown."""
_LOOK_S: Final = 1.0


async def start_checker() -> Process:
    """Start the checking process in a fresh interpreter."""
    # In a session of its own, so that Ctrl-C in the terminal is the server's alone.
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "instep.replay.live_process"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
        limit=LINE_BYTES,
        start_new_session=True,
    )


@dataclass(frozen=True, slots=True)
class Supervision:
    """Options for running the process.

    Attributes:
        start: starts it. It may raise OSError.
        most_wal_bytes: the size of a WAL beyond which the process is killed. A process that stops in the middle of a
            read keeps the WAL from being reused, and a WAL of 1 GiB would end the server.
    """

    start: Callable[[], Awaitable[Process]] = start_checker
    most_wal_bytes: int = 2**28


@dataclass(slots=True, eq=False)
class _Followed:
    service: ModelService
    found: Verification
    position: int
    """All positions up to this one were checked or skipped."""
    applied: int | None
    """The number of frames applied up to there; None if the recording has it."""
    before: Verification = field(default_factory=Verification)
    """Findings of former processes."""
    has_left: asyncio.Event = field(default_factory=asyncio.Event)
    is_told_late: bool = False


class LiveVerification:
    """Runs the checking process, and stores its findings in each service's `verification`."""

    def __init__(self, supervision: Supervision, log: structlog.stdlib.BoundLogger) -> None:
        self._supervision = supervision
        self._log = log
        self._followed: dict[str, _Followed] = {}
        self._process: Process | None = None
        self._last_words = ""
        self._tasks: list[asyncio.Task[None]] = []

    def follow(self, service: ModelService) -> None:
        """Check the recording of a service from now on."""
        assert service.verification is not None
        recovered = service.recovery
        begin = (0, 0) if recovered is None else (recovered.checkpoint_position, None)
        self._followed[str(service.file)] = _Followed(service, service.verification, *begin)
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]
        elif self._process is not None:
            self._began(str(service.file), self._process.pid)

    async def leave(self, services: Sequence[ModelService], *, finishes: bool) -> None:
        """Stop checking services; with `finishes`, only after the newest frames of recordings that are not late."""
        left = {file: each for file, each in self._followed.items() if each.service in services}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                for file, each in left.items():
                    is_late = not each.found.reported_s or each.found.lag_s >= _FINISH_S
                    is_checked = finishes and not is_late and self._process is not None
                    if is_checked:
                        each.has_left.clear()  # the end of a former process has set it
                        await each.service.engine.journal.committed(each.service.engine.journal.newest)
                    else:
                        each.has_left.set()
                    self._write({"leave": file, "finish": is_checked})
                for each in left.values():
                    await each.has_left.wait()
        for file, each in left.items():
            del self._followed[file]
            if not each.found.is_off and each.position < each.service.engine.journal.last_inputs:
                each.service.log.info(
                    "not all verified",
                    reason=f"the frames after position {each.position} of the recording were not compared",
                    next=f"instep verify {shlex.quote(file)} checks all of it",
                )
        if not self._followed:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._tasks = []

    # ── The process ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                status = await self._listen()
                ended = f"has ended by {signal_name(-status)}" if status < 0 else f"has ended with {status}"
            except OSError as error:
                ended = f"cannot be started: {error}"
            except Exception as error:  # a bug there or here, for which the server need not end
                ended = f"was ended: {error!r}"
            if time.monotonic() - began > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            reason = f"the process {ended}{self._last_words and f': {self._last_words}'}"
            self._log.warning("checker restarts", reason=reason, in_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _listen(self) -> int:
        """Run a process until it ends; return its exit status, negative for a signal."""
        self._last_words = ""
        self._process = process = await self._supervision.start()
        try:
            for file in self._followed:
                self._began(file, process.pid)
            assert process.stdout is not None
            async for line in process.stdout:
                self._hear(line)
            return await process.wait()
        finally:
            self._process = None
            for each in self._followed.values():
                each.found.pid = None
                each.has_left.set()  # nobody finishes it any more
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            while process.stdout is not None and await process.stdout.read(LINE_BYTES):
                pass  # `wait` waits for the end of the pipe, which nobody reads on while the reader's buffer is full
            await process.wait()

    async def _watch(self) -> None:
        """Log late recordings, and kill a process that may keep a recording from being written."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for file, each in self._followed.items():
                if each.found.is_late and not each.is_told_late:
                    reason = "nothing was heard of the process" if each.found.is_silent else "it has too little time"
                    each.service.log.warning("checker late", reason=reason, lag_s=round(each.found.lag_s, 1))
                each.is_told_late = each.found.is_late
                with contextlib.suppress(OSError):
                    if os.stat(f"{file}-wal").st_size > self._supervision.most_wal_bytes and self._process is not None:
                        reason = f"{file}-wal has grown, perhaps because it reads"
                        each.service.log.warning("checker killed", reason=reason)
                        self._process.kill()

    def _began(self, file: str, pid: int) -> None:
        each = self._followed[file]
        found = each.found
        if found.is_off:
            return
        each.before = Verification(
            frames_total=found.frames_total, mismatches_total=found.mismatches_total, skipped=found.skipped
        )
        found.pid, found.began_s = pid, found.began_s or time.monotonic()
        self._write({"follow": file, "position": each.position, "applied": each.applied})
        each.service.log.info("verifying", file=file, pid=pid)

    def _write(self, fields: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")

    def _hear(self, line: bytes) -> None:
        try:
            said: Any = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):  # Python's own words about a bug, or those of a library
            self._last_words = line.decode(errors="replace").strip() or self._last_words
        elif (each := self._followed.get(said["file"])) is not None:
            self._note(each, said)

    # ── Findings ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _note(self, each: _Followed, said: dict[str, Any]) -> None:
        found, before, log = each.found, each.before, each.service.log
        if "error" in said:
            found.is_off, found.reason, each.is_told_late = True, said["error"], True
            log.error("cannot verify", reason=found.reason)
            each.has_left.set()
            return
        if said["unreadable"] and not found.reason:
            log.warning("checker waits", reason=said["unreadable"])
        if said["trimmed"] and not found.has_trimmed:
            log.warning(
                "trimmed unchecked",
                reason="the history was trimmed before the checker had read it",
                next="keep more of it (recording.keep_bytes, recording.keep_s), or leave the checker more time",
            )
        found.reason, found.has_trimmed = said["unreadable"], said["trimmed"]
        if (skipped := before.skipped + said["skipped"] - found.skipped) > 0:
            verify = f"instep verify {shlex.quote(str(each.service.file))}"
            log.warning("skipped", frames=skipped, reason="the checker has too little time", next=verify)
        found.frames_total = before.frames_total + said["frames"]
        found.mismatches_total = before.mismatches_total + said["mismatches_total"]
        found.skipped = before.skipped + said["skipped"]
        found.reported_lag_s, found.reported_s = said["lag_s"], time.monotonic()
        each.position, each.applied = said["position"], said["applied"]
        for wrong in said["mismatches"]:
            self._alarm(each, WrongFrame(**wrong))
        if said["left"]:
            each.has_left.set()

    def _alarm(self, each: _Followed, wrong: WrongFrame) -> None:
        each.found.mismatch = wrong
        each.service.events.add("mismatch", wrong.stream, wrong.sentence, wrong.seq)
        verify = f"instep verify {shlex.quote(str(each.service.file))} --streams {shlex.quote(wrong.stream)}"
        each.service.log.error(
            "mismatch",
            stream=wrong.stream,
            seq=wrong.seq,
            position=wrong.position,
            reason=wrong.sentence,
            next=f"do not trust the stream's outputs from this frame on; {verify} says what differs. If it is not the "
            "only one, stop the server and test the machine's memory and processor",
        )
