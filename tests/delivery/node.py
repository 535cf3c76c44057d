"""The server without sockets, threads and torch: the engine's own rules, moved by hand.

Real: the verbs, the engine, the lifecycle, the postbox, the tap, the snapshots, the recovery, the recorder and all of
the core. By hand: when the worker works, when its results come back, when the recorder commits, and when the loop
learns of that. The network is an exact recurrence that remembers order.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from instep.core.rings import Rings
from instep.runtime.runs import Ended
from instep.runtime.worker import Job
from instep.server.clients import Client, ClientTable
from instep.server.engine import Engine
from instep.server.lifecycle import Lifecycle
from instep.server.postbox import Postbox
from instep.server.recovery import go_on
from instep.server.snapshots import Snapshots
from instep.server.statistics import Statistics
from instep.server.tap import Tap
from instep.server.verbs import Verbs

from instep.core.streams import StreamTable
from instep.core.typing import F32, I64
from instep.recording.writer import RecordingWriter
from instep.runtime.errors import StateLost
from instep.server.limits import EffectiveLimits
from instep_client.protocol.wire import PROTOCOL_VERSION, Code, ServerInfo
from tests.delivery.disk import HEADER, Disk, HandRecorder, MemoryWriter, files_in_memory
from tests.delivery.network import Connection, Network

PRIME = 16_777_213
"""The largest prime below 2^24: every state is a float32 without rounding."""
_FACTOR = 1_103_515
MAX_STREAMS = 3


def recur(state: int, x: int) -> int:
    """The state after one more frame. Whatever is lost, doubled or swapped changes all that follow."""
    return (state * _FACTOR + x * 7 + 1) % PRIME


class Recurrence:
    """In place of the stepper: state and output of a stream are one number."""

    state_layers = 1
    state_size = 1

    def __init__(self, max_batch_size: int) -> None:
        self.network = self
        self.buckets: I64 = np.array([max_batch_size])
        self.failure: Exception | None = None
        """Raised by the next step, instead of stepping."""
        self._states = np.zeros(MAX_STREAMS + 1, np.int64)

    def bucket(self, size: int) -> int:
        return int(self.buckets[0])

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        assert len(set(slots.tolist())) == len(slots), "a stream has two frames in one step"
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        with np.errstate(invalid="ignore"):  # damaged frames are wrong ones
            x = inputs[rows, 0].astype(np.int64)
        states = (self._states[slots] * _FACTOR + x * 7 + 1) % PRIME
        self._states[slots] = states
        outputs[rows, 0] = states

    def load(self, slots: I64, states: F32 | None) -> None:
        with np.errstate(invalid="ignore"):  # and so are damaged states
            self._states[slots] = 0 if states is None else states[:, 0, 0].astype(np.int64)

    def read(self, slots: I64) -> F32:
        return self._states[slots].astype(np.float32).reshape(-1, 1, 1)

    def no_states(self, count: int) -> F32:
        return np.full((count, 1, 1), np.nan, np.float32)


class HandWorker:
    """In place of the worker's thread: does the next job when told; results wait for the loop."""

    def __init__(self, events: deque[Callable[[], None]]) -> None:
        self.jobs: deque[Job] = deque()
        self._events = events

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def work(self) -> None:
        if self.jobs:
            job = self.jobs.popleft()
            try:
                result, error = job.call(), None
                if isinstance(result, Ended) and isinstance(result.error, AssertionError):
                    raise result.error
            except (StateLost, StepFailure) as failure:
                result, error = None, failure
            self._events.append(lambda: job.done(result, error))


class StepFailure(Exception):
    """The network failed; no state has changed."""


@dataclass(frozen=True)
class Sizes:
    """What the limits of a server are."""

    window: int
    batch: int


_LIMITS = EffectiveLimits(
    max_streams=MAX_STREAMS,
    max_connections=64,
    max_batch_size=1,
    max_queue_delay_ns=0,
    max_block_frames=64,
    credit_frames=64,
    max_pending_frames=64,
    window_frames=1,
    max_message_bytes=10_000,
    max_unread_bytes=1_000_000,
    max_outbox_bytes=1_000_000,
    first_generation=1,
)


