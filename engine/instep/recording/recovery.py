"""Reads what a start needs from a recording: the newest states, and the frames to step again."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.typing import I64
from instep.recording.reader import Closing, RecordingReader
from instep.recording.records import OpenStream, RecordedEvent, find_sorted
from instep.recording.schema import CHECKPOINT_EVENT, OWNER_EVENT, RESET_EVENT, read_owner_detail
from instep.recording.segments import Segment, segments

_NEVER: Final = np.iinfo(np.int64).max


class Recovered(Closing):
    """Everything that an engine needs to continue: open streams in their newest states, and later frames and resets.

    Everything is checked (CRCs, positions, that the frames of each stream follow each other) except the batches and
    outputs before the checkpoint. States are checked but not kept, because they may not fit into memory. After a crash
    the end of the WAL may be missing or torn; everything before that counts.

    Args:
        path: the recording.

    Attributes:
        path: the recording.
        names: by number, the streams that are open at its end, in the order of opening.
        last_stream: the highest stream number ever given, 0 for none.
        last_epoch: the highest epoch ever given, 0 for none.
        checkpoint_position: the newest checkpoint, 0 for none. Streams are loaded in states of this position or later;
            newer streams in the state they were opened with.
        last_position: of the newest row.

    Raises:
        RecordingError: from every method, when the file cannot be read.
        DamagedRecording: when anything that is needed is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = RecordingReader(path)
        try:
            with self.reader.at_once():
                self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.reader.close()

    def load(self, streams: Iterable[int]) -> list[OpenStream]:
        """Load open streams by number, each in the newest state, from which the replay continues."""
        found = self.reader.open_streams(streams)
        for stream, at in zip(found, np.searchsorted(self._numbers, [stream.stream for stream in found]), strict=True):
            if (stream.seq, stream.epoch) != (self._held[at], self._epochs[at]):  # indices have no CRCs
                raise self.reader.damaged(f"an index leads to other rows of stream {stream.stream} than the newest")
        return found

    def arithmetics(self) -> set[str]:
        """The arithmetics of the engines that wrote the rows to replay."""
        engines = self.reader.engines
        before = [at for at, engine in enumerate(engines) if engine.position <= self.checkpoint_position]
        return {engine.header.arithmetic for engine in engines[before[-1] :]}

    def segments(self) -> Iterator[Segment]:
        """Frames and resets of open streams that no state includes, in order. Read it to the end to check all.

        Batches that failed are left out.
        """
        first = self.checkpoint_position + 1
        for segment in segments(self.reader, first):
            frames = segment.frames
            at = self._places(frames.streams, frames.positions)
            applies = (frames.seqs >= self._held[at]) & (self._closed_at[at] == _NEVER)
            for unanswered in np.flatnonzero(~frames.answered & ~applies)[:1].tolist():
                raise self.reader.damaged(
                    f"the batch at position {frames.positions[unanswered]} has no outputs, and a state holds its frames"
                )
            np.maximum.at(self._seen, at, frames.seqs + 1)
            resets = [mark for mark in segment.marks if isinstance(mark, RecordedEvent) and mark.kind == RESET_EVENT]
            of_resets = np.array([(mark.stream or 0, mark.position, mark.seq or 0) for mark in resets], np.int64)
            of_resets = of_resets.reshape(-1, 3)
            at = self._places(of_resets[:, 0], of_resets[:, 1])
            counts = ((of_resets[:, 2] >= self._held[at]) & (self._closed_at[at] == _NEVER)).tolist()
            marks = [mark for mark, does_count in zip(resets, counts, strict=True) if does_count]
            yield Segment(frames if applies.all() else frames.only(applies), marks, segment.position)
        missing = np.flatnonzero((self._closed_at == _NEVER) & (self._seen > 0) & (self._seen < self._held))
        for stream in self._numbers[missing][:1].tolist():
            raise self.reader.damaged(f"the state of stream {stream} holds frames that were not recorded")

    def _places(self, streams: I64, positions: I64) -> I64:
        places, are_known = find_sorted(self._numbers, streams)
        for at in np.flatnonzero(~are_known)[:1].tolist():
            raise self.reader.damaged(
                f"the row at position {positions[at]} is of stream {streams[at]}, which never opened"
            )
        return places

    def _read(self) -> None:
        reader = self.reader
        self.last_position = reader.last_position
        mark = reader.checkpoint()
        self.checkpoint_position = mark.position
        reader.check_positions(mark.position + 1)
        names = self._read_openings()
        closings = self._read_closings()
        announced, events = self._read_events()
        reader.check_announced(announced)
        for table, positions in (("openings", self._opened_at), ("closings", closings), ("events", events)):
            count = int(((positions > reader.trimmed.position) & (positions <= mark.position)).sum())
            if count != (expected := getattr(mark, table) - getattr(reader.oldest, table)):
                raise reader.damaged(
                    f"up to position {mark.position} it holds {count:,} {table} instead of {expected:,}"
                )
        self._read_states()
        in_order = np.argsort(self._opened_at, kind="stable")
        open_places = in_order[self._closed_at[in_order] == _NEVER]
        self.names = {stream: names[stream] for stream in self._numbers[open_places].tolist()}

    def _read_openings(self) -> dict[int, str]:
        """Note the position of each opening and its first seq; return the names by number."""
        reader, names = self.reader, dict[int, str]()
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
        """The numbers of the streams that open here, rising; the next arrays are in the same order."""
        self._closed_at: I64 = np.full(len(names), _NEVER, np.int64)
        self._held: I64 = first_seqs.copy()
        """The seq before which the frames are in the state."""
        self._seen: I64 = np.zeros(len(names), np.int64)
        """The seq after the newest frame that was read."""
        return names

    def _read_closings(self) -> I64:
        closings = [(row[0], row[2]) for row in self.reader.rows("closings", self.reader.first_position)]
        places, are_known = find_sorted(self._numbers, np.array([stream for _, stream in closings], np.int64))
        for (position, stream), at, is_known in zip(closings, places.tolist(), are_known.tolist(), strict=True):
            if not is_known or not self._opened_at[at] < position < self._closed_at[at]:
                raise self.reader.damaged(f"stream {stream}, which is not open, closes at position {position}")
            self._closed_at[at] = position
        return np.array([position for position, _ in closings], np.int64)

    def _read_events(self) -> tuple[int, I64]:
        """Return the position of the newest complete checkpoint, and those of all events."""
        positions, owned, newest = array("q"), array("q"), 0
        before = self.reader.events_that_count() if self.reader.trimmed.position else []
        for event in (*before, *self.reader.events()):
            positions.append(event.position)
            if event.kind == OWNER_EVENT:
                try:
                    read_owner_detail(event.detail)
                except ValueError:
                    raise self.reader.damaged(f"the event at position {event.position} names no owner") from None
                owned.extend((event.position, event.stream or 0, event.seq or 0))
                self.last_epoch = max(self.last_epoch, event.seq or 0)
            elif event.kind == CHECKPOINT_EVENT:
                newest = event.seq or 0
        rows = np.array(owned, np.int64).reshape(-1, 3)
        places, are_known = find_sorted(self._numbers, rows[:, 1])
        for position in rows[~are_known, 0].tolist():
            raise self.reader.damaged(f"the event at position {position} is of no stream")
        self._epochs[places] = rows[:, 2]  # in the order of the events: the newest one stays
        return newest, np.array(positions, np.int64)

    def _read_states(self) -> None:
        """Note the seq of the newest state of each stream."""
        columns, ended = array("q"), self.reader.ended_where_trimmed
        for state in self.reader.states():
            if state.stream not in ended:
                columns.extend((state.stream, state.position, state.seq))
        rows = np.array(columns, np.int64).reshape(-1, 3)
        rows = rows[np.append(rows[1:, 0] != rows[:-1, 0], np.ones(min(len(rows), 1), np.bool_))]  # the newest of each
        places, are_known = find_sorted(self._numbers, rows[:, 0])
        for stream in rows[~are_known, 0].tolist():
            raise self.reader.damaged(f"the state of stream {stream} fits no stream")
        is_open = self._closed_at[places] == _NEVER
        at, rows = places[is_open], rows[is_open]
        for stream in rows[rows[:, 2] < self._held[at], 0].tolist():
            raise self.reader.damaged(f"the state of stream {stream} is from before its first frame")
        self._held[at] = rows[:, 2]
