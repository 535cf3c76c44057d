"""Reads and writes the states of streams while nothing steps them, and moves them to and from the recording."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Final

import numpy as np

from instep.core.runs import are_running
from instep.core.streams import StreamTable
from instep.core.tables import WINDOW, Tables, rows_of
from instep.core.typing import I64, U8, Bool
from instep.recording.records import OpenStream, StateRows
from instep.runtime.stepper import StateAccess
from instep.streaming.engine import Engine
from instep.streaming.tasks import Tasks

AT_ONCE: Final = 4096
"""The most states that are copied before the loop gets its turn."""
CHECKPOINT_AT_ONCE: Final = 1024
"""The number of states read together and written in one transaction. Replies may wait for it."""


class StreamStates:
    """Access to the states of streams, during which other streams continue."""

    def __init__(self, engine: Engine, access: StateAccess, at_once: int = AT_ONCE) -> None:
        self.access = access
        self.spec = access.state
        self._engine = engine
        self._at_once = at_once
        self._numbers = count(1)
        self._turns: dict[int, set[int]] = {}
        """By number of a waiter, the numbers of the waiters it waits for."""
        self._newest: I64 = np.zeros(len(engine.table.owner), np.int64)
        """The number of the last waiter, by slot."""

    @asynccontextmanager
    async def settled(self, slots: I64) -> AsyncIterator[None]:
        """Keep these streams out of runs, and their states from other readers and writers, while the block runs.

        Waiters for the same streams get their turns in order.
        """
        packed, number = self._engine.packed, next(self._numbers)
        earlier = self._turns.keys() & set(np.unique(self._newest[slots]).tolist())
        earlier.update(*(self._turns[turn] for turn in earlier))  # one of them may be cancelled before its turn
        self._turns[number], self._newest[slots] = earlier, number
        self._engine.hold(slots)
        try:
            await self._engine.waiters.until(lambda: earlier.isdisjoint(self._turns) and not are_running(packed, slots))
            yield
        finally:
            del self._turns[number]
            self._engine.release(slots)
            self._engine.waiters.check()  # closings and other turns wait for it
            self._engine.wake()

    async def read(self, slots: I64) -> tuple[I64, U8, Bool]:
        """Read next seqs, int64 [N], states [N, row_bytes] and which are lost; the streams do not step meanwhile."""
        table, incarnations = self._engine.table, self._engine.table.incarnations(slots)
        states, lost = self.spec.missing(len(slots)), np.zeros(len(slots), np.bool_)
        async with self.settled(slots):
            seqs: I64 = table.step_seq[slots]
            for first in range(0, len(slots), self._at_once):
                if first:
                    await asyncio.sleep(0)
                part = slice(first, first + self._at_once)
                try:
                    states[part] = self.access.read(slots[part])
                except Exception as error:
                    self._engine.log_failure(error, len(slots[part]))
                    lost[part] = True
            lost |= table.lost[slots] | ~table.are_open(slots, incarnations)
        states[lost] = self.spec.missing(int(lost.sum()))
        return seqs, states, lost

    async def load(self, slots: I64, states: U8 | None) -> int:
        """Set the states of streams without pending frames, which do not step meanwhile; return how many were set."""
        done = 0
        async with self.settled(slots):
            try:
                while done < len(slots):
                    if done:
                        await asyncio.sleep(0)
                    part = slice(done, done + self._at_once)
                    self.access.load(slots[part], None if states is None else states[part])
                    done = min(part.stop, len(slots))
            except Exception as error:
                self._engine.log_failure(error, len(slots))
        return done


def put_into_memory(tables: Tables, table: StreamTable, states: StateAccess, streams: Sequence[OpenStream]) -> I64:
    """Open streams in their states, parked and with their frames in the frame buffer. Their names are not in use.

    Returns:
        Their slots, int64 [≤ N]; the last streams are left out if there is no room for all.
    """
    streams = streams[: table.slots.free_count]
    # Outputs of another version of the model may be asked for again, too.
    first_seqs = np.array([min(stream.first_seq, stream.tail_seq) for stream in streams], np.int64)
    slots, codes = table.open([stream.name for stream in streams], table.parked, time.monotonic_ns(), first_seqs)
    assert not codes.any(), "a stream of this name is in memory already"
    table.recording_id[slots] = np.array([stream.stream for stream in streams], np.uint32)
    table.epoch[slots] = np.array([stream.epoch for stream in streams], np.uint64)
    table.former_epoch[slots] = np.array([stream.former_epoch for stream in streams], np.uint64)
    table.granted_seq[slots] = np.array([stream.granted_seq for stream in streams], np.int64)
    table.step_seq[slots] = table.next_seq[slots] = np.array([stream.seq for stream in streams], np.int64)
    table.acked[slots] = np.array([stream.tail_seq for stream in streams], np.int64)
    for slot, stream in zip(slots.tolist(), streams, strict=True):
        _fill_frame_buffer(tables, slot, stream)
    try:
        _load(states, slots, streams)
    except BaseException:
        table.release(slots)
        raise
    return slots


def _load(states: StateAccess, slots: I64, streams: Sequence[OpenStream]) -> None:
    is_initial = np.array([stream.state is None for stream in streams], np.bool_)
    if is_initial.any():
        states.load(slots[is_initial], None)
    if not is_initial.all():
        rows = np.stack([stream.state for stream in streams if stream.state is not None])
        states.load(slots[~is_initial], rows)


def _fill_frame_buffer(tables: Tables, slot: int, stream: OpenStream) -> None:
    kept = min(stream.seq - stream.tail_seq, int(tables.counts[WINDOW]))  # the window may be smaller than it was
    if kept:
        rows = rows_of(tables, np.full(kept, slot), np.arange(stream.seq - kept, stream.seq))
        tables.x[rows], tables.y[rows] = stream.tail_x[-kept:], stream.tail_y[-kept:]


def state_rows(tables: Tables, table: StreamTable, slots: I64, states: U8) -> StateRows:
    """The states of open streams, [N, …], and the frames of each whose outputs its client may lack."""
    seqs = table.step_seq[slots]
    first = np.maximum(np.maximum(table.acked[slots], seqs - tables.counts[WINDOW]), table.first_seq[slots])
    counts = seqs - first
    offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    tail = rows_of(tables, np.repeat(slots, counts), np.repeat(first, counts) + offsets)
    return StateRows(table.recording_ids(slots), seqs, states, first, tables.x[tail], tables.y[tail])


class Checkpoints:
    """Keeps the time that a restart would need for the replay within a target.

    A checkpoint names the newest batch that all of its states include. It is read and written in parts, and streams
    continue meanwhile, so a state may include later frames, as its seq shows; a replay skips those. The last part makes
    the checkpoint valid.

    A checkpoint is due when the steps since the last one took longer than `target_ns`.
    """

    def __init__(
        self,
        engine: Engine,
        states: StreamStates,
        tasks: Tasks,
        target_ns: int,
        at_once: int = CHECKPOINT_AT_ONCE,
    ) -> None:
        self._engine = engine
        self._states = states
        self._tasks = tasks
        self._target_ns = target_ns
        self._at_once = at_once
        self.is_under_way = False
        """Whether a checkpoint has begun and is not committed yet."""
        self.taken_ns = time.monotonic_ns()
        """The time at which the newest complete checkpoint began; before the first, the start of the service."""

    def take_if_due(self) -> None:
        """Begin a checkpoint if a restart would replay for longer than the target, or trimming needs one."""
        journal = self._engine.journal
        if (journal.computed_ns > self._target_ns or journal.wants_checkpoint) and not self.is_under_way:
            self._tasks.start(self.take())

    async def take(self) -> None:
        """Write the states that changed since the last checkpoint; after a failure the older one stays valid."""
        if self.is_under_way or not self._engine.journal.is_recording:
            return
        self.is_under_way = True
        began_ns = time.monotonic_ns()
        journal, table = self._engine.journal, self._engine.table
        through = journal.begin_checkpoint()
        slots = journal.dirty.begin_flush()
        incarnations = table.incarnations(slots)
        journal.computed_ns = 0
        try:
            # Where nothing has changed, the recording may still want one: it holds other rows than frames.
            end = max(len(slots), 1) if journal.wants_checkpoint else len(slots)
            for first in range(0, end, self._at_once):
                part = slice(first, first + self._at_once)
                async with self._states.settled(slots[part]):
                    is_open = table.are_open(slots[part], incarnations[part])
                    opened = slots[part][is_open]
                    if table.lost[opened].any():  # it is about to close
                        return
                    rows = state_rows(self._engine.tables, table, opened, self._states.access.read(opened))
                lsn = journal.states(through, rows, is_last=part.stop >= len(slots))
                await journal.committed(lsn)
                journal.dirty.flushed(slots[part])
            self.taken_ns = began_ns
            self._engine.events.add("checkpoint", detail=f"{len(slots)} states")
        except Exception as error:
            self._engine.log_failure(error, len(slots))
        finally:
            journal.dirty.flush_failed(slots)  # those that were not flushed, also where it is cancelled
            journal.end_checkpoint()
            self.is_under_way = False