class Node:
    """One life of the server.

    Args:
        number: which life, from 1.
        disk: what the lives before left.
        network: where connections come from.
        sizes: of everything.

    Raises:
        RecordingError: when the recording does not let it start.
    """

    def __init__(self, number: int, disk: Disk, network: Network, sizes: Sizes) -> None:
        self.number = number
        self.has_failed = False
        self.events: deque[Callable[[], None]] = deque()
        self.worker: Any = HandWorker(self.events)
        self.stepper: Any = Recurrence(sizes.batch)
        limits = replace(_LIMITS, max_batch_size=sizes.batch, window_frames=sizes.window)
        table = StreamTable(MAX_STREAMS, limits.max_connections, 1 + 10_000 * number, 1_000_000 * number)
        rings = Rings(table, sizes.window, MAX_STREAMS, 1, 1, limits.max_pending_frames)
        self.table, self.rings = table, rings
        self.clients = ClientTable(limits.max_connections)
        header = replace(HEADER[0], durability=disk.durability, buckets=(sizes.batch,))
        path: Any = disk
        writer: RecordingWriter
        last_stream = 0
        stepper: Any = self.stepper
        worker: Any = self.worker
        if disk.is_empty:
            writer = MemoryWriter.create(path, header)
        else:
            with files_in_memory():
                writer, recovery = go_on(path, header, table, rings, stepper, accept_numerics_change=False)
            last_stream = recovery.last_stream
        last_row = writer.position
        self.recorder = HandRecorder(
            writer, self._fail, lambda ticket: self.events.append(lambda: self._durable(ticket))
        )
        self.tap = tap = Tap(table, rings)
        tap.record(self.recorder, last_stream, last_row, waits=disk.durability != "memory")
        statistics = Statistics()
        self.postbox = Postbox(
            network,
            self.clients,
            limits.max_unread_bytes,
            limits.max_outbox_bytes,
            unreachable_after_ns=10**18,
            probe_after_ns=10**18,
            on_gone=self._gone,
        )
        self.engine = Engine(
            table,
            rings,
            stepper,
            worker,
            self.postbox,
            tap,
            limits,
            statistics,
            lambda error, streams: None,
            lambda delay_s, work: None,
        )
        self.engine._step_ns[sizes.batch] = 0  # so that there are runs from the first step on
        self.engine.longest_run_ns = 10**18  # however long a step takes here, so that an example is always the same
        self.lifecycle = Lifecycle(
            table,
            rings,
            stepper,
            worker,
            self.clients,
            self.postbox,
            tap,
            statistics,
            lambda error, streams: None,
            parks=True,
            max_parked=MAX_STREAMS,
        )
        self.engine.on_answered = self.lifecycle.waits.answered
        self.lifecycle.on_ready = self.engine.make_ready
        self.lifecycle.on_not_loaded = self.engine.without_state
        self.engine.on_state_lost = lambda slots: self.lifecycle.evict(slots, Code.STATE_LOST)
        self.snapshots = Snapshots(table, rings, stepper, worker, tap, lambda error, streams: None, 0, at_once=1)
        self.verbs = Verbs(
            self.engine, self.lifecycle, tap, self.clients, self.postbox, _info(number, limits), limits, statistics
        )

    @property
    def has_room(self) -> bool:
        return self.lifecycle.waits.has_room and (self.tap.has_room or self.tap.has_failed)

    def take(self, connection: Connection, message: list[bytes]) -> None:
        """One message of one connection, as the server's pump takes it."""
        self.verbs.take(connection.routing_id, message)

    def admit_if_due(self) -> None:
        """As the pump does after a burst."""
        self.verbs.admit_if_due()

    def admit_taken(self) -> None:
        """As the next tick does."""
        self.verbs.admit_taken()

    def around_admission(self, around: Callable[[Callable[[], None]], None]) -> None:
        """Call something with what admits, whoever lets it be done."""
        admit = self.verbs.admit_taken

        def admitted() -> None:
            around(admit)

        self.verbs.admit_taken = admitted  # type: ignore[method-assign]
        self.engine.on_run_ended = admitted

    def schedule(self) -> None:
        self.engine.schedule()

    def turn(self) -> bool:
        """Let the loop do the next thing that was handed back; whether there was any."""
        if not self.events:
            return False
        self.events.popleft()()
        self.schedule()
        return True

    def snapshot(self) -> None:
        if not self.snapshots.is_under_way:
            self.snapshots.take()

    def notice_gone(self, connection: Connection) -> None:
        """A probe finds that a connection is no more."""
        client = self.clients.by_routing_id(connection.routing_id)
        if client is not None:
            self.postbox.give_up(client)
            self.schedule()

    def _gone(self, client: Client) -> None:
        self.lifecycle.departures.abandon(client)
        self.events.append(self.lifecycle.departures.tidy)  # as the next tick does

    def expire_parked(self) -> list[int]:
        """The time of all that are parked is up; their slots."""
        slots = self.table.parked_since(np.iinfo(np.int64).max)
        self.lifecycle.expire(slots)
        return [int(slot) for slot in slots]

    def open_slots(self) -> list[int]:
        """Slots of the streams that are open and not closing."""
        table = self.table
        return [int(slot) for slot in np.flatnonzero((table.owner >= 0) & ~table.closing & ~table.lost)]

    def _durable(self, ticket: int) -> None:
        self.tap.durable(ticket)

    def _fail(self, error: Exception) -> None:
        self.has_failed = True


def _info(number: int, limits: EffectiveLimits) -> ServerInfo:
    return ServerInfo(
        protocol_version=PROTOCOL_VERSION,
        boot_id=str(number),
        model="exact",
        fingerprint="f",
        features=1,
        outputs=1,
        state_layers=1,
        state_size=1,
        device="none",
        exactness="exact",
        buckets=(limits.max_batch_size,),
        max_streams=limits.max_streams,
        max_message_bytes=limits.max_message_bytes,
        max_block_frames=limits.max_block_frames,
        credit_frames=limits.credit_frames,
        max_idle_s=0.0,
        window_frames=limits.window_frames,
        durability="commit",
        park_s=300.0,
    )


NUMBERS = itertools.count(1)
