"""The server's life: start, serve, drain, close."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from instep.config import Config
from instep.frontends import Frontend
from instep.frontends.http.admin import AdminServer
from instep.frontends.models import Models, Served
from instep.recording.recorder import Recorder
from instep.security.principals import Principals
from instep.server.live_verification import LiveVerification, Supervision
from instep.server.loader import Loader
from instep.server.loop import Loop, Shutdown, Stall
from instep.server.moves import LoadingThread
from instep.server.services import idle_limits
from instep.streaming.service import ModelService
from instep.streaming.tasks import in_daemon_thread


@dataclass(eq=False)
class FreeSpace:
    """Watches a recording's disk; logs once when it is nearly full, and once when it has room again."""

    path: Path
    log: structlog.stdlib.BoundLogger
    _is_low: bool = False

    def tick(self, warn_bytes: int) -> int:
        """Warn below this number of free bytes; returns the number of free bytes."""
        try:
            disk = os.statvfs(self.path.parent)
        except OSError:  # the recorder notices it, too, if it matters
            return 0
        free_bytes = disk.f_bavail * disk.f_frsize
        enough_bytes = warn_bytes + warn_bytes // 8 if self._is_low else warn_bytes  # not to and fro at the limit
        if (free_bytes < enough_bytes) is not self._is_low:
            self._is_low = not self._is_low
            if self._is_low:
                reason = "the server ends when its recording cannot grow: make room, or start it with keep_bytes"
                self.log.warning("disk nearly full", free_bytes=free_bytes, warn_bytes=warn_bytes, reason=reason)
            else:
                self.log.info("disk has room again", free_bytes=free_bytes)
        return free_bytes


COUNTED: Final = (
    *(f"{word}_streams" for word in ("opened", "closed", "parked", "resumed", "hibernated", "woken", "evicted")),
    *("step_failures", "busy", "refused_messages"),
)
"""Counters that are logged unless they are 0, by their names in STATISTICS without `_total`."""
_SAID: Final = tuple(f"{name}_total" for name in ("frames", "batches", "messages", *COUNTED))


@dataclass(eq=False)
class Summary:
    """Logs at intervals how the numbers of STATISTICS have changed since the last summary."""

    log: structlog.stdlib.BoundLogger
    statistics: Callable[[], Mapping[str, float]]
    now_s: float
    """The time of the last summary."""

    def __post_init__(self) -> None:
        self._before = self.statistics()

    def tick(self, now_s: float, every_s: float) -> None:
        """Log a summary `every_s` seconds after the last one if anything has happened; never for 0."""
        seconds = now_s - self.now_s
        if not every_s or seconds < every_s:
            return
        now, before = self.statistics(), self._before
        self.now_s, self._before = now_s, now
        grown = {name: now[name] - before[name] for name in _SAID}
        if not any(grown.values()):
            return
        counts = {name: int(grown[f"{name}_total"]) for name in COUNTED if grown[f"{name}_total"]}
        batches = grown["batches_total"]
        self.log.info(
            "served",
            seconds=round(seconds, 1),
            frames_per_s=round(grown["frames_total"] / seconds),
            messages_per_s=round(grown["messages_total"] / seconds),
            batch_size=round(grown["frames_total"] / batches, 1) if batches else 0.0,
            connections=int(now["connections"]),
            streams_open=int(now["streams_open"]),
            streams_parked=int(now["streams_parked"]),
            frames_pending=int(now["frames_pending"]),
            **counts,
        )


_TICK_S: Final = 0.05
_LOOK_S: Final = 0.005
_LINGER_S: Final = 1.0
"""The time for which a drained server waits for peers to read their replies."""
_ASK_EVERY_S: Final = 0.1
"""The interval at which peers are asked again, because replies may have been sent and peers may have left."""
_FORCED_JOIN_S: Final = 1.0
"""The time for which a forced end waits for the step under way and for the recorder."""


