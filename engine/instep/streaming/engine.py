"""The engine's hot path: submit, admit, schedule, collect, flush. The rules are the kernels of `core`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from instep.core.admission import admit
from instep.core.runs import fail_run, finish_run, hold, release
from instep.core.scheduler import begin_run
from instep.core.streams import StreamTable
from instep.core.tables import (
    CREDIT_STALLS,
    FREE_MESSAGES,
    MOST_STEPS,
    PENDING_FRAMES,
    READY,
    READY_SINCE_NS,
    RECEIVED_FRAMES,
    REPEATED_FRAMES,
    Records,
    Tables,
)
from instep.core.typing import I32, I64, U32
from instep.runtime.executor import RunResult, StateLost, StepExecutor
from instep.streaming.api import Frames, Origin, Refusal, StreamEvent
from instep.streaming.delivery import Answer, Delivery
from instep.streaming.journal import Journal
from instep.streaming.origins import Origins
from instep.streaming.stats import EngineStats, EventLog
from instep.streaming.tasks import Waiters
from instep_client.protocol.codes import Code

_LONGEST_RUN_NS: Final = 1_000_000
"""The approximate longest wait of a stream that becomes ready during a run of several steps."""
_BUSY_RETRY_US: Final = 2000
_MESSAGE_NS: Final = 5_000
"""The least time that the loop needs for a message. (AMD EPYC: 9 µs from socket to socket.)"""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of the hot path."""

    max_batch_size: int
    max_queue_delay_ns: int
    max_reply_frames: int
    """The most frames (T × N) in a reply to several messages."""
    max_light_batch: int = 0
    """The most streams in a batch while most frames come in messages of their own; 0 for no limit. The loop's work for
    such a batch takes longer than the step, and clients work while the next small batch is stepped.
    """


@dataclass(slots=True)
class _Run:
    slots: I64
    rows: I64
    lsns: list[int]
    expected_ns: int


@dataclass(slots=True)
class _Complete:
    """Complete messages that are answered once `lsn` is durable."""

    lsn: int
    numbers: I32
    began_ns: int
    ended_ns: int


