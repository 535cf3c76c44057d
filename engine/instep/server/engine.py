"""The engine: admit, schedule, step, deliver. The rules are in `core`; this joins them to the step worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter

import numpy as np

from instep.core.admission import admit
from instep.core.blocks import Block, BlockTable
from instep.core.rings import Rings
from instep.core.scheduler import Scheduler
from instep.core.streams import StreamTable
from instep.core.typing import I32, I64
from instep.core.verdict import Admission
from instep.runtime.errors import StateLost
from instep.runtime.runs import MOST_STEPS, Ended, run_steps
from instep.runtime.stepper import Stepper
from instep.runtime.worker import Job, Worker
from instep.server import replies
from instep.server.answers import Answer, answer, together
from instep.server.burst import Step, join, of_columns
from instep.server.clients import Client
from instep.server.limits import EffectiveLimits
from instep.server.postbox import Postbox
from instep.server.statistics import Statistics
from instep.server.tap import Tap
from instep_client.protocol.wire import Code

_SHORT_NS = 300_000
"""A run of the smallest bucket that is expected to take less is done by the loop itself, if nothing is under way: one
core less is busy then, which clients may need. Not beside a recorder, which needs the interpreter's lock as well."""
_MOST_RUNS = 2
"""One that the worker runs, and one that is ready when it has ended."""


