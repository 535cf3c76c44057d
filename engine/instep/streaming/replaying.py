"""The streams of a recording in another network: recorded frames are stepped in it, from some earlier state on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.recording.errors import RecordingError, TrimmedMeanwhile
from instep.recording.file import RecordingFile
from instep.recording.schema import END_EVENT, RESET_EVENT
from instep.runtime.stepper import Stepper

_NOT_FOLLOWED: Final = 0
"""The scratch slot: where frames go that belong to no stream that is followed."""
_NOT_BEGUN: Final = -1
_WINDOW: Final = 512
"""Positions of the recording that are read together."""
_TRIES: Final = 8
"""The most readings of a recording whose history is trimmed meanwhile."""


class _Computed(NamedTuple):
    """A recorded step that was computed, or those frames in it that count."""

    position: int
    streams: I64
    """int64 [B]: numbers in the recording, or slots here."""
    seqs: I64
    """int64 [B]."""
    x: F32
    """float32 [B, features]."""
    y: F32
    """float32 [B, outputs], as recorded."""


class WarmUpReplay:
    """Follows the open streams of a recording, which may be being written, in a network that nobody else uses.

    Args:
        path: the recording.
        stepper: of the network; its states are used.
        max_streams: how many slots it has.
        frames: None to begin with the states that the recording holds, those of its newest checkpoint; N to begin in
            the network's initial state, with the N newest frames of each stream or, where there are fewer since it was
            opened or reset, with all of them.
    """

    def __init__(self, path: Path, stepper: Stepper, max_streams: int, frames: int | None) -> None:
        self.is_finished = False
        """Whether the recording was closed in order when it was last read."""
        self._path = path
        self._stepper = stepper
        self._frames = frames
        self._read_to = 0
        """The position up to which frames were read."""
        self._streams_to = 0
        """Likewise for streams that open and close; 0 before the first time."""
        self._frames_read = 0
        """Those of streams that are followed, again where the recording was trimmed meanwhile."""
        self._free = list(range(max_streams, 0, -1))
        self._slots: I64 = np.zeros(1, np.int64)
        """By number of a stream, its slot here."""
        # By slot: the first frame that counts, the first one that was stepped, and the next one.
        self._starts, self._firsts, self._nexts = np.zeros((3, max_streams + 1), np.int64)
        self._waiting: list[_Computed] = []
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
                with RecordingFile(self._path) as recording, torch.inference_mode():
                    self._read(recording)
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

    def _select(self, openings: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Those of these rows of `openings` that are to be followed."""
        if len(openings) > len(self._free):
            raise RecordingError(f"{self._path} has more open streams than engine.max_streams: raise it")
        return openings

    def _opened(self, slots: I64, openings: list[tuple[Any, ...]]) -> None:
        """The streams of these rows are followed from now on, in slots int64 [N]."""

    def _began(self, slots: I64, seqs: I64) -> None:
        """From these frames on, int64 [N], outputs of the streams in `slots`, int64 [N], can be compared."""

    def _stepped(self, slots: I64, seqs: I64, y: F32, recorded: F32) -> None:
        """Frames were stepped: outputs here and those that were recorded, float32 [B, outputs]."""

    def drop(self, slots: I64) -> None:
        """Follow these streams, int64 [N], no longer; between two calls of `follow`."""
        if len(slots):
            self._slots[np.isin(self._slots, slots)] = _NOT_FOLLOWED
        self._free += slots.tolist()

    # ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, recording: RecordingFile) -> None:
        """Step all that a recording shows; where it is trimmed meanwhile, the next call continues."""
        self._step()
        if self._streams_to and self._read_to >= recording.trimmed.position:
            self._take_in_streams(recording)
        else:  # at first, and where it was trimmed before it was read
            self._read_to = self._begin(recording) - 1
        self._streams_to = recording.last_position
        for first in range(self._read_to + 1, recording.last_position + 1, _WINDOW):
            last = min(first + _WINDOW - 1, recording.last_position)
            # All of a window is read before any of it is stepped: in between, the recording may be trimmed.
            steps = list(_computed(recording, first, last))
            events = recording.rows("events", first, last)
            resets = deque(row for row in events if row[4] == RESET_EVENT and self._slot(row[2]))
            for step in steps:
                while resets and resets[0][0] < step.position:
                    self._reset(recording, resets.popleft())
                self._add(recording, step)
            for row in resets:
                self._reset(recording, row)
            self._read_to = last
        self._step()
        self.is_finished = any(row[4] == END_EVENT for row in recording.rows("events", self._read_to))

    # ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, recording: RecordingFile) -> int:
        """Follow the streams that are open; the position from which on their frames count."""
        self.drop(np.unique(self._slots[self._slots != _NOT_FOLLOWED]))
        self._streams_to = 0
        checkpoints = [row[0] for row in recording.rows("checkpoints")]
        first = max(recording.first_position, int(max(checkpoints, default=0)) + 1)
        slots, openings = self._take_in_streams(recording)
        rows = [recording.newest_row("states", "stream = ?", row[2]) for row in openings]
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if row is not None:
                self._starts[slot] = row[2]
                self._load(recording, slot, row[3], row[1])
        if self._frames is None:
            self._began(slots, self._starts[slots])
            return first
        nexts = self._starts.copy()
        for step in _computed(recording, first):
            places = self._slots_of(step.streams)
            nexts[places] = np.maximum(nexts[places], step.seqs + 1)
        first_seqs = np.array([row[5] for row in openings], np.int64)
        self._began(slots, nexts[slots])
        self._starts[slots] = np.maximum(first_seqs, nexts[slots] - self._frames)
        return self._first_needed(recording, slots[nexts[slots] > self._starts[slots]])

    def _take_in_streams(self, recording: RecordingFile) -> tuple[I64, list[tuple[Any, ...]]]:
        """Follow streams that have opened since, and no longer those that have closed: the former, and their rows."""
        closed = {row[2] for row in recording.rows("closings", self._streams_to + 1)}
        opened = [row for row in recording.rows("openings", self._streams_to + 1) if row[2] not in closed]
        self.drop(np.array([slot for number in closed if (slot := self._slot(number))], np.int64))
        openings = self._select(opened)
        slots = np.array([self._free.pop() for _ in openings], np.int64)
        numbers = np.array([row[2] for row in openings], np.int64)
        self._slots = np.pad(self._slots, (0, max(0, numbers.max(initial=0) + 1 - len(self._slots))))
        self._slots[numbers] = slots
        self._opened(slots, openings)
        for slot, (position, _, _, _, _, first_seq, state) in zip(slots.tolist(), openings, strict=True):
            self._start(recording, slot, first_seq, state, position)
        return slots, openings

    def _start(self, recording: RecordingFile, slot: int, seq: int, state: bytes | None, position: int) -> None:
        """A stream begins, or begins again, before the frame `seq`."""
        self._starts[slot], self._nexts[slot] = seq, _NOT_BEGUN
        self._load(recording, slot, state, position)
        comparable = seq if state is None or self._frames is None else seq + self._frames
        self._began(np.array([slot]), np.array([comparable]))

    def _load(self, recording: RecordingFile, slot: int, state: bytes | None, position: int) -> None:
        """Begin with a recorded state, if the network has such states, and otherwise in its initial state."""
        found = recording.state(state, position) if self._frames is None else None
        self._stepper.load(np.array([slot]), None if found is None else found[None])

    def _slot(self, number: int) -> int:
        return int(self._slots[number]) if number < len(self._slots) else _NOT_FOLLOWED

    def _slots_of(self, streams: I64) -> I64:
        slots: I64 = np.where(streams < len(self._slots), self._slots[np.minimum(streams, len(self._slots) - 1)], 0)
        return slots

    # ── Frames ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _first_needed(self, recording: RecordingFile, slots: I64) -> int:
        """From which position on the frames are that count; read backwards, since most are near the end."""
        is_missing = np.zeros(len(self._nexts), np.bool_)
        is_missing[slots] = True
        first = recording.last_position + 1
        while is_missing.any() and first > recording.first_position:
            last, first = first - 1, max(first - _WINDOW, recording.first_position)
            for step in _computed(recording, first, last):
                places = self._slots_of(step.streams)
                is_missing[places[step.seqs <= self._starts[places]]] = False
        return first

    def _reset(self, recording: RecordingFile, row: tuple[Any, ...]) -> None:
        self._step()
        position, _, stream, seq, _, _, state = row
        if seq >= self._starts[self._slot(stream)]:  # else the state that it began with is newer
            self._start(recording, self._slot(stream), seq, state, position)

    def _add(self, recording: RecordingFile, step: _Computed) -> None:
        slots = self._slots_of(step.streams)
        counts = (slots != _NOT_FOLLOWED) & (step.seqs >= self._starts[slots])
        slots, seqs = slots[counts], step.seqs[counts]
        begins = self._nexts[slots] == _NOT_BEGUN
        if (self._nexts[slots] != seqs)[~begins].any():
            raise recording.damaged("frames of an open stream are missing")
        self._firsts[slots[begins]] = seqs[begins]
        self._nexts[slots] = seqs + 1
        if self._is_waiting[slots].any() or sum(len(each.seqs) for each in self._waiting) >= self._stepper.buckets[-1]:
            self._step()
        self._frames_read += len(seqs)
        self._waiting.append(_Computed(step.position, slots, seqs, step.x[counts], step.y[counts]))
        self._is_waiting[slots] = True

    def _step(self) -> None:
        """Step the frames that wait, as many at once as the network is certified for."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        slots, seqs, x, recorded = (np.concatenate(columns) for columns in list(zip(*waiting, strict=True))[1:])
        self._is_waiting[slots] = False
        rows, most = np.arange(len(slots)), self._stepper.buckets[-1]
        y = np.empty_like(recorded)
        for first in range(0, len(slots), most):
            part = slice(first, first + most)
            self._stepper.step(slots[part], rows[part], x, y)
        self._stepped(slots, seqs, y, recorded)


def _computed(recording: RecordingFile, first: int, last: int | None = None) -> Iterator[_Computed]:
    """The steps whose outputs are at positions `first` to `last` (None: the newest), in order."""
    last = recording.last_position if last is None else last
    for begin in range(first, last + 1, _WINDOW):
        outputs = {row[2]: row[3] for row in recording.rows("outputs", begin, min(begin + _WINDOW - 1, last))}
        if not outputs:
            continue
        for position, _, _, size, streams, seqs, x in recording.rows("batches", min(outputs), max(outputs)):
            if position not in outputs:
                continue
            columns = [(streams, "<u4", 1), (seqs, "<u8", 1), (x, "<f4", recording.header.features)]
            columns.append((outputs[position], "<f4", recording.header.outputs))
            for blob, dtype, width in columns:
                recording.check_bytes(blob, size * width * np.dtype(dtype).itemsize, position)
            numbers, counts, frames, y = (np.frombuffer(blob, dtype) for blob, dtype, _ in columns)
            pair = numbers.astype(np.int64), counts.astype(np.int64)
            yield _Computed(position, *pair, frames.reshape(size, -1), y.reshape(size, -1))
