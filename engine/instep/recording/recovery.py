"""Going on with a recording: the newest states, and what has to be stepped again after them."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.typing import I64, Bool
from instep.recording.file import Closing
from instep.recording.open_streams import OpenStream, read_open_stream
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedBatch, StateReset, find_sorted
from instep.recording.schema import CHECKPOINT_EVENT, OWNER_EVENT, read_owner_detail

_NEVER: Final = np.iinfo(np.int64).max
_UNKNOWN: Final = -1


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """A batch to step again."""

    batch: RecordedBatch
    """Whole, with the frames that do not apply."""
    applies: Bool
    """bool [B]: False for frames that a state holds already, and for those of streams that have closed since."""


class Recovered(Closing):
    """Everything that an engine needs to continue: streams as of their newest states, and the frames and resets since.

    Everything is checked (CRCs, positions, that the frames of each stream follow each other) except the batches and
    outputs before the checkpoint. States are checked and not kept, because there may be more than fit into memory. A
    WAL whose end is missing or torn is what a crash leaves; everything before that counts.

    Args:
        path: the recording.

    Attributes:
        path: the recording.
        names: of the streams that are open at its end, by number, in the order they opened.
        last_stream: the highest stream number ever given, 0 for none.
        last_epoch: the highest epoch ever given, 0 for none.
        checkpoint_position: streams are loaded as of this position or later, those opened since as they opened; 0 for
            none.
        last_position: the newest row.

    Raises:
        RecordingError: from every method, when the file cannot be read.
        DamagedRecording: when anything that is needed is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = RecordingReader(path)
        try:
            with self._reader.at_once():
                self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()

    def load(self, streams: Iterable[int]) -> list[OpenStream]:
        """Load open streams by number, each in its newest state; the replay continues from there."""
        found = [read_open_stream(self._reader, stream) for stream in streams]
        for stream, at in zip(found, np.searchsorted(self._numbers, [stream.stream for stream in found]), strict=True):
            if (stream.seq, stream.epoch) != (self._held[at], self._epochs[at]):  # indices have no CRCs
                raise self._reader.damaged(f"an index leads to other rows of stream {stream.stream} than the newest")
        return found

    def open_streams(self) -> I64:
        """The numbers of the open streams, rising: int64 [N]."""
        numbers: I64 = self._numbers[self._closed_at == _NEVER]
        return numbers

    def arithmetics(self) -> set[str]:
        """Those of the engines that wrote what is replayed."""
        engines = self._reader.engines
        before = [at for at, engine in enumerate(engines) if engine.position <= self.checkpoint_position]
        return {engine.header.arithmetic for engine in engines[before[-1] :]}

    def replay(self) -> Iterator[ReplayStep | StateReset]:
        """Batches and resets since the checkpoint, in order; read once, and to the end, or not all was checked.

        Batches that failed are left out, and resets that a state holds already.
        """
        first = self.checkpoint_position + 1
        batches: Iterator[RecordedBatch | StateReset] = self._reader.whole_batches(first)
        for item in heapq.merge(batches, self._reader.resets(first), key=lambda item: item.position):
            if isinstance(item, RecordedBatch):
                yield ReplayStep(item, self._step(item))
            elif self._reset(item):
                yield item
        self._check_ends()

    def _read(self) -> None:
        reader = self._reader
        self.last_position = reader.last_position
        mark = reader.checkpoint()
        self.checkpoint_position = mark.position
        reader.check_positions(mark.position + 1)
        names = self._read_openings()
        closings = self._read_closings()
        announced, events = self._read_events()
        reader.check_checkpoint(announced, {"openings": self._opened_at, "closings": closings, "events": events})
        self._read_states()
        in_order = np.argsort(self._opened_at, kind="stable")
        open_places = in_order[self._closed_at[in_order] == _NEVER]
        self.names = {stream: names[stream] for stream in self._numbers[open_places].tolist()}

    def _read_openings(self) -> dict[int, str]:
        """Note where each stream opens, and its first seq; the names, by number."""
        reader, names = self._reader, dict[int, str]()
        columns = array("q")
        self.last_stream, self.last_epoch = reader.trimmed.last_stream, reader.trimmed.last_epoch
        for position, _, stream, name, epoch, first_seq, initial in reader.openings():
            if stream in names:
                raise reader.damaged(f"stream {stream} opens again at position {position}")
            if not 1 <= stream < 2**32:
                raise reader.damaged("a stream has a number that no stream can have")
            reader.state(initial, position)
            names[stream] = name
            self.last_stream, self.last_epoch = max(self.last_stream, stream), max(self.last_epoch, epoch)
            columns.extend((stream, position, first_seq, epoch))
        # Indexed by place among the streams in this file: the numbers themselves rise without end.
        rows = np.array(columns, np.int64).reshape(-1, 4)
        columns_by_number = np.ascontiguousarray(rows[np.argsort(rows[:, 0])].T)
        self._numbers, self._opened_at, first_seqs, self._epochs = columns_by_number
        """The numbers of the streams that open here, rising: what follows is by the place of each in it."""
        self._closed_at: I64 = np.full(len(names), _NEVER, np.int64)
        self._held: I64 = first_seqs.copy()
        """The seq before which the frames are in the state."""
        self._next: I64 = first_seqs
        """The seq of the next frame, `_UNKNOWN` where it is one up to that of the state."""
        return names

    def _read_closings(self) -> I64:
        """Note where each stream closes; the positions of the closings."""
        closings = [(row[0], row[2], row[3]) for row in self._reader.rows("closings", self._reader.first_position)]
        self._ends: list[tuple[int, int, int]] = []
        """Of streams that close after the checkpoint: position, place, and the seq that the next frame would have."""
        places, are_known = find_sorted(self._numbers, np.array([stream for _, stream, _ in closings], np.int64))
        for (position, stream, frames), at, is_known in zip(closings, places.tolist(), are_known.tolist(), strict=True):
            if not is_known or not self._opened_at[at] < position < self._closed_at[at]:
                raise self._reader.damaged(f"stream {stream}, which is not open, closes at position {position}")
            self._closed_at[at] = position
            if position > self.checkpoint_position:
                self._ends.append((position, at, frames))
                if self._opened_at[at] <= self.checkpoint_position:
                    # Its frames up to there are in no state, if it closed before the states were read.
                    self._held[at], self._next[at] = _NEVER, _UNKNOWN
        return np.array([position for position, *_ in closings], np.int64)

    def _read_events(self) -> tuple[int, I64]:
        """The position of the newest checkpoint that was announced, and those of all events."""
        positions, owned, newest = array("q"), array("q"), 0
        before = self._reader.events_that_count() if self._reader.trimmed.position else []
        for event in (*before, *self._reader.events()):
            positions.append(event.position)
            if event.kind == OWNER_EVENT:
                try:
                    read_owner_detail(event.detail)
                except ValueError:
                    raise self._reader.damaged(f"the event at position {event.position} names no owner") from None
                owned.extend((event.position, event.stream or 0, event.seq or 0))
                self.last_epoch = max(self.last_epoch, event.seq or 0)
            elif event.kind == CHECKPOINT_EVENT:
                newest = event.seq or 0
        rows = np.array(owned, np.int64).reshape(-1, 3)
        places, are_known = find_sorted(self._numbers, rows[:, 1])
        for position in rows[~are_known, 0].tolist():
            raise self._reader.damaged(f"the event at position {position} is of no stream")
        self._epochs[places] = rows[:, 2]  # in the order of the events: the newest one stays
        return newest, np.array(positions, np.int64)

    def _read_states(self) -> None:
        """Note the seq of the newest state of each stream."""
        columns, ended, count = array("q"), self._reader.ended_where_trimmed, 0
        for count, state in enumerate(self._reader.states(), 1):  # noqa: B007 - counts to the last
            if state.stream not in ended:
                columns.extend((state.stream, state.position, state.seq))
        if count != self._reader.state_rows:
            raise self._reader.damaged(f"it holds {count:,} states instead of {self._reader.state_rows:,}")
        rows = np.array(columns, np.int64).reshape(-1, 3)
        rows = rows[np.append(rows[1:, 0] != rows[:-1, 0], np.ones(min(len(rows), 1), np.bool_))]  # the newest of each
        places, are_known = find_sorted(self._numbers, rows[:, 0])
        for stream in rows[~are_known | (rows[:, 1] > self.last_position), 0].tolist():
            raise self._reader.damaged(f"the state of stream {stream} fits no stream")
        is_open = self._closed_at[places] == _NEVER
        at, rows = places[is_open], rows[is_open]
        for stream in rows[rows[:, 2] < self._held[at], 0].tolist():
            raise self._reader.damaged(f"the state of stream {stream} is from before its first frame")
        self._held[at] = rows[:, 2]
        self._next[at] = _UNKNOWN

    def _step(self, batch: RecordedBatch) -> Bool:
        """Take note of a batch; for each frame, whether it applies."""
        streams, seqs = batch.streams.astype(np.int64), batch.seqs.astype(np.int64)
        places, are_known = find_sorted(self._numbers, streams)
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
        places, are_known = find_sorted(self._numbers, np.array([reset.stream], np.int64))
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
