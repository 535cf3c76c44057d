"""Proof while serving: a process for each recording that computes committed frames again and compares them."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from instep.server.background import Background, BackgroundProcess
from instep.streaming.service import ModelService
from instep.streaming.verification import Verification, WrongFrame
from instep.verify import live


class LiveVerification(BackgroundProcess):
    """Keeps a checking process running for as long as a service records, and notes what it finds in `verification`."""

    def __init__(self, service: ModelService, background: Background) -> None:
        assert service.verification is not None
        super().__init__(service, background)
        self._found: Verification = service.verification
        self._before = Verification()
        """Findings of former processes."""
        self._next = live.Begin(applied=0)
        """Where the next process begins."""
        if service.recovery is not None:
            self._next = live.Begin(service.recovery.checkpoint_position)

    async def stop(self, *, finishes: bool) -> None:
        """End the process. Where it `finishes` and is not late, it has a moment to check the newest frames first."""
        self._is_ending = True
        journal, found, finish_s = self._service.engine.journal, self._found, self._background.finish_s
        if finishes and self._process is not None and found.reported_s and found.lag_s < finish_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(finish_s):
                    await journal.committed(journal.newest)
                    await self._finish()
        await self._end()
        if not found.is_off and self._next.position < journal.last_inputs:
            self._service.log.info(
                "not all verified",
                reason=f"the frames after position {self._next.position} of the recording were not compared",
                next=f"instep verify {shlex.quote(str(self._service.file))} checks all of it",
            )

    def _command(self) -> list[str]:
        assert self._service.file is not None
        return live.command(self._service.file)

    def _began(self, pid: int) -> None:
        found = self._found
        self._before = Verification(
            frames_total=found.frames_total,
            mismatches_total=found.mismatches_total,
            skipped=found.skipped,
            skipped_by=found.skipped_by,
        )
        found.pid = pid
        found.began_s = found.began_s or time.monotonic()
        self._write(asdict(self._next))
        self._service.log.info("verifying", file=str(self._service.file), pid=pid)

    def _ended(self) -> None:
        self._found.pid, self._found.streams = None, 0

    def _will_restart(self, reason: str, in_s: float) -> None:
        self._service.log.warning("checker restarts", reason=reason, in_s=in_s)

    def _was_killed(self, reason: str) -> None:
        self._service.log.warning("checker killed", reason=reason)

    def _heard(self, said: dict[str, Any]) -> None:
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
        had_unchecked = found.unchecked
        found.skipped_by = dict(Counter(before.skipped_by) + Counter(said["skipped_by"]))
        if found.unchecked and not had_unchecked:
            self._service.log.warning(
                "trimmed unchecked",
                frames=found.unchecked,
                reason="the history was trimmed before the checker had read it",
                next="keep more of it (recording.keep_bytes, recording.keep_s), or leave the checker more time; "
                "verify_unchecked_frames_total counts such frames",
            )
        found.streams, found.share, found.notes = said["streams"], said["share"], tuple(said["notes"])
        found.reported_lag_s, found.reported_s = said["lag_s"], time.monotonic()
        self._next = live.Begin(said["position"], said["waiting"], said["applied"], said.get("wrong", self._next.wrong))
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