@dataclass(eq=False)
class Server:
    """One socket, one loop, and the added models, from bind to close."""

    config: Config
    shutdown: Shutdown
    turns: Loop
    models: Models
    log: structlog.stdlib.BoundLogger
    supervision: InitVar[Supervision]
    unread: str = ""
    """The reason that the last configuration, apart from its models, is not in force; empty if it is."""
    unread_peers: str = ""
    """The same of the file of peers."""
    unanswered_messages: int = 0
    """Messages accepted and never answered, because the end was forced or draining took too long."""
    admin: AdminServer | None = None
    """The admin server, which starts and closes with this one."""
    _drain_until: float = math.inf
    """The monotonic time at which draining is given up."""

    def __post_init__(self, supervision: Supervision) -> None:
        self._began_ns = time.monotonic_ns()
        self._summaries: dict[ModelService, Summary] = {}
        self._verification = LiveVerification(supervision, self.log)
        self.loader = Loader(self, self.turns, self.shutdown, LoadingThread(self.shutdown), self.log)

    def add(self, served: Served) -> None:
        """Serve a model from now on; the first one is for connections that name none. This cannot fail."""
        self._enter(served)
        self.models.add(served)
        for frontend in self._frontends:
            frontend.added(served)
        self.configure(self.config)

    async def remove(self, name: str, reason: str) -> None:
        """Stop serving a model: answer its admitted messages, end its connections, close its recording."""
        served, timeout_s = self.models.find(name), self.config.shutdown.drain_timeout_s
        service = served.service
        service.drain(f"the model {name!r} is being unloaded and takes nothing new")
        await _quiet(service, timeout_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await service.checkpoints.take()
        service.end_streams()
        await _quiet(service, timeout_s)
        self.models.remove(served)
        for frontend in self._frontends:
            frontend.removed(served, reason)
        self._leave(service)
        await self.close(service)

    def replace(self, former: Served, served: Served, kept_as: str) -> None:
        """Serve another version of a model. This cannot fail.

        The former version is `kept_as` another name for its connections. If that is empty, its connections and streams
        pass to the new one, and the caller closes it.
        """
        if kept_as:
            structlog.get_context(former.service.log)["model"] = kept_as  # of the log that all of its parts write to
            former.keep_as(kept_as)
            self.add(served)
            self.models.add(former)
            return
        self._leave(former.service)
        served.service.history.follow(former.service.history)
        served.service.engine.take_over()
        served.info = replace(served.info, boot_id=former.info.boot_id)  # their streams are still there
        self.add(served)
        for frontend in self._frontends:
            frontend.moved(former, served)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, nothing is received; messages received before are answered."""
        for frontend in self._frontends:
            frontend.is_paused = True
        try:
            yield
        finally:
            for frontend in self._frontends:
                frontend.is_paused = False
            self.turns.wake()

    async def close(self, service: ModelService) -> None:
        """Stop the executor of a service that is no longer served, and close its recording."""
        timeout_s = self.config.shutdown.drain_timeout_s
        async with contextlib.AsyncExitStack() as closing:
            self._will_close([service], closing, timeout_s)
            service.tasks.cancel()
            # In a thread, because a step may hang while the loop serves others.
            await in_daemon_thread(partial(service.engine.executor.stop, timeout_s), "instep-end")

    def _enter(self, served: Served) -> None:
        service = served.service
        service.server_began_ns = self._began_ns
        self._summaries[service] = Summary(service.log, service.numbers, time.monotonic())
        self.turns.add(service)
        if service.verification is not None:
            self._verification.follow(service)

    def _leave(self, service: ModelService) -> None:
        self.turns.remove(service)
        del self._summaries[service]

    @property
    def services(self) -> list[ModelService]:
        """The models, beginning with the default."""
        return [served.service for served in self.models]

    def used(self) -> dict[str, dict[str, float]]:
        """The usage of each principal, by name; see `Frontend.used`."""
        return {name: used for frontend in self._frontends for name, used in frontend.used().items()}

    @property
    def default(self) -> ModelService:
        """The model of connections that name none."""
        return self.models.default.service

    @property
    def endpoint(self) -> str:
        """The endpoint at which clients reach the server."""
        return self._frontends[0].endpoint

    @property
    def _frontends(self) -> Sequence[Frontend]:
        return self.turns.frontends

    @property
    def outdated(self) -> str:
        """The reason why the running models differ from the configuration; empty if they do not."""
        return "; ".join(filter(None, (self.unread, self.unread_peers, self.loader.problem)))

    @property
    def is_draining(self) -> bool:
        """Whether the server has been asked to end."""
        return self.shutdown.requested.is_set()

    def configure(self, config: Config) -> None:
        """Apply the values of a configuration that can change while the server runs.

        This also applies to a newly added model, because values may have changed while it was made.
        """
        limits = config.limits
        self.config = config
        for service in self.services:
            service.operations.hibernation.limits = idle_limits(config)
        for served in self.models:
            served.info = replace(served.info, max_idle_s=limits.max_idle_s, park_s=limits.park_s)

    def admit(self, principals: Principals) -> int:
        """Let in who these are from now on; return the number of connections of others, which end."""
        return sum(frontend.admit(principals) for frontend in self._frontends)

    def stop(self, *, drain: bool = True) -> None:
        """Refuse everything new, answer all admitted messages (unless `drain` is False), then end `serve`."""
        for service in self.services:
            service.drain()
        self.shutdown.stop(drain=drain)

    async def serve(self) -> None:
        """Serve until `stop` or a failure; then drain, say goodbye and close."""
        ticking = asyncio.create_task(self._tick())
        try:
            self.turns.start()
            if self.admin is not None:
                await self.admin.start()
            await self.shutdown.requested.wait()
            self._drain_until = time.monotonic() + self.config.shutdown.drain_timeout_s
            self.stop(drain=self.shutdown.drains)  # a failure did not tell the front end
            if self.admin is not None:
                self.admin.go_away()
            await self._drain()
        finally:
            ticking.cancel()
            await self._close()
            await asyncio.gather(ticking, return_exceptions=True)

    async def _tick(self) -> None:
        files = [service.file for service in self.services if service.file is not None]
        free_space = FreeSpace(files[0], self.log) if files else None  # all of them are in one folder
        stall = Stall()
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                now_ns = time.monotonic_ns()
                if stall.look(now_ns):
                    self.turns.wake()
                    continue
                for service in self.services:
                    service.engine.stats.loop_busy_ns = self.turns.busy_ns
                for summary in self._summaries.values():
                    summary.tick(now_ns / 1e9, self.config.log.summary_s)
                if free_space is not None:
                    free_bytes = free_space.tick(self.config.recording.warn_free_bytes)
                    for service in self.services:
                        service.engine.stats.recording_free_bytes = free_bytes
                for frontend in self._frontends:
                    frontend.tick(now_ns)
                for service in self.services:
                    service.tick(now_ns)
                self.loader.tick()
                self.turns.wake()
            except Exception as error:
                self.shutdown.bug(error)

    @property
    def _is_quiet(self) -> bool:
        return all(service.is_quiet for service in self.services) and not len(self.loader.tasks)

    async def _drain(self) -> None:
        self.turns.wake()  # a batch that was held goes now
        while self.shutdown.drains and not self._is_quiet:
            self._fail_if_late()
            await asyncio.sleep(_LOOK_S)
        await self._linger()
        if self.shutdown.drains:
            await self._take_checkpoints()
        self.unanswered_messages = sum(service.engine.unanswered_messages for service in self.services)

    async def _take_checkpoints(self) -> None:
        """Save the next start a replay, unless a failure, another interrupt or the deadline comes first."""
        taking = asyncio.gather(*(service.checkpoints.take() for service in self.services))
        while self.shutdown.drains and not taking.done() and time.monotonic() < self._drain_until:
            await asyncio.wait([taking], timeout=_LOOK_S)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)

    async def _linger(self) -> None:
        """Wait until peers have read their replies.

        When a connection ends, ZeroMQ may drop messages that the client has not read yet. A peer that does not read its
        replies in time loses them, and resumes its streams when the server is back.
        """
        ask_at = time.monotonic()
        until = min(ask_at + _LINGER_S, self._drain_until)
        while self.shutdown.drains and (now := time.monotonic()) < until:
            if asks := now >= ask_at:
                ask_at = now + _ASK_EVERY_S
                self.turns.wake()  # a send may have taken the signal of an arrival
            drained = [frontend.drain(asks=asks) for frontend in self._frontends]
            if all(drained):
                return
            await asyncio.sleep(_LOOK_S)

    def _fail_if_late(self) -> None:
        if time.monotonic() > self._drain_until:
            timeout_s = self.config.shutdown.drain_timeout_s
            self.shutdown.fail(f"draining took longer than shutdown.drain_timeout_s = {timeout_s:g}")

    async def _close(self) -> None:
        timeout_s = self.config.shutdown.drain_timeout_s if self.shutdown.drains else _FORCED_JOIN_S
        reason = f"the server is shutting down: {self.shutdown.failure or 'it was asked to'}"
        try:
            async with contextlib.AsyncExitStack() as closing:  # last to first, each whatever the others raise
                for frontend in self._frontends:
                    closing.callback(frontend.close)
                if self.admin is not None:
                    closing.push_async_callback(self.admin.close)
                self._will_close(self.services, closing, timeout_s)
                for frontend in self._frontends:
                    closing.callback(frontend.say_goodbye, reason)
                for service in self.services:
                    closing.callback(service.tasks.cancel)
                closing.callback(self.loader.tasks.cancel)
                closing.callback(self.turns.stop)
        except Exception as error:
            self.shutdown.bug(error)

    def _will_close(
        self, services: Sequence[ModelService], closing: contextlib.AsyncExitStack, timeout_s: float
    ) -> None:
        for service in services:
            if service.recorder is not None:
                closing.push_async_callback(self._stop_recorder, service.recorder, service.file)
        closing.push_async_callback(self._verification.leave, services, finishes=self.shutdown.drains)
        for service in services:
            closing.callback(service.engine.executor.stop, timeout_s)

    async def _stop_recorder(self, recorder: Recorder, file: Path | None) -> None:
        """Wait for the recorder until the deadline or, after a forced end, for a moment longer."""
        forced_until: float | None = None
        while not recorder.stop(0.0):
            if self.shutdown.drains:
                self._fail_if_late()
            elif forced_until is None:
                forced_until = time.monotonic() + _FORCED_JOIN_S
            elif time.monotonic() > forced_until:
                reason = "the disk takes too long: the file holds what was committed, and the next start continues it"
                self.log.warning("recording not closed", file=str(file), reason=reason)
                return
            await asyncio.sleep(_LOOK_S)  # a second interrupt is heard meanwhile
        if recorder.failed is not None:
            self.shutdown.fail(f"the recording {file} failed: {recorder.failed}")


async def _quiet(service: ModelService, timeout_s: float) -> None:
    """Wait until a service has nothing to do, for up to `timeout_s`."""
    for _ in range(round(timeout_s / _LOOK_S)):
        if service.is_quiet:
            return
        await asyncio.sleep(_LOOK_S)
