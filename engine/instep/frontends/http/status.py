"""The current status of a server and its models: readiness, and the object of /api/stats."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Final

from instep.frontends.http import WatchedServer
from instep.frontends.http.answers import to_json
from instep.recording.database import bytes_on_disk
from instep.streaming.service import ModelService

_FRESH_S: Final = 0.2
"""The time within which requests get the same object."""


class ServerStatus:
    """Builds the object of /api/stats, once for all requests at about the same time."""

    def __init__(self, server: WatchedServer) -> None:
        self._server = server
        self._version = version("instep")
        self._started_s = time.time()
        self._built_s = float("-inf")
        self._stats = b""

    def problems(self) -> list[str]:
        """The reasons why the server is not ready; empty if it is."""
        problems = ["the server is shutting down"] if self._server.is_draining else []
        for service in self._server.services:
            if service.engine.journal.has_failed:
                problems.append(f"the recording of the model {service.name!r} has failed")
            elif service.engine.draining and not self._server.is_draining:
                problems.append(f"the model {service.name!r} is being unloaded")
        return problems

    def late(self) -> str:
        """The names of models whose live verification is far behind."""
        late = [
            f"{service.name!r}, {check.lag_s:.0f} s{check.reason and f' ({check.reason})'}"
            for service in self._server.services
            if (check := service.verification) is not None and check.is_late
        ]
        return f"live verification is behind: {'; '.join(late)}" if late else ""

    def stats(self) -> bytes:
        """The object of /api/stats as JSON."""
        now_s = time.monotonic()
        if now_s - self._built_s >= _FRESH_S:
            self._built_s, self._stats = now_s, to_json(self._build())
        return self._stats

    def _build(self) -> dict[str, Any]:
        server, now_s = self._server, time.time()
        return {
            "version": self._version,
            "pid": os.getpid(),
            "time_s": now_s,
            "started_s": self._started_s,
            "uptime_s": now_s - self._started_s,
            "endpoint": server.endpoint,
            "ready": not self.problems(),
            "draining": server.is_draining,
            "outdated": server.outdated,
            "models": [self._model(service) for service in server.services],
        }

    def _model(self, service: ModelService) -> dict[str, Any]:
        return {
            "name": service.name,
            **asdict(service.about),
            "recording": _recording(service),
            "verification": None if service.verification is None else service.verification.as_json(),
            "numbers": service.numbers(),
        }


def _recording(service: ModelService) -> dict[str, Any] | None:
    file, free_bytes = service.file, service.engine.stats.recording_free_bytes
    return None if file is None else {"file": file.name, "bytes": bytes_on_disk(file), "free_bytes": free_bytes}