class Engine:
    """Frames between admission and answer.

    All methods run on the event loop's thread; `Stepper` runs wherever the worker lets it.

    Args:
        table: the streams.
        rings: their frames.
        stepper: the network and the states.
        worker: runs the stepper.
        postbox: where answers go.
        tap: where frames are recorded, if they are.
        limits: what the model and the configuration allow.
        statistics: what is counted.
        log_failure: told of steps that failed.
        call_later: runs something after so many seconds, for batches that are held.
    """

    def __init__(
        self,
        table: StreamTable,
        rings: Rings,
        stepper: Stepper,
        worker: Worker,
        postbox: Postbox,
        tap: Tap,
        limits: EffectiveLimits,
        statistics: Statistics,
        log_failure: Callable[[Exception | None, int], None],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self.table = table
        self.rings = rings
        self.blocks: BlockTable[Client] = BlockTable(limits.max_pending_frames)
        self.scheduler = Scheduler(
            limits.max_streams, limits.max_connections + 1, limits.max_batch_size, limits.max_queue_delay_ns
        )
        self._stepper = stepper
        self._worker = worker
        self._postbox = postbox
        self._tap = tap
        self._statistics = statistics
        self._log_failure = log_failure
        self._call_later = call_later
        self._most_answered = limits.max_block_frames
        self._runs_under_way = 0
        self._step_ns: dict[int, int] = {}
        """By bucket, how long each step of its newest run took."""
        self.expected_ns = 0
        """How long the runs under way are expected to take, from their beginning."""
        self._hold_timer = False
        self.longest_run_ns = 1_000_000
        """How long, about, somebody who comes may wait for a run that is longer than one step."""
        self.draining = False
        """While True, nothing more arrives that a batch could be held for."""
        self.on_answered: Callable[[], None] = lambda: None
        """Called after blocks were answered: streams may have nothing pending any more."""
        self.on_run_ended: Callable[[], None] = lambda: None
        """Called before the next run begins: what came meanwhile may join it."""
        self.on_state_lost: Callable[[I64], None] = lambda slots: None
        """Called with the slots whose state was lost by a failed step."""
        self.on_changed: Callable[[], None] = lambda: None
        """Called when states are about to change: a snapshot may be due."""

    # ── Admission ──────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, steps: list[Step]) -> None:
        """Admit the good frames of messages, as one after the other would; answers follow by themselves.

        Args:
            steps: at least one, of equally many timesteps, each within the credit of its client; there is room for all.

        Raises:
            RepeatedStream: when a stream stands in them more than once; nothing has changed.
        """
        now_ns = time.monotonic_ns()
        owners, handles, seqs, acked, x = join(steps, self.rings.x.shape[1])
        verdict = admit(self.table, self.rings, owners, handles, seqs, acked, x)
        blocks = self._blocks(steps, verdict)
        numbers = of_columns(steps, self._expect(blocks))
        ready = self.rings.append(verdict, x, numbers)
        self.table.admitted(*verdict.admitted, now_ns)
        self._ready(ready, owners if isinstance(owners, int) else None, steps[0].came_ns)
        if done := [block for block in blocks if not block.frames]:
            self._complete(done, None)

    def _blocks(self, steps: list[Step], verdict: Admission) -> list[Block[Client]]:
        """The messages that were judged together, each as a block."""
        blocks, first = [], 0
        for step in steps:
            width, frames = step.columns, step.frames
            blocks.append(Block(step.client, step.request, step.timesteps, verdict, first, width, frames, step.came_ns))
            first += width
        if not verdict.is_whole:
            for block in blocks:
                own = verdict.of(block.columns)
                block.frames = int(own.fresh.sum())
                block.repeated = self.rings.outputs(own.rows[: own.skipped.max()])
        return blocks

    def _expect(self, blocks: list[Block[Client]]) -> I32:
        """Keep blocks whose frames are about to be admitted; the number of each, which is nothing where it has none."""
        expected = [block for block in blocks if block.frames]
        for block in expected:
            block.client.frames_unanswered += block.frames
        numbers = self.blocks.add(expected)
        if len(expected) == len(blocks):
            return numbers
        of_all = np.zeros(len(blocks), np.int32)
        of_all[[block.frames > 0 for block in blocks]] = numbers
        return of_all

    def make_ready(self, slots: I64) -> None:
        """Streams with pending frames can step again: int64 [N]."""
        if len(slots):
            self._ready(slots, None, time.monotonic_ns())
        self.schedule()

    def _ready(self, slots: I64, owner: int | None, since_ns: int) -> None:
        """Streams, int64 [N], are ready to step; `owner` where they have one that is known."""
        self.scheduler.add(slots, self.table.owner[slots] if owner is None else owner, since_ns)

    # ── Schedule and step ──────────────────────────────────────────────────────────────────────────────────────────

    def would_wait(self, columns: int) -> bool:
        """Whether as many more ready streams would begin nothing before a run ends that is under way."""
        runs, ready = self._runs_under_way, self.scheduler.ready_count + columns
        return runs == _MOST_RUNS or (runs > 0 and ready < self.scheduler.max_batch_size)

    def schedule(self) -> None:
        """Give the worker a batch if it is free and one is due, and a full one to go on with while it steps."""
        while self._runs_under_way < _MOST_RUNS and self.scheduler.ready_count:
            if self._runs_under_way and self.scheduler.ready_count < self.scheduler.max_batch_size:
                return  # what arrives until the worker is free may still join this batch
            if not self._tap.has_room:
                return  # the recorder calls back when it has room again
            hold_ns = self.scheduler.hold_ns(time.monotonic_ns(), self.table.open_count)
            if hold_ns > 0 and not self.draining:
                self._hold(hold_ns)
                return
            self._step(self.scheduler.next_batch())

    def _step(self, slots: I64) -> None:
        """Begin a run: one step, or as many as these streams have frames for where nobody else waits."""
        bucket = self._stepper.bucket(len(slots))
        rows = self.rings.take(slots, self._most_steps(bucket))
        tickets = self._tap.inputs(slots, rows, bucket)
        self._runs_under_way += 1
        expected_ns = len(rows) * self._step_ns.get(bucket, 0)
        self.expected_ns += expected_ns

        def step(slots: I64, rows: I64) -> None:
            self._stepper.step(slots, rows, self.rings.x, self.rings.y)

        def done(ended: Ended, _: Exception | None) -> None:
            self._runs_under_way -= 1
            self.expected_ns -= expected_ns
            self._ended(slots, rows, bucket, tickets, ended)

        is_short = bucket == self._stepper.buckets[0] and 0 < expected_ns < _SHORT_NS and not self._tap.is_recording
        self._worker.submit(Job(lambda: run_steps(step, slots, rows), done, (slots, rows), is_short))
        self.on_changed()  # after that: a snapshot says that it contains what it finds recorded

    def _most_steps(self, bucket: int) -> int:
        """How long a run may be, whatever its streams have."""
        if self.scheduler.ready_count:
            return 1  # somebody else's turn comes after each step
        step_ns = self._step_ns.get(bucket, self.longest_run_ns)  # one step, to see how long they take
        return max(1, min(MOST_STEPS, self._tap.room, self.longest_run_ns // max(step_ns, 1)))

    def _hold(self, hold_ns: int) -> None:
        if not self._hold_timer:
            self._hold_timer = True
            self._call_later(hold_ns / 1e9, self._end_hold)

    def _end_hold(self) -> None:
        self._hold_timer = False
        self.schedule()

    def _ended(self, slots: I64, rows: I64, bucket: int, tickets: list[int], ended: Ended) -> None:
        """A run over rows, int64 [steps, B], has ended, each step under its ticket."""
        steps = ended.steps
        numbers = self.rings.block[rows[:steps]].reshape(-1)
        self.rings.applied(slots, steps)
        if steps:
            self._step_ns[bucket] = step_ns = (ended.ended_ns - ended.began_ns) // steps
            self._statistics.batches_total += steps
            self._statistics.frames_total += len(numbers)
            for ticket, rows_of_step in zip(tickets, rows[:steps], strict=False):
                self._tap.outputs(ticket, rows_of_step, step_ns)
            times_ns = ended.ended_ns - step_ns, ended.ended_ns
            self._tap.when_durable(tickets[steps - 1], lambda: self._deliver(numbers, *times_ns))
        self.on_run_ended()  # after that: those who have waited longer are answered first
        if ended.error is None:
            self.make_ready(self.rings.let_go(slots))
        else:
            self._failed(slots, tickets[steps:], ended.error)

    def _failed(self, slots: I64, tickets: list[int], error: Exception) -> None:
        """A step failed: none of its frames was applied, nor can the frames behind them be."""
        now_ns = time.monotonic_ns()
        self._statistics.step_failures_total += 1
        self._log_failure(error, len(slots))
        is_lost = isinstance(error, StateLost)
        rows, whose = self.rings.failed(slots)
        seqs = self.table.step_seq[slots]
        of_step = np.isin(rows, self.rings.rows(slots, seqs))
        codes = np.where(of_step, Code.STEP_FAILED, Code.SEQ_GAP).astype(np.int32)
        if is_lost:
            codes[:] = Code.STATE_LOST
        numbers = self._refuse(rows, whose, codes)
        if is_lost:
            self.table.lost[slots] = True
            self.on_state_lost(slots[~self.table.closing[slots]])
        detail = f"{'state_lost' if is_lost else 'step_failed'}: {error}"
        newest = [self._tap.failed(ticket, detail) for ticket in tickets][-1]
        self.schedule()
        self._tap.when_durable(newest, lambda: self._deliver(numbers, now_ns, now_ns))

    def without_state(self, slots: I64) -> None:
        """Held streams, int64 [N], have no state to step, as it could not be loaded: what came for them is refused."""
        now_ns = time.monotonic_ns()
        rows, whose = self.rings.failed(slots)
        numbers = self._refuse(rows, whose, np.full(len(rows), Code.STATE_LOST, np.int32))
        self._tap.when_durable(self._tap.newest, lambda: self._deliver(numbers, now_ns, now_ns))

    def _refuse(self, rows: I64, whose: I64, codes: I32) -> I32:
        """Frames that were taken out fail for these reasons, int32 [F]; the blocks of each: int32 [F]."""
        order = np.argsort(rows)
        rows, whose, codes = rows[order], whose[order], codes[order]
        numbers = self.rings.block[rows]
        for number in np.unique(numbers).tolist():
            self.blocks[number].fail(rows, codes, self.table.step_seq[whose])
        return numbers

    # ── Deliver ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _deliver(self, numbers: I32, began_ns: int, ended_ns: int) -> None:
        complete = self.blocks.answered(numbers)
        if len(complete) == 1:
            self._complete(complete, (began_ns, ended_ns))
        else:
            for _, group in groupby(complete, attrgetter("timesteps")):
                self._complete(list(group), (began_ns, ended_ns))
        self.on_answered()

    def _complete(self, blocks: list[Block[Client]], stepped_ns: tuple[int, int] | None) -> None:
        """Answer blocks of equally many timesteps whose last frames were stepped between those times, if any were."""
        messages, end = together(blocks, self._most_answered), 0
        whole = answer([block for message in messages for block in message], self.rings)
        for message in messages:
            start, end = end, end + sum(block.width for block in message)
            self._answer(message, whole if len(messages) == 1 else whole.of(slice(start, end)), stepped_ns)
        self.table.answered(whole.slots, whole.fresh, are_distinct=whole.are_distinct)

    def _answer(self, blocks: list[Block[Client]], answer: Answer, stepped_ns: tuple[int, int] | None) -> None:
        now_ns = time.monotonic_ns()
        queue_ns, compute_ns, send_ns = [0] * len(blocks), 0, 0
        if stepped_ns is not None:
            began_ns, ended_ns = stepped_ns
            queue_ns = [max(0, began_ns - block.came_ns) for block in blocks]
            compute_ns, send_ns = ended_ns - began_ns, max(0, now_ns - ended_ns)
        self._statistics.answered(queue_ns, compute_ns, send_ns)
        requests, columns = [block.request for block in blocks], [block.width for block in blocks]
        message = replies.stepped(requests, columns, answer, (queue_ns[0], compute_ns, send_ns))
        self._postbox.send(blocks[0].client, message, now_ns, sum(block.frames for block in blocks))