class Engine:
    """One model with many streams, from submitted frames to replies. All methods run on the loop's thread.

    A turn of the loop calls `collect`, `flush`, `admit` and `schedule`, in this order. Operations on streams begin
    between turns, so every frame submitted before one is admitted before it. Nothing else orders frames and operations.

    `log_failure` is called with the error and the number of streams after a step or an access to states has failed.
    `call_later` calls a function after some seconds, and `wake` lets the loop take a turn.
    """

    def __init__(
        self,
        tables: Tables,
        table: StreamTable,
        origins: Origins,
        executor: StepExecutor,
        journal: Journal,
        limits: EngineLimits,
        stats: EngineStats,
        events: EventLog,
        log_failure: Callable[[Exception, int], None],
        call_later: Callable[[float, Callable[[], None]], object],
        wake: Callable[[], None],
    ) -> None:
        self.tables = tables
        self.packed = tuple(tables)
        """The tables in the form that kernels take."""
        self.table = table
        self.origins = origins
        self.executor = executor
        self.journal = journal
        self.stats = stats
        self.events = events
        self.waiters = Waiters()
        """Waiters that are checked whenever frames were answered or a run has ended."""
        self.lost: list[I64] = []
        """Slots whose states a failed step has lost, for the operations to close."""
        self.asleep: dict[int, tuple[Origin, str, int]] = {}
        """By the owner's handle: owner, name and epoch of hibernating streams whose owners are connected."""
        self.wanted: set[str] = set()
        """Names of hibernating streams for which frames have come, for `Hibernation` to wake."""
        self.draining = False
        """While True, no more frames can arrive for which a batch could wait."""
        self.expected_ns = 0
        """The sum of the expected durations of all runs under way."""
        self._limits = limits
        self.log_failure = log_failure
        self._call_later = call_later
        self.wake = wake
        self._submitted: list[Frames] = []
        self._runs: deque[_Run] = deque()
        self._results: deque[_Complete] = deque()
        self._step_ns: dict[int, int] = {}
        """The newest duration of a step, by the bit length of the batch size."""
        self._is_holding = False
        self._delivery = Delivery(tables, origins, stats, limits.max_reply_frames)

    @property
    def pending_frames(self) -> int:
        """The number of frames admitted and not yet computed."""
        return int(self.tables.counts[PENDING_FRAMES])

    @property
    def unanswered_messages(self) -> int:
        """The number of messages accepted and not yet answered."""
        return sum(len(frames.messages) for frames in self._submitted) + int(self.tables.origins["messages"].sum())

    @property
    def is_quiet(self) -> bool:
        """Whether everything submitted is answered and no operation waits."""
        return not (self._submitted or self._runs or self._results or self.unanswered_messages or self.waiters)

    @property
    def is_running(self) -> bool:
        """Whether runs are under way."""
        return bool(self._runs)

    def take_over(self) -> None:
        """Serve streams that another version's engine served before; the counters of frames begin at 0."""
        self.tables.counts[[RECEIVED_FRAMES, REPEATED_FRAMES, CREDIT_STALLS]] = 0

    def answer_with(self, answer: Answer) -> None:
        """Have a front end answer messages of its origins, several at once."""
        self._delivery.answer = answer

    # ── Submit and admit ───────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, frames: Frames) -> None:
        """Queue messages until this turn's `admit`. The front end's budget bounds the queue."""
        self._submitted.append(frames)

    def admit(self) -> None:
        """Admit the good frames of all queued messages, with the same result as one by one; replies follow."""
        submitted, self._submitted = self._submitted, []
        most = len(self.tables.outcomes)
        for frames in submitted:
            for first in range(0, len(frames.messages), most):
                self._admit(frames.messages[first : first + most], frames.columns, frames.x)

    def _admit(self, messages: Records, columns: Records, x: U32) -> None:
        complete, partly_repeated, refused, unknown = admit(self.packed, messages, columns, x)
        if unknown:
            wanted = self._note_wanted(messages, columns) if self.asleep else 0
            self.stats.refused[Code.UNKNOWN_STREAM] += unknown - wanted
        if partly_repeated:  # the kernel lists them at the end of `complete`
            self._delivery.keep_repeated(self.tables.complete[len(messages) - partly_repeated : len(messages)])
        if refused:
            outcomes = self.tables.outcomes[: len(messages)]
            for place in np.flatnonzero(outcomes).tolist():
                self._refuse(messages[place], Code(int(outcomes[place])))
        if complete:
            self._delivery.deliver(self.tables.complete[:complete], 0, 0)

    def _note_wanted(self, messages: Records, columns: Records) -> int:
        """Notify owners of hibernating streams before they get the refusals; returns the number of such columns."""
        count = 0
        outcomes = self.tables.outcomes[: len(messages)].tolist()
        for message, outcome in zip(messages, outcomes, strict=True):
            origin = self._sender(message)
            handles = columns["handle"][message["column_at"] :][: message["width"]].tolist()
            own = [handle for handle in handles if handle in self.asleep and self.asleep[handle][0] is origin]
            if own and origin is not None:
                self.wanted.update(self.asleep[handle][1] for handle in own)
                origin.notify(StreamEvent(Code.HIBERNATED, np.array(list(dict.fromkeys(own)), np.uint64)))
            count += 0 if outcome else len(own)
        return count

    def _refuse(self, message: Any, code: Code) -> None:
        is_busy = code is Code.BUSY
        self.stats.busy_total += is_busy
        self.stats.refuse(code)
        if (origin := self._sender(message)) is not None:
            origin.refuse(int(message["tag"]), Refusal(code, retry_after_us=_BUSY_RETRY_US if is_busy else 0))

    def _sender(self, message: Any) -> Origin | None:
        """The origin of a message, if it is still connected."""
        origin = self.origins[int(message["origin"])]
        return origin if origin is not None and origin.arrival == message["arrival"] else None

    # ── Schedule and collect ───────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> None:
        """Give the executor a run if it is free and one is due, and a second one only if that is full."""
        counts, limits = self.tables.counts, self._limits
        while len(self._runs) < self.executor.capacity and counts[READY]:
            if self._runs and counts[READY] < limits.max_batch_size:
                return  # what arrives until the executor is free may still join this batch
            room = self.journal.room
            if not room:
                return  # the recorder wakes the loop when it has room again
            if limits.max_queue_delay_ns and self._holds_batch():
                return
            messages = len(self.tables.messages) - int(counts[FREE_MESSAGES])  # pending ones
            is_light = limits.max_light_batch > 0 and 2 * messages > counts[PENDING_FRAMES]
            most_streams = limits.max_light_batch if is_light else limits.max_batch_size
            most_steps = 1 if counts[READY] > most_streams else min(MOST_STEPS, room)
            self._begin(most_streams, most_steps, _MESSAGE_NS if is_light else 0)

    def _begin(self, most_streams: int, most_steps: int, loop_ns_per_frame: int) -> None:
        """Begin a run; the loop needs at least `loop_ns_per_frame` for the messages of each frame."""
        ready = min(int(self.tables.counts[READY]), most_streams)
        # Where no batch of about that size was stepped yet, one step, to see how long it takes.
        step_ns = self._step_ns.get(ready.bit_length(), _LONGEST_RUN_NS)
        most_steps = max(1, min(most_steps, _LONGEST_RUN_NS // max(step_ns, 1)))
        tables = self.tables
        size, steps = begin_run(self.packed, most_streams, most_steps)
        if not size:
            return  # all of them are held
        # Copies, because the next `begin_run` overwrites the tables while this run is under way.
        slots, rows = tables.run_slots[:size].copy(), tables.run_rows[: steps * size].reshape(steps, size).copy()
        lsns = self.journal.inputs(slots, rows)
        expected_ns = len(rows) * self._step_ns.get(size.bit_length(), 0)
        self.expected_ns += expected_ns
        self._runs.append(_Run(slots, rows, lsns, expected_ns))
        self.executor.begin(slots, rows, expected_ns, rows.size * loop_ns_per_frame)

    def _holds_batch(self) -> bool:
        """Whether to wait for a fuller batch; a timer then wakes the loop."""
        counts, limits = self.tables.counts, self._limits
        is_full = counts[READY] >= min(limits.max_batch_size, self.table.open_count)
        hold_ns = int(counts[READY_SINCE_NS]) + limits.max_queue_delay_ns - time.monotonic_ns()
        if is_full or hold_ns <= 0 or self.draining:
            return False
        if not self._is_holding:
            self._is_holding = True
            self._call_later(hold_ns / 1e9, self._end_hold)
        return True

    def _end_hold(self) -> None:
        self._is_holding = False
        self.wake()  # the turn, not `schedule` alone: a run that ends within `begin` has to be collected

    def collect(self) -> bool:
        """Take the runs that have ended, and return whether there were any.

        Raises:
            ExecutorDied: if the executor has died.
        """
        if not self._runs:
            return False
        results = self.executor.ended()
        for result in results:
            self._finish(self._runs.popleft(), result)
        if results:
            self.waiters.check()
        return bool(results)

    def _finish(self, run: _Run, result: RunResult) -> None:
        steps, slots = result.steps, run.slots
        self.expected_ns -= run.expected_ns
        self.stats.executor_busy_ns += result.ended_ns - result.began_ns
        if steps:
            count = finish_run(self.packed, slots, steps, result.ended_ns, result.error is None)
            numbers = self.tables.complete[:count].copy()
            self._step_ns[len(slots).bit_length()] = step_ns = (result.ended_ns - result.began_ns) // steps
            self.stats.stepped(len(slots), steps, step_ns)
            if self.journal.is_recording:
                for lsn, rows in zip(run.lsns, run.rows[:steps], strict=False):
                    self.journal.outputs(lsn, rows, step_ns)
            began_ns = result.ended_ns - step_ns
            self._results.append(_Complete(run.lsns[steps - 1], numbers, began_ns, result.ended_ns))
        if result.error is not None:
            self._fail(slots, run.lsns[steps:], result.error)

    def _fail(self, slots: I64, lsns: list[int], error: Exception) -> None:
        """Fail the frames of a step that failed, and the frames behind them, which cannot be applied either."""
        self.stats.step_failures_total += 1
        self.log_failure(error, len(slots))
        code = Code.STEP_FAILED
        if isinstance(error, StateLost):
            code = Code.STATE_LOST
            self.table.lost[slots] = True
            self.lost.append(slots)
        numbers = self._take_out(slots, code)
        detail = f"{code.name.lower()}: {error}"
        newest = [self.journal.failed(lsn, detail) for lsn in lsns][-1]
        self._results.append(_Complete(newest, numbers, 0, 0))

    # ── Flush ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def flush(self) -> None:
        """Answer messages whose outputs are computed and durable."""
        released, has_delivered = self.journal.released, False
        while self._results and self._results[0].lsn <= released:
            result = self._results.popleft()
            if len(result.numbers):
                self._delivery.deliver(result.numbers, result.began_ns, result.ended_ns)
            has_delivered = True
        if has_delivered:
            self.waiters.check()

    # ── For operations ─────────────────────────────────────────────────────────────────────────────────────────────

    def hold(self, slots: I64) -> None:
        """Keep streams, int64 [N], from beginning further steps until `release`."""
        hold(self.packed, slots)

    def release(self, slots: I64) -> None:
        """Undo one `hold`; the caller then lets the loop take a turn."""
        release(self.packed, slots, time.monotonic_ns())

    def fail_pending(self, slots: I64, code: Code) -> None:
        """Fail the pending frames of streams, int64 [N], that are in no run."""
        self._results.append(_Complete(self.journal.newest, self._take_out(slots, code), 0, 0))

    def _take_out(self, slots: I64, code: Code) -> I32:
        """Remove all pending frames of streams; return the messages that are complete now."""
        return self.tables.complete[: fail_run(self.packed, slots, int(code))].copy()
