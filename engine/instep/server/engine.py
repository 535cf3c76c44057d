"""The engine: admit, schedule, step, deliver. The rules are in `core`; this joins them to the step worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.admission import admit
from instep.core.blocks import Block, BlockTable, admitted_rows
from instep.core.pending import NONE, PendingFrames
from instep.core.scheduler import Scheduler
from instep.core.streams import StreamTable
from instep.core.typing import F32, I32, I64, U64, Bool
from instep.recording.recorder import Recorder
from instep.runtime.stepper import StateLost, Stepper
from instep.runtime.worker import Job, Worker
from instep.server import replies
from instep.server.clients import Client, ClientTable
from instep.server.limits import EffectiveLimits
from instep.server.postbox import Postbox
from instep.server.statistics import Statistics
from instep.server.tap import Tap
from instep_client.wire import Code

_MOST_STEPS = 2
"""One that the worker runs, and one that is ready when it has ended."""
_MOST_JOBS = 64
"""Openings and closings that wait for the worker."""


@dataclass(frozen=True, slots=True)
class Closing:
    """Streams that close as soon as their frames are answered."""

    slots: I64
    reason: str
    on_closed: Callable[[F32, Bool], None]
    """Called with the final states, float32 [N, layers, size], and which of them are lost (NaN): bool [N]."""


class Engine:
    """Streams and frames between admission and answer.

    All methods run on the event loop's thread; only `Stepper` runs in the worker's.

    Args:
        stepper: the network and the states.
        worker: runs the stepper.
        clients: connections, whose numbers own streams.
        postbox: where answers go.
        recorder: where frames are recorded, if they are.
        limits: what the model and the configuration allow.
        statistics: what is counted.
        log_failure: told of steps that failed.
        call_later: runs something after so many seconds, for batches that are held.
    """

    def __init__(
        self,
        stepper: Stepper,
        worker: Worker,
        clients: ClientTable,
        postbox: Postbox,
        recorder: Recorder | None,
        limits: EffectiveLimits,
        statistics: Statistics,
        log_failure: Callable[[Exception | None, int], None],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self.table = StreamTable(limits.max_streams, limits.max_connections, limits.first_generation)
        self.pending = PendingFrames(
            limits.max_pending_frames, limits.max_streams, stepper.network.features, stepper.network.outputs
        )
        self.blocks = BlockTable(limits.max_pending_frames)
        self.scheduler = Scheduler(
            limits.max_streams, limits.max_connections, limits.max_batch_size, limits.max_queue_delay_ns
        )
        self._stepper = stepper
        self._worker = worker
        self._clients = clients
        self._postbox = postbox
        self._tap = Tap(recorder, self.table, self.pending)
        self._statistics = statistics
        self._log_failure = log_failure
        self._call_later = call_later
        self._closings: list[Closing] = []
        self._closings_under_way = 0
        self._leaving: set[int] = set()
        self._opens_under_way = 0
        self._steps_under_way = 0
        self._hold_timer = False
        self.draining = False
        """While True, nothing more arrives that a batch could be held for."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing admitted waits for an answer."""
        return not (len(self.blocks) or self._closings or self._closings_under_way or self._opens_under_way)

    @property
    def has_room(self) -> bool:
        """Whether messages may be handled: False while too much waits for the worker or the recorder."""
        return self._opens_under_way + self._closings_under_way < _MOST_JOBS and self._tap.has_room

    # ── Admission ──────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, client: Client, request: int, handles: U64, seqs: U64, x: F32) -> None:
        """Admit a block's good frames; the answer follows when they are computed.

        Args:
            client: who sent it; within its credit, and the pool has room.
            request: what the answer refers to.
            handles: uint64 [N], distinct.
            seqs: uint64 [N], of the first timestep.
            x: float32 [T, N, features].
        """
        now_ns = time.monotonic_ns()
        verdict = admit(self.table, client.number, handles, seqs, x)
        frames = int(verdict.lengths.sum())
        if frames == 0:
            rows = np.full(x.shape[:2], NONE, np.int32)
            self._answer(Block(client.number, request, rows, verdict, 0, now_ns))
            return
        number = self.blocks.reserve()
        rows, ready = self.pending.append(verdict.slots, verdict.lengths, x, number)
        self.blocks.add(number, client.number, request, rows, verdict, now_ns)
        self.table.admitted(verdict.slots, verdict.lengths, now_ns)
        client.frames_unanswered += frames
        self.scheduler.add(ready, np.array([client.number], np.int32), now_ns)

    # ── Schedule and step ──────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> None:
        """Give the worker a batch if it is free and one is due, and a full one to go on with while it steps."""
        while self._steps_under_way < _MOST_STEPS and self.scheduler.ready_count:
            if self._steps_under_way and self.scheduler.ready_count < self.scheduler.max_batch_size:
                return  # what arrives until the worker is free may still join this batch
            if not self._tap.has_room:
                return  # the recorder calls back when it has room again
            hold_ns = 0 if self.draining else self.scheduler.hold_ns(time.monotonic_ns(), self.table.open_count)
            if hold_ns > 0:
                self._hold(hold_ns)
                return
            self._step(self.scheduler.next_batch())

    def _step(self, slots: I64) -> None:
        rows = self.pending.take(slots)
        self._steps_under_way += 1

        def step() -> tuple[int, int]:
            began_ns = time.monotonic_ns()
            self._stepper.step(slots, rows, self.pending.x, self.pending.y)
            return began_ns, time.monotonic_ns()

        def done(times_ns: tuple[int, int] | None, error: Exception | None) -> None:
            now_ns = time.monotonic_ns()
            self._stepped(slots, rows, *(times_ns or (now_ns, now_ns)), error)

        self._worker.submit(Job(step, done))

    def _hold(self, hold_ns: int) -> None:
        if not self._hold_timer:
            self._hold_timer = True
            self._call_later(hold_ns / 1e9, self._end_hold)

    def _end_hold(self) -> None:
        self._hold_timer = False
        self.schedule()

    def _stepped(self, slots: I64, rows: I32, began_ns: int, ended_ns: int, error: Exception | None) -> None:
        self._steps_under_way -= 1
        if error is not None:
            rows = self._fail(slots, rows, error)
        else:
            self._statistics.batches_total += 1
            self._statistics.frames_total += len(rows)
            if not self._tap.stepped(slots, rows, self._stepper.bucket(len(rows))):
                return  # the recorder has failed, and the server is about to stop
            self.table.step_seq[slots] += 1
        again = self.pending.done(slots)
        self.scheduler.add(again, self.table.owner[again], ended_ns)
        self.schedule()
        self._deliver(rows, began_ns, ended_ns)

    def _fail(self, slots: I64, rows: I32, error: Exception) -> I32:
        """A step failed: none of its frames was applied, nor can the frames behind them be. Returns all of them."""
        self._statistics.step_failures_total += 1
        self._log_failure(error, len(slots))
        behind, owners = self.pending.take_all(slots)
        seqs = self.table.step_seq[slots]
        self.table.next_seq[slots] = seqs
        code = Code.STATE_LOST if isinstance(error, StateLost) else Code.STEP_FAILED
        why = np.zeros(self.pending.capacity, np.int32)
        why[rows] = code
        why[behind] = Code.SEQ_GAP if code is Code.STEP_FAILED else code
        failed = np.concatenate([rows, behind])
        expected_seq = np.zeros(self.pending.capacity, np.int64)
        expected_seq[failed] = self.table.next_seq[np.concatenate([slots, owners])]
        for number in np.unique(self.pending.block[failed]).tolist():
            self.blocks[number].fail(why, expected_seq)
        if code is Code.STATE_LOST:
            self.table.lost[slots] = True
            self._evict_slots(slots[~self.table.closing[slots]], code)
        self._tap.failed(slots, seqs, code.name.lower(), str(error))
        return failed

    # ── Deliver ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _deliver(self, rows: I32, began_ns: int, ended_ns: int) -> None:
        for block in self.blocks.answered(self.pending.block[rows]):
            block.queue_ns = max(0, began_ns - block.admitted_ns)
            block.compute_ns = ended_ns - began_ns
            block.stepped_ns = ended_ns
            self._answer(block)
            self.table.answered(block.admission.slots, block.admission.lengths)
            self.pending.free(admitted_rows(block))
        self._close_what_is_done()

    def _answer(self, block: Block) -> None:
        client = self._clients.by_number(block.client)
        if client is None:
            return
        now_ns = time.monotonic_ns()
        message = replies.stepped(block, block.outputs(self.pending), now_ns)
        self._statistics.block_answered(block.queue_ns, block.compute_ns, max(0, now_ns - block.stepped_ns))
        self._postbox.send(client, message, now_ns, block.frames)

    # ── Open and close ─────────────────────────────────────────────────────────────────────────────────────────────

    def open(
        self,
        client: Client,
        names: Sequence[str],
        states: F32 | None,
        on_opened: Callable[[U64, I32], None],
    ) -> None:
        """Open streams; `on_opened` gets handles uint64 [N] (0 where refused) and codes int32 [N].

        Args:
            client: who will own them.
            names: good names, some of which may be in use.
            states: initial states, finite float32 [N, layers, size], or None for zeros.
            on_opened: called when the slots hold their initial states.
        """
        slots, codes = self.table.open(names, client.number, time.monotonic_ns())
        granted = codes == 0
        opened = slots[granted]
        if not len(opened):
            on_opened(np.zeros(len(slots), np.uint64), codes)
            return
        initial = None if states is None else states[granted]
        self._opens_under_way += 1

        def done(_: object, error: Exception | None) -> None:
            self._opens_under_way -= 1
            handles = np.zeros(len(slots), np.uint64)
            if error is not None:
                self._log_failure(error, len(opened))
                codes[granted] = Code.STEP_FAILED
                self.table.lost[opened] = True
                self._release(opened[~self.table.closing[opened]])  # the others' closing releases them
            else:
                handles[granted] = self.table.slots.handles(opened)
                self._tap.opened(opened, initial)
            on_opened(handles, codes)

        self._worker.submit(Job(lambda: self._stepper.load(opened, initial), done))

    def close(self, slots: I64, reason: str, on_closed: Callable[[F32, Bool], None]) -> None:
        """Close streams once what they have pending is answered; they take nothing more from now on."""
        self.table.closing[slots] = True
        self._closings.append(Closing(slots, reason, on_closed))
        self._close_what_is_done()

    def _close_what_is_done(self) -> None:
        if not self._closings:
            return
        waiting = []
        for closing in self._closings:
            if self.table.pending[closing.slots].any():
                waiting.append(closing)
            else:
                self._read_and_release(closing)
        self._closings = waiting

    def _read_and_release(self, closing: Closing) -> None:
        self._closings_under_way += 1

        slots = closing.slots

        def done(states: F32 | None, error: Exception | None) -> None:
            self._closings_under_way -= 1
            lost = self.table.lost[slots]
            if states is None:
                self._log_failure(error, len(slots))
                states = self._stepper.no_states(len(slots))
                lost[:] = True
            states[lost] = np.nan
            self._tap.closed(slots, closing.reason, states, lost)
            self._release(slots)
            closing.on_closed(states, lost)

        self._worker.submit(Job(lambda: self._stepper.read(slots), done))

    # ── Evict ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def evict_idle(self, max_idle_ns: int) -> None:
        """Close streams that have been silent for longer, and tell their owners."""
        slots = self.table.idle_since(time.monotonic_ns() - max_idle_ns)
        if len(slots):
            self._evict_slots(slots, Code.IDLE)

    def abandon(self, client: Client) -> None:
        """A connection is gone: close its streams, then let its number be used again."""
        slots = self.table.owned_by(client.number)
        self._statistics.evicted_streams_total += len(slots)
        self._leaving.add(client.number)
        if len(slots):
            self.close(slots, Code.CLIENT_GONE.name.lower(), lambda *_: None)
        self._free_numbers({client.number})

    def _release(self, slots: I64) -> None:
        owners = self.table.owner[slots]
        self.table.release(slots)
        self._free_numbers(self._leaving.intersection(owners.tolist()))

    def _free_numbers(self, numbers: set[int]) -> None:
        """Numbers of gone connections are free once none of their streams is left, those closing before included."""
        for number in numbers:
            if not self.table.owned[number]:
                self._leaving.remove(number)
                self._clients.free_number(number)

    def _evict_slots(self, slots: I64, code: Code) -> None:
        self._statistics.evicted_streams_total += len(slots)
        handles = self.table.slots.handles(slots)
        owners = self.table.owner[slots]

        def tell_owners(*_: object) -> None:
            now_ns = time.monotonic_ns()
            for number in np.unique(owners).tolist():
                owner = self._clients.by_number(number)
                if owner is not None:
                    self._postbox.send(owner, replies.evicted(code, handles[owners == number]), now_ns)

        self.close(slots, code.name.lower(), tell_owners)
