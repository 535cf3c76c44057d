"""A candidate beside a model that is served: a process that steps what is recorded in it, and compares outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import structlog

from instep.config import ModelConfig
from instep.models.errors import ModelError
from instep.server.background import Background, BackgroundProcess
from instep.server.beside import Beside
from instep.server.preparation import CannotServe, check_candidates, find_candidate, is_served
from instep.shadow import live
from instep.streaming.candidate import CandidateStatus
from instep.streaming.service import ModelService

_FINGERPRINT: Final = 8
"""Digits of a fingerprint in the log."""


class LiveShadow(BackgroundProcess):
    """Keeps the candidate running for as long as a service records, and notes in it how its outputs differ."""

    def __init__(self, service: ModelService, background: Background) -> None:
        assert service.candidate is not None
        super().__init__(service, background)
        self._found: CandidateStatus = service.candidate
        self._before = self._found
        """Findings of former processes."""
        self._position = service.engine.journal.newest
        """Frames up to there are not compared: the former server had them, or a former process."""

    async def stop(self, reason: str) -> None:
        """End the process, and say what was found by the newest status."""
        self._is_ending = True
        await self._end()
        found = self._found
        found.reason = found.reason or reason
        self._service.log.info(
            "shadowed",
            candidate=found.fingerprint[:_FINGERPRINT],
            reason=found.reason,
            frames=found.frames,
            equal=found.equal,
            largest_difference=_logged(found.largest),
            mean_difference=_logged(found.mean),
            dropped_streams=found.dropped,
        )

    def _command(self) -> list[str]:
        found, file = self._found, self._service.file
        assert file is not None
        return live.command(file, found.folder, found.fingerprint, found.share, self._position)

    def _began(self, pid: int) -> None:
        self._found.pid = pid
        self._before = replace(self._found)
        candidate = self._found.fingerprint[:_FINGERPRINT]
        self._service.log.info("shadowing", folder=str(self._found.folder), candidate=candidate, pid=pid)

    def _ended(self) -> None:
        self._found.pid, self._found.reported_s, self._found.streams = None, 0.0, 0

    def _will_restart(self, reason: str, in_s: float) -> None:
        self._service.log.warning("shadow restarts", reason=reason, in_s=in_s)

    def _was_killed(self, reason: str) -> None:
        self._service.log.warning("shadow killed", reason=reason)

    def _heard(self, said: dict[str, Any]) -> None:
        found, before = self._found, self._before
        if "error" in said:
            found.reason = said["error"]
            self._service.log.warning("shadow ended", reason=found.reason)
            return
        largest, mean = (math.inf if said[name] is None else said[name] for name in ("largest", "mean"))
        found.reported_s, found.streams = time.monotonic(), said["streams"]
        found.frames = before.frames + said["frames"]
        found.equal = before.equal + said["equal"]
        found.dropped = before.dropped + said["dropped"]
        found.largest = max(before.largest, largest)
        if said["frames"]:
            found.mean = (before.mean * before.frames + mean * said["frames"]) / found.frames
        self._position = max(self._position, said["position"])


def _logged(difference: float) -> float | str:
    return float(f"{difference:.3g}") if math.isfinite(difference) else "not finite"


class Shadows:
    """The candidates of a server's models, each beside the recording of its model."""

    def __init__(self, beside: Beside, background: Background, log: structlog.stdlib.BoundLogger) -> None:
        self._beside = beside
        self._background = background
        self._log = log
        self._running: dict[ModelService, LiveShadow] = {}

    def begin(self, service: ModelService) -> None:
        """Shadow a model, if it has a candidate."""
        if service.candidate is not None:
            self._running[service] = LiveShadow(service, self._background)

    async def end(self, service: ModelService, reason: str) -> None:
        """Shadow a model no longer, if anything does."""
        if service in self._running:
            await self._running.pop(service).stop(reason)

    async def follow(
        self, services: Iterable[ModelService], former: ModelConfig, wanted: ModelConfig, names: Sequence[str]
    ) -> None:
        """Shadow the models of a new configuration, which have these names, with the candidates that it names."""
        try:
            check_candidates(wanted, names)
        except ModelError as error:
            self._log.error("candidate not reloaded", reason=str(error))
            return
        for service in services:
            if service.name not in names:
                continue
            find = partial(find_candidate, wanted, service.name, service.about, is_only=len(names) == 1)
            try:
                found = await self._beside.do(find)
            except CannotServe:  # the server ends
                return
            except Exception as error:  # no memory, or a folder with things in it that nobody thought of
                reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
                self._log.error("candidate not reloaded", reason=reason)
                continue
            present, candidate = service.candidate, found and CandidateStatus(*found, wanted.shadow_share)
            if (present and not present.reason and present.key) == (candidate and candidate.key):
                continue
            if candidate is not None and candidate.fingerprint == service.about.fingerprint:
                before = former.candidate(service.name, is_only=len(names) == 1)
                if present or candidate.folder != before:  # else that was said when this version was loaded
                    service.log.info("not shadowed", reason=is_served(candidate.folder))
                candidate = None
            await self.end(service, "the configuration has changed")
            service.candidate = candidate
            self.begin(service)
