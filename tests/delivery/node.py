"""The server without sockets, threads, processes and torch: the engine's own rules, moved by hand.

Real: the kernels, the engine, the operations on streams, the journal, the checkpoints, the reaper, the recovery, the
recorder's queue, the ZeroMQ front end above its socket, and the server's loop. By hand: when the executor steps, when
the recorder commits, when the loop learns of it, and when callbacks of the event loop run. The network is an exact
recurrence that remembers order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from instep.core.streams import StreamTable
from instep.core.tables import NO_OWNER, make_tables
from instep.core.typing import F32, I32, I64, U8, U64
from instep.frontends.models import Models, Served
from instep.frontends.zmq.frontend import ZmqFrontend
from instep.frontends.zmq.peers import Outbound
from instep.frontends.zmq.table import PeerTable
from instep.recording.reader import load_open_streams
from instep.recording.records import OpenStream
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.runtime.executor import StateLost
from instep.server.loop import Loop
from instep.streaming.api import Grants, Names, Origin, StatesRead
from instep.streaming.engine import Engine, EngineLimits
from instep.streaming.hibernation import Hibernation, IdleLimits, Tombstones
from instep.streaming.journal import Journal
from instep.streaming.listing import Listing
from instep.streaming.operations import Reaper, StreamOperations
from instep.streaming.origins import Origins
from instep.streaming.service import ModelService
from instep.streaming.states import Checkpoints, StreamStates
from instep.streaming.stats import EngineStats, EventLog
from instep.streaming.tasks import Tasks
from instep_client.protocol.wire import PROTOCOL_VERSION, ServerInfo
from tests.delivery.disk import HEADER, Disk, HandRecorder, MemoryWriter, files_in_memory
from tests.delivery.hand_loop import HandLoop
from tests.delivery.network import Connection, HandRouter, Network
from tests.delivery.recurrence import MAX_STREAMS, HandExecutor, Recurrence, StepFailure
from tests.support.running import log_into
from tests.support.states import floats_of
from tests.support.streaming import ABOUT

_MAX_CONNECTIONS = 64
_MAX_FRAMES = 64
_NEVER_NS = 10**18
_PARK_NS = 3600 * 10**9
_HIBERNATE_NS = _PARK_NS // 4
_TICKS = 10
"""After as many ticks the reaper has looked for streams that expire."""


class Watcher(Protocol):
    """Told of what the server does, as it does it."""

    def admits(self, admit: Callable[[], None]) -> None:
        """The server admits what was submitted; call `admit` for it."""

    def resumes(self, origin: Origin, names: Names, have: U64) -> None:
        """The server is about to decide on a RESUME."""

    def resets(self, origin: Origin, handles: U64, states: U8 | None) -> None:
        """The server is about to decide on a RESET."""

    def reads(self, origin: Origin, handles: U64, copies: Names = ()) -> None:
        """The server is about to decide on a READ_STATE, or on a FORK with the names of the copies."""

    def has_moved(self) -> None:
        """A callback of the loop has run, or what is done now and then."""


class _WatchedEngine(Engine):
    watcher: Watcher

    def admit(self) -> None:
        self.watcher.admits(super().admit)


async def _load(disk: Disk, streams: Sequence[int]) -> list[OpenStream]:
    path: Any = disk
    with files_in_memory():
        return load_open_streams(path, streams)


class _WatchedOperations(StreamOperations):
    watcher: Watcher
    hibernation: Hibernation

    async def open(self, origin: Origin, names: Names, states: U8 | None, first_seqs: I64 | None) -> Grants:
        grants = await super().open(origin, names, states, first_seqs)
        self.watcher.has_moved()  # before the answer finds the connection gone
        return grants

    async def resume(self, origin: Origin, names: Names, have: U64, epochs: U64, take_over: bool) -> Grants:
        await self.hibernation.wake(names)
        self.watcher.resumes(origin, names, have)
        return await super().resume(origin, names, have, epochs, take_over)

    async def write_states(self, origin: Origin, handles: U64, states: U8 | None, codes: I32) -> I32:
        handles, _ = await self.awake(origin, handles)
        self.watcher.resets(origin, handles, states)
        return await super().write_states(origin, handles, states, codes)

    async def read_own_states(self, origin: Origin, handles: U64) -> StatesRead:
        handles, _ = await self.awake(origin, handles)
        self.watcher.reads(origin, handles)
        return await super().read_own_states(origin, handles)

    async def fork(self, origin: Origin, handles: U64, names: Names, codes: I32) -> Grants:
        handles, _ = await self.awake(origin, handles)
        self.watcher.reads(origin, handles, names)
        return await super().fork(origin, handles, names, codes)


@dataclass(frozen=True)
class Sizes:
    """What the limits of a server are."""

    window: int
    batch: int


class Node:
    """One life of the server.

    Args:
        number: which life, from 1.
        disk: what the lives before left.
        network: where connections come from.
        sizes: of everything.
        watcher: told of what happens.

    Raises:
        RecordingError: when the recording does not let it start.
    """

    def __init__(self, number: int, disk: Disk, network: Network, sizes: Sizes, watcher: Watcher) -> None:
        self.has_failed = False
        self._disk = disk
        self._hibernated: dict[str, int] = {}
        self.router = HandRouter(network)
        self.stepper = Recurrence(sizes.batch)
        self._watcher = watcher
        self._bugs: list[BaseException] = []
        self._told: deque[int] = deque()
        self._now_ns = time.monotonic_ns()
        self._loop = HandLoop()  # type: ignore[abstract]
        with self._loop:
            self._assemble(number, disk, sizes)

    def _assemble(self, number: int, disk: Disk, sizes: Sizes) -> None:
        stepper: Any = self.stepper
        self.tables = tables = make_tables(
            MAX_STREAMS, _MAX_CONNECTIONS, sizes.window, 1, 1, _MAX_FRAMES, _MAX_FRAMES, _MAX_FRAMES
        )
        generations = np.full(MAX_STREAMS + 1, 1 + 10_000 * number, np.uint32)
        self.table = table = StreamTable(tables, generations, 1_000_000 * number)
        self.executor = self.stepper.executor = HandExecutor(
            lambda slots, rows: stepper.step(slots, rows, tables.x, tables.y)
        )
        self._turns = turns = Loop(0, self._bugs.append)
        self.journal = journal = Journal(tables, table, turns.wake)
        self.origins, self.tasks = Origins(tables), Tasks(self._bugs.append)
        self.engine = engine = _WatchedEngine(
            tables,
            table,
            self.origins,
            self.executor,
            journal,
            EngineLimits(sizes.batch, 0, _MAX_FRAMES),
            EngineStats(),
            EventLog(),
            self._log_failure,
            lambda delay_s, call: None,
            turns.wake,
        )
        tombstones = Tombstones()
        states = StreamStates(engine, stepper, at_once=1)
        limits = IdleLimits(0, _PARK_NS, MAX_STREAMS, _HIBERNATE_NS, MAX_STREAMS)
        self.hibernation = Hibernation(engine, states, tombstones, partial(_load, disk), limits, self.tasks)
        operations = _WatchedOperations(engine, states, self.hibernation, self.tasks)
        engine.watcher = operations.watcher = self._watcher
        operations.hibernation = self.hibernation
        self._reaper = Reaper(engine, operations)
        self._checkpoints = Checkpoints(engine, states, self.tasks, _NEVER_NS, at_once=1)
        router: Any = self.router
        peers = PeerTable(_MAX_CONNECTIONS)
        self.outbound = Outbound(
            router, peers, 10**6, 10**6, 10**9, 2 * _NEVER_NS, time.monotonic_ns, self._reaper.detach
        )
        models = Models()
        self._frontend = ZmqFrontend(models, router, self.outbound, 2 * _NEVER_NS, turns.wake, log_into([]))
        listing = Listing(table, self.hibernation)
        log = log_into([])
        service = ModelService(
            "exact",
            engine,
            operations,
            self._reaper,
            states,
            self._checkpoints,
            listing,
            self.tasks,
            log,
            ABOUT,
        )
        served = Served(service, _info(number, sizes))
        models.add(served)
        self._frontend.added(served)
        turns.frontends = [self._frontend]
        turns.add(service)
        self._record(disk, sizes)
        turns.start()

    def _record(self, disk: Disk, sizes: Sizes) -> None:
        header = replace(HEADER[0], durability=disk.durability)
        path: Any = disk
        stepper: Any = self.stepper
        writer: RecordingWriter
        last_stream = 0
        if disk.is_empty:
            writer = MemoryWriter.create(path, header)
        else:
            with files_in_memory():
                writer, recovery = resume_recording(path, header, self.tables, self.table, self.journal.dirty, stepper)
            last_stream = recovery.last_stream
            self.hibernation.restarted(recovery.hibernated)
            self._hibernated = recovery.hibernated
        last_row = writer.position
        self.recorder = HandRecorder(writer, self._turns.wake, self._fail, self._told.append)
        self.journal.record(self.recorder, last_stream, last_row, waits=disk.durability != "memory")

    # ── Moving it ──────────────────────────────────────────────────────────────────────────────────────────────────

    def arrives(self, connection: Connection, message: list[bytes]) -> None:
        """A message has arrived; the loop takes it in its next turn."""
        self.router.arrived.append((connection, message))

    def run(self) -> None:
        """Let the loop do everything that there is to do: it takes a turn where the real one is told to."""
        if self.router.is_readable or self.executor.has_ended:
            self._turns.wake()
        if self._loop.is_idle:
            return
        with self._loop:
            while self._loop.run_one():
                if self._bugs:
                    raise self._bugs[0]
                self._watcher.has_moved()

    def learn_what_is_durable(self) -> None:
        """The loop learns which commits were made."""
        while self._told:
            self._loop.call_soon(self.journal.advance, self._told.popleft())

    def checkpoint(self) -> None:
        """Begin a checkpoint."""
        with self._loop:
            self.tasks.start(self._checkpoints.take())

    def tick(self) -> None:
        """What is due now and then."""
        self._tick(self._now_ns)

    def _tick(self, now_ns: int) -> None:
        with self._loop:
            self._frontend.tick(now_ns)
            self._reaper.tick(now_ns)
            self._turns.wake()
        self._watcher.has_moved()

    def notice_gone(self, connection: Connection) -> None:
        """A connection is found to be gone; its streams are parked in the next tick."""
        peer = self.outbound.find(connection.routing_id)
        if peer is not None:
            self.outbound.drop(peer)

    def expire_parked(self) -> None:
        """The time of all that are parked is up."""
        for _ in range(_TICKS):
            self._tick(self._now_ns + 2 * _PARK_NS)

    def hibernate(self) -> None:
        """All streams with nothing to do have had nothing to do for long."""
        with self._loop:
            self.hibernation.tick(self._now_ns + 2 * _HIBERNATE_NS)
        self._watcher.has_moved()

    def kill(self) -> None:
        """The process dies: nothing that it does from now on reaches the network or the disk."""
        self.router.close()
        self._turns.stop()
        self.tasks.cancel()
        with self._loop:
            while self._loop.run_one():
                pass

    # ── Looking at it ──────────────────────────────────────────────────────────────────────────────────────────────

    def client_of(self, origin: Origin) -> int:
        """Whose connection an origin is: the second byte of its routing id says so."""
        peer: Any = origin
        client: int = peer.routing_id[1]
        return client

    def states(self, slots: I64) -> F32:
        """The states in these slots."""
        return floats_of(self.stepper.read(slots), 1)[:, 0]

    def asleep(self) -> list[OpenStream]:
        """The streams that were not put into memory at the start, as the disk has them."""
        path: Any = self._disk
        with files_in_memory():
            return load_open_streams(path, self._hibernated.values())

    def slot_of(self, name: str) -> int | None:
        """The slot of the open stream of that name."""
        return int(self.table.find([name])[0]) or None

    def open_slots(self) -> list[int]:
        """Slots of the streams that are open and not closing."""
        table = self.table
        streams = zip((table.owner != NO_OWNER).tolist(), (table.closing | table.lost).tolist(), strict=True)
        return [slot for slot, (is_open, is_ending) in enumerate(streams) if is_open and not is_ending]

    def _log_failure(self, error: Exception, streams: int) -> None:
        if not isinstance(error, StateLost | StepFailure):
            self._bugs.append(error)

    def _fail(self, error: Exception) -> None:
        self.has_failed = True


def _info(number: int, sizes: Sizes) -> ServerInfo:
    return ServerInfo(
        protocol_version=PROTOCOL_VERSION,
        boot_id=str(number),
        model="exact",
        fingerprint="f",
        features=1,
        outputs=1,
        state=Recurrence.state,
        device="none",
        exactness="exact",
        arithmetic="portable-1",
        max_streams=MAX_STREAMS,
        max_message_bytes=10_000,
        max_block_frames=_MAX_FRAMES,
        credit_frames=_MAX_FRAMES,
        max_idle_s=0.0,
        window_frames=sizes.window,
        durability="commit",
        park_s=300.0,
    )
