"""The streams of a recording in another network: recorded frames are stepped in it, from some earlier state on."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from instep.core.typing import F32, I64, U8, U32
from instep.recording.errors import RecordingError, TrimmedMeanwhile
from instep.recording.records import BatchGroup, RecordedBatch, RecordedEvent
from instep.recording.schema import END_EVENT, RESET_EVENT
from instep.recording.tail import Closed, Item, Opened, RecordingTail
from instep.runtime.stepper import Stepper

_NOT_FOLLOWED: Final = 0
"""The scratch slot: where frames go that belong to no stream that is followed."""
_NOT_BEGUN: Final = -1
_WINDOW: Final = 512
"""Positions of the recording that are read together, backwards."""
_TRIES: Final = 8
"""The most readings of a recording whose history is trimmed meanwhile."""


class _Waiting(NamedTuple):
    """The frames of a recorded batch that are to be stepped."""

    slots: I64
    """int64 [B]."""
    seqs: I64
    """int64 [B]."""
    x: F32
    """float32 [B, features]."""
    y: F32 | None
    """float32 [B, outputs], as recorded; None where the engine was killed before."""


class WarmUpReplay:
    """Follows the open streams of a recording, which may be being written, in a network that nobody else uses.

    Everything is taken in the order in which it was recorded, streams that open and close included. The stepper has
    `max_streams` slots.

    Without `frames` it begins with the states that the recording holds, those of its newest checkpoint. With N frames
    it begins in the network's initial state, with the N newest frames of each stream or, where there are fewer since it
    was opened or reset, with all of them.
    """

    def __init__(self, path: Path, stepper: Stepper, max_streams: int, frames: int | None) -> None:
        self.is_finished = False
        """Whether the recording was closed in order when it was last read."""
        self._path = path
        self._stepper = stepper
        self._frames = frames
        self._tail: RecordingTail | None = None
        """What was read last; closed."""
        self._read_to = 0
        """The position up to which everything was taken in."""
        self._frames_read = 0
        """Frames of streams that are followed; some count again where the recording was trimmed meanwhile."""
        self._began_at = _NOT_BEGUN
        """The position at which those streams were open that it began with."""
        self._free = list(range(max_streams, 0, -1))
        self._slots: dict[int, int] = {}
        """By number of a stream that is followed, its slot here."""
        # By slot: the first frame that counts, the first one that was stepped, and the next one.
        self._starts, self._firsts, self._nexts = np.zeros((3, max_streams + 1), np.int64)
        self._waiting: list[_Waiting] = []
        """Frames that are stepped together, no stream twice."""
        self._is_waiting = np.zeros(max_streams + 1, np.bool_)

    def follow(self) -> int:
        """Step everything that was committed by now; not in the thread of an event loop.

        Returns:
            The number of frames that there were.

        Raises:
            RecordingError: when the recording is damaged, has more open streams than slots, or is trimmed all the time.
        """
        before = self._frames_read
        for left in reversed(range(_TRIES)):
            try:
                with RecordingTail(self._path, self._tail) as tail, torch.inference_mode():
                    self._tail = tail
                    self._read(tail)
                break
            except TrimmedMeanwhile:
                if not left:
                    raise
        return self._frames_read - before

    def states(self, streams: I64, next_seqs: I64) -> tuple[U8, I64]:
        """The states of open streams by number, int64 [N], as the last `follow` has left them.

        Args:
            streams: int64 [N].
            next_seqs: int64 [N], the frames before which the states must be.

        Returns:
            States as rows of bytes [N, row_bytes], and the first frame that is in each, int64 [N].

        Raises:
            RecordingError: when frames of a stream are missing.
        """
        slots = self._slots_of(streams)
        has_begun = self._nexts[slots] != _NOT_BEGUN
        if (slots == _NOT_FOLLOWED).any() or (self._nexts[slots] != next_seqs)[has_begun].any():
            raise RecordingError(f"{self._path} lacks frames of streams that are open")
        return self._stepper.read(slots), np.where(has_begun, self._firsts[slots], next_seqs)

    # ── For subclasses ─────────────────────────────────────────────────────────────────────────────────────────────

    def _wants(self, opened: Opened) -> bool:
        """Whether to follow a stream, which there may be no slot for."""
        if not self._free:
            raise RecordingError(f"{self._path} has more open streams than engine.max_streams: raise it")
        return True

    def _opened(self, slot: int, name: str) -> None:
        """A stream is followed from now on."""

    def _began(self, slots: I64, seqs: I64) -> None:
        """From these frames on, int64 [N], outputs of the streams in `slots`, int64 [N], can be compared."""

    def _stepped(self, slots: I64, seqs: I64, y: F32, recorded: F32) -> None:
        """Frames were stepped: outputs here and those that were recorded, float32 [B, outputs]."""

    def _release(self, stream: int) -> None:
        """Follow the stream of that number no longer, if it was followed."""
        if slot := self._slots.pop(stream, _NOT_FOLLOWED):
            self._step_waiting(slot)
            self._free.append(slot)

    # ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, tail: RecordingTail) -> None:
        """Step all that a recording shows; where it is trimmed meanwhile, the next call continues."""
        tail.forget(tail.trimmed.position)
        is_trimmed = self._read_to < tail.trimmed.position  # before it was read
        if self._began_at == _NOT_BEGUN or is_trimmed:
            first = self._begin(tail)  # which may fail
            self._read_to, self._began_at = first - 1, tail.last_position
        for item in tail.history(self._read_to + 1):
            self._take(item, tail)
            self._read_to = item.position
            self.is_finished = isinstance(item, RecordedEvent) and item.kind == END_EVENT
        self._step()

    def _take(self, item: Item, tail: RecordingTail) -> None:
        if isinstance(item, BatchGroup):
            for batch in item.batches():
                self._add(batch, tail)
        elif isinstance(item, Opened):
            if item.position > self._began_at:  # else it is followed, or was not wanted, or has closed
                self._open(item)
        elif isinstance(item, Closed):
            self._release(item.stream)
        elif item.kind == RESET_EVENT:
            self._reset(item)

    # ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, tail: RecordingTail) -> int:
        """Follow the streams that are open, and return the position from which on their frames count."""
        for number in list(self._slots):
            self._release(number)
        closed = {row[2] for row in tail.rows("closings")}
        for position, _, number, name, _, first_seq, state in tail.rows("openings"):
            if number not in closed:
                self._open(Opened(position, number, name, first_seq, tail.state(state, position)))
        slots, first_seqs = np.array(list(self._slots.values()), np.int64), self._starts.copy()
        for number, slot in self._slots.items():
            if (row := tail.newest_row("states", "stream = ?", number)) is not None:
                self._starts[slot] = row[2]
                self._load(slot, tail.state(row[3], row[1]))
        first = max(tail.first_position, tail.newest_checkpoint + 1)
        if self._frames is None:
            self._began(slots, self._starts[slots])
            return first
        nexts = self._starts.copy()
        for item in tail.history(first):
            if isinstance(item, BatchGroup):
                np.maximum.at(nexts, self._slots_of(item.streams), item.seqs.astype(np.int64) + 1)
        self._began(slots, nexts[slots])
        self._starts[slots] = np.maximum(first_seqs, nexts - self._frames)[slots]
        return self._first_needed(tail, slots[nexts[slots] > self._starts[slots]])

    def _first_needed(self, tail: RecordingTail, slots: I64) -> int:
        """From which position on the frames are that count; read backwards, since most are near the end."""
        is_missing = np.zeros(len(self._nexts), np.bool_)
        is_missing[slots] = True
        first = tail.last_position + 1
        while is_missing.any() and first > tail.first_position:
            last, first = first - 1, max(first - _WINDOW, tail.first_position)
            for batch in tail.whole_batches(first, last):
                places = self._slots_of(batch.streams)
                is_missing[places[batch.seqs.astype(np.int64) <= self._starts[places]]] = False
        return first

    def _open(self, opened: Opened) -> None:
        if self._wants(opened):
            slot = self._slots[opened.stream] = self._free.pop()
            self._opened(slot, opened.name)
            self._start(slot, opened.first_seq, opened.state)

    def _reset(self, event: RecordedEvent) -> None:
        assert event.stream is not None
        assert event.seq is not None
        slot = self._slots.get(event.stream, _NOT_FOLLOWED)
        if slot and event.seq >= self._starts[slot]:  # else the state that it began with is newer
            self._step_waiting(slot)
            self._start(slot, event.seq, event.state)

    def _start(self, slot: int, seq: int, state: U8 | None) -> None:
        """A stream begins, or begins again, before the frame `seq`."""
        self._starts[slot], self._nexts[slot] = seq, _NOT_BEGUN
        self._load(slot, state)
        comparable = seq if state is None or self._frames is None else seq + self._frames
        self._began(np.array([slot]), np.array([comparable]))

    def _load(self, slot: int, state: U8 | None) -> None:
        """Begin with a recorded state, if the network has such states, and otherwise in its initial state."""
        self._stepper.load(np.array([slot]), None if state is None or self._frames is not None else state[None])

    def _slots_of(self, streams: I64 | U32) -> I64:
        return np.array([self._slots.get(number, _NOT_FOLLOWED) for number in streams.tolist()], np.int64)

    # ── Frames ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _add(self, batch: RecordedBatch, tail: RecordingTail) -> None:
        slots, seqs = self._slots_of(batch.streams), batch.seqs.astype(np.int64)
        counts = (slots != _NOT_FOLLOWED) & (seqs >= self._starts[slots])
        slots, seqs = slots[counts], seqs[counts]
        if not len(slots):
            return
        begins = self._nexts[slots] == _NOT_BEGUN
        if (self._nexts[slots] != seqs)[~begins].any():
            raise tail.damaged("frames of an open stream are missing")
        if (
            self._is_waiting[slots].any()
            or sum(len(each.seqs) for each in self._waiting) >= self._stepper.max_batch_size
        ):
            self._step()
        self._firsts[slots[begins]] = seqs[begins]
        self._nexts[slots] = seqs + 1
        self._frames_read += len(seqs)
        y = None if batch.y is None else batch.y[counts]
        self._waiting.append(_Waiting(slots, seqs, batch.x[counts], y))
        self._is_waiting[slots] = True

    def _step_waiting(self, slot: int) -> None:
        """Step the frames that wait if one of them is of this slot, whose state is about to change otherwise."""
        if self._is_waiting[slot]:
            self._step()

    def _step(self) -> None:
        """Step the frames that wait."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        slots, seqs, x = (np.concatenate(columns) for columns in list(zip(*waiting, strict=True))[:3])
        self._is_waiting[slots] = False
        rows, most = np.arange(len(slots)), self._stepper.max_batch_size
        y = np.empty((len(slots), self._stepper.model.description.outputs), np.float32)
        for first in range(0, len(slots), most):
            part = slice(first, first + most)
            self._stepper.step(slots[part], rows[part], x, y)
        answered = np.repeat([each.y is not None for each in waiting], [len(each.slots) for each in waiting])
        recorded = np.concatenate([y[:0], *(each.y for each in waiting if each.y is not None)])
        self._stepped(slots[answered], seqs[answered], y[answered], recorded)
