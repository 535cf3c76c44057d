"""Proof while serving: a process for each recording that computes committed frames again and compares them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import Counter
from dataclasses import asdict
from typing import Any, Final

from instep.streaming.service import ModelService
from instep.streaming.verification import Verification, WrongFrame
from instep.verify import live

_LINE_BYTES: Final = 2**24
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_LOOK_S: Final = 1.0
_FINISH_S: Final = 2.0
"""How long a server that ends in order waits for the newest frames to be checked."""
_MOST_WAL_BYTES: Final = 2**28
"""A checker that stops in the middle of a read keeps the WAL from being reused, and a WAL of 1 GiB ends the server."""


class LiveVerification:
    """Keeps a checking process running for as long as a service records, and notes what it finds.

    Args:
        service: records; its `verification` is kept up to date.
    """

    def __init__(self, service: ModelService) -> None:
        assert service.verification is not None
        self._found: Verification = service.verification
        self._service = service
        self._before = Verification()
        """Findings of former processes."""
        self._next = live.Begin(0 if service.recovery is None else service.recovery.checkpoint_position)
        """Where the next process begins."""
        self._last_words = ""
        self._process: Process | None = None
        self._is_ending = False
        self._running = asyncio.create_task(self._run())

    async def stop(self, *, finishes: bool) -> None:
        """End the process. Where it `finishes` and is not late, it has `_FINISH_S` to check the newest frames first."""
        self._is_ending = True
        journal, found = self._service.engine.journal, self._found
        if finishes and self._process is not None and found.reported_s and found.lag_s < _FINISH_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FINISH_S):
                    await journal.committed(journal.newest)
                    if self._process is not None and self._process.stdin is not None:
                        self._process.stdin.close()
                    await asyncio.wait([self._running])
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        if not found.is_off and self._next.position < journal.last_inputs:
            self._service.log.info(
                "not all verified",
                reason=f"the frames after position {self._next.position} of the recording were not compared",
                next=f"instep verify {shlex.quote(str(self._service.file))} checks all of it",
            )

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                status = await self._check()
                ended = f"has ended by {signal.Signals(-status).name}" if status < 0 else f"has ended with {status}"
            except OSError as error:
                status, ended = 1, f"cannot be started: {error}"
            except Exception as error:  # a bug there or here, for which the server need not end
                status, ended = 1, f"was ended: {error!r}"
            if status == live.CANNOT or self._is_ending:
                return
            reason = f"the process that checks {ended}{self._last_words and f': {self._last_words}'}"
            if time.monotonic() - began > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._service.log.warning("checker restarts", reason=reason, in_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _check(self) -> int:
        """Run a process until it ends; its exit status, negative for a signal."""
        file, found = self._service.file, self._found
        assert file is not None
        self._last_words = ""
        self._before = Verification(
            frames_total=found.frames_total,
            mismatches_total=found.mismatches_total,
            skipped=found.skipped,
            skipped_by=found.skipped_by,
        )
        # In a session of its own, so that Ctrl-C in the terminal is the server's alone.
        process = await asyncio.create_subprocess_exec(
            *live.command(file), stdin=PIPE, stdout=PIPE, stderr=STDOUT, limit=_LINE_BYTES, start_new_session=True
        )
        self._process = process
        guarding = asyncio.create_task(self._guard(process, f"{file}-wal"))
        found.pid = process.pid
        found.began_s = found.began_s or time.monotonic()
        self._service.log.info("verifying", file=str(file), pid=process.pid)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(self._next)).encode() + b"\n")
            async for line in process.stdout:
                self._heard(line)
            return await process.wait()
        finally:
            guarding.cancel()
            found.pid, found.streams, self._process = None, 0, None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _guard(self, process: Process, wal: str) -> None:
        """Kill a process that may keep the recording from being written."""
        while True:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(OSError):
                if os.stat(wal).st_size > _MOST_WAL_BYTES:
                    self._service.log.warning("checker killed", reason=f"{wal} has grown, perhaps because it reads")
                    process.kill()
                    return

    def _heard(self, line: bytes) -> None:
        try:
            said: Any = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):  # Python's own words about a bug, or those of a library
            self._last_words = line.decode(errors="replace").strip() or self._last_words
            return
        found, before = self._found, self._before
        if "error" in said:
            found.is_off, found.reason = True, said["error"]
            self._service.log.error("cannot verify", reason=found.reason)
            return
        if said["notes"] and tuple(said["notes"]) != found.notes:
            self._service.log.warning("verifying within a tolerance", reason="; ".join(said["notes"]))
        if said["unreadable"] and not found.reason:
            self._service.log.warning("checker waits", reason=said["unreadable"])
        found.reason = said["unreadable"]
        found.frames_total = before.frames_total + said["frames"]
        found.mismatches_total = before.mismatches_total + said["mismatches_total"]
        # A counter must not fall, though a checker that takes on more streams compares frames that it had left out.
        found.skipped = max(found.skipped, before.skipped + said["skipped"])
        found.skipped_by = dict(Counter(before.skipped_by) + Counter(said["skipped_by"]))
        found.streams, found.share, found.notes = said["streams"], said["share"], tuple(said["notes"])
        found.reported_lag_s, found.reported_s = said["lag_s"], time.monotonic()
        self._next = live.Begin(said["position"], said["waiting"], said.get("wrong", self._next.wrong))
        for each in said["mismatches"]:
            self._alarm(WrongFrame(**{key: each[key] for key in ("stream", "seq", "expected", "got", "sentence")}))

    def _alarm(self, wrong: WrongFrame) -> None:
        self._found.mismatch = wrong
        self._service.events.add("mismatch", wrong.stream, wrong.sentence, wrong.seq)
        verify = f"instep verify {shlex.quote(str(self._service.file))} --stream {shlex.quote(wrong.stream)}"
        self._service.log.error(
            "mismatch",
            stream=wrong.stream,
            seq=wrong.seq,
            reason=wrong.sentence,
            next=f"do not trust the stream's outputs from this frame on; {verify} says what differs. If it is not the "
            "only one, stop the server and test the machine's memory and processor",
        )
