"""Going on with a recording: the newest states, and what has to be stepped again after them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint, RecordedBatch, StateReset, StreamState
from instep.recording.schema import CHECKPOINT_EVENT, COUNTED, OWNER_EVENT, read_owner_detail

_NEVER: Final = np.iinfo(np.int64).max
_UNKNOWN: Final = -1
_Owner: TypeAlias = tuple[int, int, int, bool]
"""Epoch, the one it held before, the frame that was due next, whether other numerics took the stream."""


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that was open when the recording ended, as of the checkpoint."""

    stream: int
    name: str
    epoch: int
    """The last one it was given."""
    former_epoch: int
    """The one its owner held before, 0 for none or somebody else's."""
    granted_seq: int
    """The frame that was due next when it was given."""
    renumbered: bool
    """Whether a restart with other numerics took it from its owner, and nobody has taken it over since."""
    first_seq: int
    """The one it opened with."""
    seq: int
    """The state is that before this frame."""
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state."""
    tail_seq: int
    """The client may not have the outputs of the frames from here to `seq`."""
    tail_x: F32
    """float32 [seq - tail_seq, features]: those frames."""
    tail_y: F32
    """float32 [seq - tail_seq, outputs]: their outputs."""


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """A batch to step again."""

    batch: RecordedBatch
    """Whole, so that the call can be the one that the engine made."""
    applies: Bool
    """bool [B]: False for frames that a state holds already, and for those of streams that have closed since."""


class Recovered:
    """What an engine needs to go on: streams as of the newest checkpoint, and what happened since.

    Everything here is checked: CRCs, that no position is missing, that every stream's frames follow each other. Of
    what lies before the checkpoint, only the rows of batches and outputs are not looked at.

    Args:
        path: the recording.
        on_progress: called with the share (0 to 1) of the replay that was handed out.

    Attributes:
        path: the recording.
        streams: those that are open at its end, in the order they opened.
        last_stream: the highest stream number ever given, 0 for none.
        last_epoch: the highest epoch ever given, 0 for none.
        checkpoint_position: `streams` are as of this position or later, those opened since as they opened; 0 for none.
        last_position: the newest row.

    Raises:
        RecordingError: from every method, when the file cannot be read.
        DamagedRecording: when anything that is needed is damaged.
    """

    def __init__(self, path: Path, on_progress: Callable[[float], None]) -> None:
        self.path = path
        self._on_progress = on_progress
        self._reader = RecordingReader(path)
        try:
            with self._reader.at_once():
                self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()

    def replay(self) -> Iterator[ReplayStep | StateReset]:
        """What changed the states since the checkpoint, in order; once, and to its end, or not all was checked.

        Batches that failed are left out, and resets that a state holds already.
        """
        first = self.checkpoint_position + 1
        batches: Iterator[RecordedBatch | StateReset] = self._reader.whole_batches(first)
        for item in heapq.merge(batches, self._reader.resets(first), key=lambda item: item.position):
            if isinstance(item, RecordedBatch):
                yield ReplayStep(item, self._step(item))
            elif self._reset(item):
                yield item
            self._on_progress(item.position / self.last_position)
        self._check_ends()

    def _read(self) -> None:
        reader = self._reader
        self.last_position = reader.last_position
        mark = reader.checkpoint()
        self.checkpoint_position = mark.position
        reader.check_positions(mark.position + 1)
        openings, closings = reader.openings(), list(reader.rows("closings", reader.first_position))
        self._number(openings, closings)
        epochs = {row[2]: (int(row[4]), 0, int(row[5]), False) for row in openings}
        positions = self._read_events(mark, epochs)
        self.last_epoch = max((reader.trimmed.last_epoch, *(epoch for epoch, *_ in epochs.values())))
        found = {
            "openings": [row[0] for row in openings],
            "closings": [row[0] for row in closings],
            "events": positions,
        }
        oldest = reader.checkpoints()[0] if reader.trimmed.position else Checkpoint()
        still_count = {
            "openings": oldest.openings - oldest.closings,
            "closings": 0,
            "events": reader.trimmed.events,
        }
        for table in COUNTED:
            count = sum(position <= mark.position for position in found[table])
            expected = still_count[table] + getattr(mark, table) - getattr(oldest, table)
            if count != expected:
                raise reader.damaged(
                    f"up to position {mark.position} it holds {count:,} {table} instead of {expected:,}"
                )
        states = self._read_states()
        places, _ = self._find(np.array([row[2] for row in openings], np.int64))
        are_open = (self._closed_at[places] == _NEVER).tolist()
        self.streams = [
            self._open_stream(row, epochs[row[2]], states.get(row[2]))
            for row, is_open in zip(openings, are_open, strict=True)
            if is_open
        ]

    def _number(self, openings: list[tuple[Any, ...]], closings: list[tuple[Any, ...]]) -> None:
        """Note of every stream where it opens and closes, and which frame comes next."""
        self.last_stream = max((self._reader.trimmed.last_stream, *(row[2] for row in openings)))
        if min((row[2] for row in openings), default=1) < 1 or self.last_stream >= 2**32:
            raise self._reader.damaged("a stream has a number that no stream can have")
        # By the numbers in this file, not by all that were ever given: a recording goes on for ever.
        numbers: I64 = np.array([row[2] for row in openings], np.int64)
        order = np.argsort(numbers, kind="stable")
        self._numbers: I64 = numbers[order]
        """The numbers of the streams that open here, rising: what follows is by the place of each in it."""
        twice = np.flatnonzero(self._numbers[1:] == self._numbers[:-1])
        if len(twice):
            position, _, stream, *_ = openings[order[twice[0] + 1]]
            raise self._reader.damaged(f"stream {stream} opens again at position {position}")
        self._opened_at: I64 = np.array([row[0] for row in openings], np.int64)[order]
        self._closed_at: I64 = np.full(len(numbers), _NEVER, np.int64)
        first_seqs: I64 = np.array([row[5] for row in openings], np.int64)[order]
        self._held: I64 = first_seqs.copy()
        """The seq before which the frames are in the state."""
        self._next: I64 = first_seqs
        """The seq of the next frame, `_UNKNOWN` where it is one up to that of the state."""
        self._ends: list[tuple[int, int, int]] = []
        """Of streams that close after the checkpoint: position, place, and the seq that the next frame would have."""
        places, are_known = self._find(np.array([row[2] for row in closings], np.int64))
        for (position, _, stream, frames, _, _), at, is_known in zip(
            closings, places.tolist(), are_known.tolist(), strict=True
        ):
            if not is_known or not self._opened_at[at] < position < self._closed_at[at]:
                raise self._reader.damaged(f"stream {stream}, which is not open, closes at position {position}")
            self._closed_at[at] = position
            if position > self.checkpoint_position:
                self._ends.append((position, at, frames))
                if self._opened_at[at] <= self.checkpoint_position:
                    # Its frames up to there are in no state, if it closed before the states were read.
                    self._held[at], self._next[at] = _NEVER, _UNKNOWN

    def _find(self, streams: I64) -> tuple[I64, Bool]:
        """The places of streams, and which of them open here at all: int64 [N] → int64 [N], bool [N]."""
        places: I64 = np.searchsorted(self._numbers, streams).astype(np.int64)
        are_known: Bool = np.zeros(len(streams), np.bool_)
        if len(self._numbers):
            places = np.minimum(places, len(self._numbers) - 1)
            are_known = self._numbers[places] == streams
        return places, are_known

    def _read_events(self, mark: Checkpoint, epochs: dict[int, _Owner]) -> list[int]:
        """The events' positions; the newest owners go into `epochs`."""
        positions, newest = [], 0
        before = self._reader.events_that_count() if self._reader.trimmed.position else []
        for event in (*before, *self._reader.events()):
            positions.append(event.position)
            if event.kind == OWNER_EVENT:
                if event.stream not in epochs or event.seq is None:
                    raise self._reader.damaged(f"the event at position {event.position} is of no stream")
                try:
                    epochs[event.stream] = (event.seq, *read_owner_detail(event.detail))
                except ValueError:
                    raise self._reader.damaged(f"the event at position {event.position} names no owner") from None
            elif event.kind == CHECKPOINT_EVENT:
                newest = event.seq or 0
        if newest != mark.position:
            raise self._reader.damaged(
                f"its newest checkpoint should be of position {newest}, and is of {mark.position}"
            )
        return positions

    def _read_states(self) -> dict[int, StreamState]:
        """The newest state of each stream."""
        states, count = dict[int, StreamState](), 0
        for count, state in enumerate(self._reader.states(), 1):  # noqa: B007 - counts to the last
            if state.stream not in self._reader.ended_where_trimmed:
                states[state.stream] = state
        if count != self._reader.state_rows:
            raise self._reader.damaged(f"it holds {count:,} states instead of {self._reader.state_rows:,}")
        places, are_known = self._find(np.array(list(states), np.int64))
        for state, at, is_known in zip(states.values(), places.tolist(), are_known.tolist(), strict=True):
            if not is_known or state.position > self.last_position:
                raise self._reader.damaged(f"the state of stream {state.stream} fits no stream")
            if self._closed_at[at] != _NEVER:
                continue
            if state.seq < self._held[at]:
                raise self._reader.damaged(f"the state of stream {state.stream} is from before its first frame")
            self._held[at] = state.seq
            self._next[at] = _UNKNOWN
        return states

    def _open_stream(self, opening: tuple[Any, ...], owner: _Owner, state: StreamState | None) -> OpenStream:
        position, _, stream, name, _, first_seq, initial = opening
        if state is not None:
            tail = (state.tail_seq, state.tail_x, state.tail_y)
            return OpenStream(stream, name, *owner, first_seq, state.seq, state.state, *tail)
        header = self._reader.header
        x, y = (np.zeros((0, width), np.float32) for width in (header.features, header.outputs))
        found = self._reader.state(initial, position)
        return OpenStream(stream, name, *owner, first_seq, first_seq, found, first_seq, x, y)

    def _step(self, batch: RecordedBatch) -> Bool:
        """Take note of a batch; which of its frames apply."""
        streams, seqs = batch.streams.astype(np.int64), batch.seqs.astype(np.int64)
        places, are_known = self._find(streams)
        bad = ~are_known
        if not bad.any():
            expected, held = self._next[places], self._held[places]
            bad = np.where(expected == _UNKNOWN, (seqs > held) | (seqs < 0), seqs != expected)
            bad |= (self._opened_at[places] > batch.position) | (self._closed_at[places] < batch.position)
            bad |= len(np.unique(streams)) < len(streams)
        if bad.any():
            at = int(np.argmax(bad))
            raise self._reader.damaged(
                f"the batch at position {batch.position} holds frame {seqs[at]} of stream {streams[at]}, which does "
                "not belong there"
            )
        self._next[places] = seqs + 1
        applies: Bool = (seqs >= held) & (self._closed_at[places] == _NEVER)
        return applies

    def _reset(self, reset: StateReset) -> bool:
        """Take note of a reset; whether it applies."""
        places, are_known = self._find(np.array([reset.stream], np.int64))
        at = int(places[0])
        good = bool(are_known[0]) and bool(self._opened_at[at] < reset.position < self._closed_at[at])
        if good and self._next[at] == _UNKNOWN:
            good = bool(reset.seq <= self._held[at])
            self._next[at] = reset.seq
        if not good or self._next[at] != reset.seq:
            raise self._reader.damaged(
                f"the reset of stream {reset.stream} at position {reset.position} does not belong there"
            )
        return bool(reset.seq >= self._held[at] and self._closed_at[at] == _NEVER)

    def _check_ends(self) -> None:
        """All frames that a state or a closing counts must have been there."""
        for position, at, frames in self._ends:
            if self._next[at] not in (frames, _UNKNOWN):
                raise self._reader.damaged(
                    f"stream {self._numbers[at]} was closed before frame {frames} at position {position}, but frame "
                    f"{self._next[at]} would be the next one recorded"
                )
        is_open = self._closed_at == _NEVER
        missing = np.flatnonzero(is_open & (self._next != _UNKNOWN) & (self._next < self._held))
        if len(missing):
            stream = self._numbers[missing[0]]
            raise self._reader.damaged(f"the state of stream {stream} holds frames that were not recorded")


def read_recovery(path: Path, on_progress: Callable[[float], None]) -> Recovered:
    """Read what an engine needs to go on with a recording; see `Recovered`.

    A WAL whose end is missing or torn is what a crash leaves: all of it before that counts.

    Raises:
        RecordingError: when the file cannot be read.
        DamagedRecording: when anything that is needed is damaged.
    """
    return Recovered(path, on_progress)
