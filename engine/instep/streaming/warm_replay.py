"""States for streams in another network: its initial state, after the newest frames that were recorded of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.recording.errors import RecordingError
from instep.recording.file import RecordingFile
from instep.recording.schema import RESET_EVENT
from instep.runtime.stepper import Stepper

_NOT_FOLLOWED: Final = 0
"""The scratch slot: where frames go that belong to no open stream."""
_NOT_BEGUN: Final = -1
_WINDOW: Final = 4096
"""Positions of the recording that are read together."""

_Batch: TypeAlias = tuple[int, I64, I64, F32]
"""Of a step that was computed: its position, streams [B], seqs [B] and frames [B, features]."""


class WarmReplay:
    """Follows the open streams of a recording that is being written, in a network that nobody else uses yet.

    The first `follow` steps the newest frames of every stream, and each later one those that were recorded since. A
    reset counts as the beginning of a stream.

    Args:
        path: the recording.
        stepper: of the network; its states are used as scratch.
        max_streams: how many slots it has.
        frames: how many frames of each stream the first `follow` steps, where there are as many.
        next_seqs: by number, the next seq of the streams in memory; the recording knows that of the others.
    """

    def __init__(
        self, path: Path, stepper: Stepper, max_streams: int, frames: int, next_seqs: Mapping[int, int]
    ) -> None:
        self._path = path
        self._stepper = stepper
        self._frames = frames
        self._known = next_seqs
        self._read_to = 0
        """The position up to which the recording was read; 0 before the first time."""
        self._free = list(range(max_streams, 0, -1))
        self._slots: I64 = np.zeros(1, np.int64)
        """By number of a stream, its slot here."""
        # By slot: the first frame that counts, the first one that was stepped, and the next one.
        self._starts, self._firsts, self._nexts = np.zeros((3, max_streams + 1), np.int64)
        self._waiting: list[tuple[I64, F32]] = []
        """Slots and frames of batches that are stepped together, no stream twice."""
        self._is_waiting = np.zeros(max_streams + 1, np.bool_)

    def follow(self) -> None:
        """Step everything that was committed by now; not in the thread of the loop.

        Raises:
            RecordingError: when the recording is damaged, is trimmed meanwhile, or has more open streams than slots.
        """
        with RecordingFile(self._path) as recording, torch.inference_mode():
            targets = self._take_in_streams(recording)
            first = self._read_to + 1 if self._read_to else self._first_needed(recording, targets)
            rows = recording.rows("events", first)
            resets = [(row[0], row[2], row[3]) for row in rows if row[4] == RESET_EVENT and self._slot(row[2])]
            for position, streams, seqs, x in _computed(recording, first):
                while resets and resets[0][0] < position:
                    self._reset(*resets.pop(0)[1:])
                self._add(recording, streams, seqs, x)
            for _, stream, seq in resets:
                self._reset(stream, seq)
            self._step()
            self._read_to = recording.last_position

    def states(self, streams: I64, next_seqs: I64) -> tuple[U8, I64]:
        """The states of open streams by number, int64 [N], that the last `follow` has found.

        Args:
            streams: int64 [N].
            next_seqs: int64 [N], the frames before which the states must be.

        Returns:
            States as rows of bytes [N, row_bytes], and the first frame that is in each, int64 [N].

        Raises:
            RecordingError: when frames of a stream are missing.
        """
        slots = self._slots[streams]
        has_begun = self._nexts[slots] != _NOT_BEGUN
        if (slots == _NOT_FOLLOWED).any() or (self._nexts[slots] != next_seqs)[has_begun].any():
            raise RecordingError(f"{self._path} lacks frames of streams that are open")
        return self._stepper.read(slots), np.where(has_begun, self._firsts[slots], next_seqs)

    def _take_in_streams(self, recording: RecordingFile) -> I64:
        """Follow the streams that have opened since, and no longer those that have closed; the slots of the former."""
        closed = {row[2] for row in recording.rows("closings", self._read_to + 1)}
        opened = {row[2]: row[5] for row in recording.rows("openings", self._read_to + 1) if row[2] not in closed}
        for number in closed:
            if slot := self._slot(number):
                self._slots[number] = _NOT_FOLLOWED
                self._free.append(slot)
        if len(opened) > len(self._free):
            raise RecordingError(f"{self._path} has more open streams than engine.max_streams: raise it")
        slots = np.array([self._free.pop() for _ in opened], np.int64)
        numbers = np.array(list(opened), np.int64)
        self._slots = np.pad(self._slots, (0, max(0, numbers.max(initial=0) + 1 - len(self._slots))))
        self._slots[numbers] = slots
        self._starts[slots] = [
            max(first_seq, self._next_seq(recording, number, first_seq) - self._frames)
            for number, first_seq in opened.items()
        ]
        self._nexts[slots] = _NOT_BEGUN
        self._stepper.load(slots, None)
        # Only a stream that has frames makes the first reading go back to them.
        return slots[[self._next_seq(recording, *each) > each[1] for each in opened.items()]]

    def _next_seq(self, recording: RecordingFile, number: int, first_seq: int) -> int:
        """About the next seq of a stream: exact where it was in memory at first, or hibernates."""
        if number in self._known:
            return self._known[number]
        row = None if self._read_to else recording.newest_row("states", "stream = ?", number)
        return first_seq if row is None else int(row[2])

    def _first_needed(self, recording: RecordingFile, slots: I64) -> int:
        """From which position on the frames are that count; read backwards, since most are near the end."""
        is_missing = np.zeros(len(self._nexts), np.bool_)
        is_missing[slots] = True
        first = recording.last_position + 1
        while is_missing.any() and first > recording.first_position:
            last, first = first - 1, max(first - _WINDOW, recording.first_position)
            for _, streams, seqs, _ in _computed(recording, first, last):
                places = self._slots_of(streams)
                is_missing[places[seqs <= self._starts[places]]] = False
        return first

    def _slot(self, number: int) -> int:
        return int(self._slots[number]) if number < len(self._slots) else _NOT_FOLLOWED

    def _slots_of(self, streams: I64) -> I64:
        slots: I64 = np.where(streams < len(self._slots), self._slots[np.minimum(streams, len(self._slots) - 1)], 0)
        return slots

    def _reset(self, stream: int, seq: int) -> None:
        self._step()
        slot = self._slot(stream)
        self._starts[slot], self._nexts[slot] = max(seq, self._starts[slot]), _NOT_BEGUN
        self._stepper.load(np.array([slot]), None)

    def _add(self, recording: RecordingFile, streams: I64, seqs: I64, x: F32) -> None:
        slots = self._slots_of(streams)
        counts = (slots != _NOT_FOLLOWED) & (seqs >= self._starts[slots])
        slots, seqs = slots[counts], seqs[counts]
        begins = self._nexts[slots] == _NOT_BEGUN
        if (self._nexts[slots] != seqs)[~begins].any():
            raise recording.damaged("frames of an open stream are missing")
        self._firsts[slots[begins]] = seqs[begins]
        self._nexts[slots] = seqs + 1
        if self._is_waiting[slots].any() or sum(len(each) for each, _ in self._waiting) >= self._stepper.buckets[-1]:
            self._step()
        self._waiting.append((slots, x[counts]))
        self._is_waiting[slots] = True

    def _step(self) -> None:
        """Step the batches that wait, as many frames at once as the network is certified for."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        slots, x = np.concatenate([each for each, _ in waiting]), np.concatenate([each for _, each in waiting])
        self._is_waiting[slots] = False
        rows, most = np.arange(len(slots)), self._stepper.buckets[-1]
        y = np.empty((len(slots), self._stepper.model.description.outputs), np.float32)
        for first in range(0, len(slots), most):
            part = slice(first, first + most)
            self._stepper.step(slots[part], rows[part], x, y)


def _computed(recording: RecordingFile, first: int, last: int | None = None) -> Iterator[_Batch]:
    """The steps whose outputs are at positions `first` to `last` (None: the newest), in order."""
    last = recording.last_position if last is None else last
    for begin in range(first, last + 1, _WINDOW):
        computed = [row[2] for row in recording.rows("outputs", begin, min(begin + _WINDOW - 1, last))]
        if not computed:
            continue
        have_outputs = set(computed)
        for position, _, _, size, streams, seqs, x in recording.rows("batches", computed[0], computed[-1]):
            if position in have_outputs:
                recording.check_bytes(streams, size * 4, position)
                recording.check_bytes(seqs, size * 8, position)
                recording.check_bytes(x, size * 4 * recording.header.features, position)
                frames = np.frombuffer(x, "<f4").reshape(size, -1)
                numbers, counts = np.frombuffer(streams, "<u4"), np.frombuffer(seqs, "<u8")
                yield position, numbers.astype(np.int64), counts.astype(np.int64), frames
