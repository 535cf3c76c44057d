"""The server: one loop that collects, schedules, steps and delivers, from bind to close."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from instep.config import Config
from instep.recording.recorder import Recorder
from instep.recording.writer import RecordingWriter
from instep.runtime.step_process import StepProcess
from instep.runtime.stepper import Stepper
from instep.runtime.worker import Worker
from instep.server import replies
from instep.server.clients import ClientTable
from instep.server.engine import Engine
from instep.server.evictions import Evictions
from instep.server.lifecycle import Lifecycle
from instep.server.postbox import Postbox
from instep.server.recovery import Recovery
from instep.server.snapshots import Snapshots
from instep.server.statistics import Statistics
from instep.server.streams import Streams
from instep.server.tap import Tap
from instep.server.transport import Router
from instep.server.verbs import Verbs
from instep.server.vigil import Vigil
from instep_client.protocol.wire import Code, ServerInfo

T = TypeVar("T")

_BURST = 128
_BURST_NS = 2_000_000
"""Messages, and time, handled before other work of the loop gets its turn: what came first is stepped meanwhile."""
_FORCED_JOIN_S = 1.0
"""How long a forced end waits for the step that is under way."""
_TICK_S = 0.05


class Server:
    """Everything between a bound socket and the step worker.

    Args:
        config: the configuration.
        router: the bound socket; the server closes it.
        stepper: the network with its states.
        info: what WELCOME says.
        streams: those that are open already, parked, and room for more.
        writer: the recording, or None.
        process: where steps run, if not in the worker's thread.
        log: where the server says what it does.

    Raises:
        MemoryError: when the table of blocks does not fit; router and recording are the caller's to close then.
    """

    def __init__(
        self,
        config: Config,
        router: Router,
        stepper: Stepper,
        info: ServerInfo,
        streams: Streams,
        writer: RecordingWriter | None,
        process: StepProcess | None,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.config = config
        self.info = info
        self.statistics = Statistics()
        self.failure: str | None = None
        """Why the server had to stop, if it had to."""
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._limits = streams.limits
        self._router = router
        self._worker = Worker(self._hand_back, lambda error: self.fail(f"the step worker died: {error!r}"), process)
        self._clients = ClientTable(config.limits.max_connections)
        self._postbox = Postbox(
            self._router,
            self._clients,
            self._limits.max_unread_bytes,
            self._limits.max_outbox_bytes,
            round(config.limits.unreachable_after_s * 1e9),
            round(config.transport.heartbeat_s * 1e9),
            on_gone=lambda client: self.lifecycle.departures.abandon(client),
        )
        table, rings = streams.table, streams.rings
        self._tap = tap = Tap(table, rings)
        self.engine = Engine(
            table,
            rings,
            stepper,
            self._worker,
            self._postbox,
            tap,
            self._limits,
            self.statistics,
            self._step_failed,
            lambda delay_s, work: self._loop.call_later(delay_s, self._hand_back, work),
        )
        self.lifecycle = Lifecycle(
            table,
            rings,
            stepper,
            self._worker,
            self._clients,
            self._postbox,
            tap,
            self.statistics,
            self._step_failed,
            parks=config.limits.park_s > 0,
            max_parked=config.limits.max_parked_streams,
        )
        self.engine.on_answered = self.lifecycle.waits.answered
        self.lifecycle.on_ready = self.engine.make_ready
        self.lifecycle.on_not_loaded = self.engine.without_state
        self.engine.on_state_lost = lambda slots: self.lifecycle.evict(slots, Code.STATE_LOST)
        target_ns = round(config.recording.recovery_target_s * 1e9)
        self._snapshots = Snapshots(table, rings, stepper, self._worker, tap, self._step_failed, target_ns)
        self.engine.on_changed = self._snapshots.take_if_due
        self._verbs = Verbs(
            self.engine, self.lifecycle, tap, self._clients, self._postbox, self.info, self._limits, self.statistics
        )
        self.engine.on_run_ended = self._verbs.admit_taken
        self.recovery: Recovery | None = None
        """What it took to go on with an older recording, where there was one."""
        self.unanswered_blocks = 0
        """Blocks that were taken and never answered, because the end was forced or draining took too long."""
        spin_ns = config.engine.spin_us * 1000 if process is not None else 0  # a thread for steps would lack the lock
        self._vigil = Vigil(self._loop, lambda: self._guarded(self._look), lambda: self.engine.expected_ns, spin_ns)
        self._stopping = asyncio.Event()
        self._drains = True
        self._stopped = self._pump_is_due = False
        self._evictions = Evictions(table, self.lifecycle, config.limits)
        self._recorder = self._start_recorder(writer)
        if self._recorder is not None and writer is not None:
            tap.record(self._recorder, streams.last_stream, writer.position, waits=info.durability != "memory")

    @property
    def endpoint(self) -> str:
        """Where the server can be reached."""
        return self._router.endpoint

    @property
    def is_quiet(self) -> bool:
        """Whether nothing that was taken waits for an answer; what is gathered waits for a run, and that has blocks."""
        return not len(self.engine.blocks) and self.lifecycle.waits.is_quiet and self._tap.is_quiet

    @property
    def has_room(self) -> bool:
        """Whether messages may be handled: False while too much waits for the worker or the recorder.

        When the recorder has failed they are, so that whoever asks is told that nothing new is taken.
        """
        return self.lifecycle.waits.has_room and (self._tap.has_room or self._tap.has_failed)

    # ── The loop ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def serve(self) -> None:
        """Serve until `stop` or a failure; then drain, say goodbye and close."""
        process = self._worker.process
        ticking = self._loop.create_task(self._tick())
        try:
            self._worker.start()
            self._loop.add_reader(self._router.signal_fd, self._guarded, self._pump)
            if process is not None:
                self._loop.add_reader(process.signal_fd, self._guarded, self._steps_ended)
            await self._stopping.wait()
            await self._drain()
        finally:
            self._loop.remove_reader(self._router.signal_fd)
            if process is not None:
                self._loop.remove_reader(process.signal_fd)
            ticking.cancel()
            self._close()
            await asyncio.gather(ticking, return_exceptions=True)

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """Run work of the loop; what it raises is a bug that would leave clients waiting, so it ends the server."""
        if self._stopped:
            return None
        try:
            return work()
        except Exception as error:
            self._bug(error)
            return None

    def _bug(self, error: Exception) -> None:
        self._log.exception("bug in the server's loop")
        self.fail(f"a bug in the server's loop: {error!r}")

    def _pump(self) -> None:
        """Collect what has arrived, then schedule.

        Called when the socket signals an arrival, and after anything else that used it, since a send may have taken
        the signal.
        """
        deadline_ns = time.monotonic_ns() + _BURST_NS
        frames: list[bytes] = []
        for routing_id, frames in self._router.receive(_BURST if self.has_room else 0):
            only_gathered = self._verbs.take(routing_id, frames)
            if not only_gathered and (time.monotonic_ns() > deadline_ns or not self.has_room):
                break
        self._verbs.admit_if_due()
        self.engine.schedule()
        if self._worker.collect_short() or frames:
            self._vigil.stay()
        # The socket first, as that takes the signal: without room, it would call this again and again until the end of
        # the next job, which pumps anyway. One continuation at most: each would renew itself.
        has_more = (self._router.is_readable and self.has_room) or self._worker.has_ended
        if has_more and not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._guarded, self._continue_pump)

    def _continue_pump(self) -> None:
        self._pump_is_due = False
        self._pump()

    def _steps_ended(self) -> bool:
        """Take what the process has stepped; whether there was anything."""
        if has_ended := self._worker.collect():
            self._pump()
            self._vigil.stay()
        return has_ended

    def _look(self) -> bool:
        """Do what would be signalled next; whether there was anything."""
        if self._router.is_readable and self.has_room:
            self._pump()
            return True
        return self._steps_ended()

    def _hand_back(self, finish: Callable[[], None]) -> None:
        def finish_and_pump() -> None:
            finish()
            self._pump()

        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was forced to end
            self._loop.call_soon_threadsafe(self._guarded, finish_and_pump)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._guarded(self._keep_house)

    def _keep_house(self) -> None:
        now_ns = time.monotonic_ns()
        self._verbs.admit_taken()  # however long the run under way takes
        self._postbox.flush(now_ns)
        self._evictions.tick()
        if self._evictions.is_due:
            self._postbox.probe(now_ns)  # first: streams of a connection that is gone are parked, not idle
        self.lifecycle.departures.tidy()
        self._evictions.look(now_ns)
        self._snapshots.take_if_due()
        self._pump()

    # ── Life ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self, *, drain: bool = True) -> None:
        """Take nothing more, finish what was taken (unless `drain` is False), then end `serve`."""
        self._verbs.draining = True
        self.engine.draining = True
        self._drains = self._drains and drain
        self._stopping.set()

    def fail(self, reason: str) -> None:
        """Something the server cannot work without is broken: end `serve` at once."""
        if self.failure is None:
            self.failure = reason
            self._log.error("failed", reason=reason)
        self.stop(drain=False)

    async def _drain(self) -> None:
        timeout_s = self.config.shutdown.drain_timeout_s
        deadline = self._loop.time() + timeout_s
        if self._drains:
            self._guarded(self._pump)  # a batch that was held goes now
        while self._drains and not (self.is_quiet and self._postbox.is_empty):
            if self._loop.time() > deadline:
                self.fail(f"draining took longer than shutdown.drain_timeout_s = {timeout_s:g}")
            await asyncio.sleep(0.005)
        if self._drains:
            await self._snapshot(deadline)
        self.unanswered_blocks = self._verbs.taken_blocks + len(self.engine.blocks)

    async def _snapshot(self, deadline: float) -> None:
        """Leave a restart nothing to replay, if there is time."""
        await self._no_snapshot_under_way(deadline)
        if self._snapshots.is_under_way:
            return  # its states are half there: another one would say that all are
        self._guarded(self._snapshots.take)
        await self._no_snapshot_under_way(deadline)

    async def _no_snapshot_under_way(self, deadline: float) -> None:
        while self._snapshots.is_under_way and self.failure is None:
            if self._loop.time() > deadline:
                return
            await asyncio.sleep(0.001)

    def _close(self) -> None:
        self._stopped = True
        timeout_s = self.config.shutdown.drain_timeout_s if self._drains else _FORCED_JOIN_S
        goodbye = replies.goodbye(f"the server is shutting down: {self.failure or 'it was asked to'}")
        try:
            with contextlib.ExitStack() as closing:  # from the last to the first, each whatever the others raise
                closing.callback(self._router.close)
                if self._recorder is not None:
                    closing.callback(self._stop_recorder, self._recorder)
                closing.callback(self._worker.stop, timeout_s)
                closing.callback(self._postbox.broadcast, goodbye, time.monotonic_ns())
        except Exception as error:
            self._bug(error)

    def _stop_recorder(self, recorder: Recorder) -> None:
        recorder.stop()
        if recorder.failed is not None and self.failure is None:
            self._recording_failed(recorder.failed)

    def _start_recorder(self, writer: RecordingWriter | None) -> Recorder | None:
        if writer is None:
            return None
        return Recorder(
            writer,
            self.config.recording.queue_batches,
            on_room=lambda: self._hand_back(lambda: self.engine.schedule()),
            on_failure=lambda error: self._hand_back(lambda: self._recording_failed(error)),
            on_durable=lambda ticket: self._hand_back(lambda: self._tap.durable(ticket)),
        )

    def _recording_failed(self, error: Exception) -> None:
        self.fail(f"the recording {self.config.recording.file} failed: {error}")

    def _step_failed(self, error: Exception | None, streams: int) -> None:
        self._log.error("step failed", error=repr(error), streams=streams)
