"""Reading a recording as values, up to the last commit at the time it was opened."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.core.typing import I64, U8, U32, U64
from instep.recording.errors import DamagedRecording
from instep.recording.file import RecordingFile
from instep.recording.records import (
    BatchGroup,
    Checkpoint,
    RecordedBatch,
    RecordedEngine,
    RecordedEvent,
    StateReset,
    StreamInfo,
    StreamState,
)
from instep.recording.schema import (
    COUNTED,
    END_EVENT,
    ENGINE_EVENT,
    FAILED_EVENT,
    OWNER_EVENT,
    RECOVERED_EVENT,
    RESET_EVENT,
)

MARKS: Final = (ENGINE_EVENT, FAILED_EVENT, RECOVERED_EVENT)
"""The kinds of events that say how to read the other rows."""


class RecordingReader(RecordingFile):
    """The streams, batches and events of a recording; see `RecordingFile` for what it shows and raises."""

    @property
    def finished(self) -> bool:
        """Whether it was closed in order."""
        return any(row[4] == END_EVENT for row in self.rows("events", self.last_position))

    @cached_property
    def engines(self) -> tuple[RecordedEngine, ...]:
        """The engines that wrote it, in order."""
        engines = [RecordedEngine(0, self.header)]
        for event in self._marks:
            if event.kind == ENGINE_EVENT:
                changes = json.loads(event.detail)
                changes |= {key: tuple(changes[key]) for key in ("output_names",) if key in changes}
                engines.append(RecordedEngine(event.position, replace(engines[-1].header, **changes)))
        return tuple(engines)

    def openings(self) -> Iterator[tuple[Any, ...]]:
        """Rows of the table `openings`, those that trimming is about to delete left out."""
        ended, count = self.ended_where_trimmed, 0
        for row in self.rows("openings"):
            if row[0] > self.trimmed.position or row[2] not in ended:
                count += row[0] <= self.trimmed.position
                yield row
        expected = self._oldest.openings - self._oldest.closings
        if count != expected:
            raise self.damaged(f"{count:,} streams are left from before it was trimmed instead of {expected:,}")

    def streams(self) -> list[StreamInfo]:
        """Every opening, in the order they opened; after trimming each as of the checkpoint that is left."""
        closings = {row[2]: row for row in self.rows("closings", self.first_position)}
        opened = [self._stream(row, closings.pop(row[2], None)) for row in self.openings()]
        if closings:
            raise self.damaged(f"stream {min(closings)} was closed, but never opened")
        return [self._as_trimmed(info) for info in opened if info.stream not in self._forgotten]

    def batches(self, first: int = 1, last: int | None = None) -> Iterator[RecordedBatch]:
        """The batches at positions `first` to `last` (None: the newest), in order, but those whose step failed.

        Frames are left out that are in the states of the checkpoint where the history was trimmed.
        """
        return chain.from_iterable(group.batches() for group in self.batch_groups(first, last))

    def whole_batches(self, first: int = 1, last: int | None = None) -> Iterator[RecordedBatch]:
        """As `batches`, each as it was stepped."""
        return chain.from_iterable(group.batches() for group in self.whole_groups(first, last))

    def batch_groups(self, first: int = 1, last: int | None = None) -> Iterator[BatchGroup]:
        """As `batches`, those together that are read together."""
        for group in self.whole_groups(first, last):
            early = group.starts[bisect_right(group.positions, self._oldest.completed)]
            counts = np.ones(len(group.seqs), np.bool_)
            counts[:early] = self._count_after_trimming(group.streams[:early], group.seqs[:early])
            if counts.any():
                yield group if counts.all() else group.only(counts)

    def whole_groups(self, first: int = 1, last: int | None = None) -> Iterator[BatchGroup]:
        """As `batch_groups`, each batch as it was stepped.

        A batch without outputs may only be followed by others without, up to the end or to an event `recovered`.
        """
        first, failed = max(first, self.first_position), set(self._failed)
        lists = self.row_lists("outputs", first)
        outputs: list[tuple[Any, ...]] = []
        for rows in self.row_lists("batches", first, last):
            waiting = [row for row in rows if row[0] not in failed]
            while waiting:
                outputs = outputs or self._next_outputs(lists, first)
                pairs = zip(waiting, outputs, strict=False)
                both = min(len(waiting), len(outputs))
                count = next((at for at, (row, output) in enumerate(pairs) if row[0] != output[2]), both)
                if count:
                    yield self._group(waiting[:count], [output[3] for output in outputs[:count]])
                    outputs = outputs[count:]
                else:
                    computed = outputs[0][2] if outputs else None
                    if computed is not None and computed < waiting[0][0]:
                        raise self._misplaced(outputs[0])
                    until = self.last_position + 1 if computed is None else computed
                    count = next((at for at, row in enumerate(waiting) if row[0] >= until), len(waiting))
                    for row in waiting[:count]:
                        self._check_unanswered(row[0], computed)
                    yield self._group(waiting[:count], None)
                waiting = waiting[count:]
        if last is None and (outputs := outputs or self._next_outputs(lists, first)):
            raise self._misplaced(outputs[0])

    def _next_outputs(self, lists: Iterator[list[tuple[Any, ...]]], first: int) -> list[tuple[Any, ...]]:
        """The next rows of `outputs` that are those of batches from position `first` on; none at the end."""
        return next(filter(None, ([row for row in rows if row[2] >= first] for rows in lists)), [])

    def _misplaced(self, output: tuple[Any, ...]) -> DamagedRecording:
        return self.damaged(
            f"the outputs at position {output[0]} are said to be those of the batch at position {output[2]}, which "
            "there is not, or not in this order"
        )

    def events(self, first: int = 1) -> Iterator[RecordedEvent]:
        """The events from position `first` on, in order; earlier than the history was trimmed, none."""
        return map(self._event, self.rows("events", max(first, self.first_position)))

    def events_that_count(self) -> list[RecordedEvent]:
        """Those before the history was trimmed that say something about what came later, in order."""
        rows = self.rows_that_count(self.trimmed.position, self._open_where_trimmed)
        if len(rows) != self.trimmed.events:
            raise self.damaged(
                f"{len(rows):,} events are left from before it was trimmed instead of {self.trimmed.events:,}"
            )
        return [self._event(row) for row in rows]

    def rows_that_count(self, position: int, open_streams: Set[int]) -> list[tuple[Any, ...]]:
        """The rows of `events` up to a position that later rows rest on: each stream's newest owner, every engine."""
        owners, engines = dict[int, tuple[Any, ...]](), list[tuple[Any, ...]]()
        for row in self.rows("events", last=position):
            if row[4] == ENGINE_EVENT:
                engines.append(row)
            elif row[4] == OWNER_EVENT and row[2] in open_streams:
                owners[row[2]] = row
        return sorted([*engines, *owners.values()])

    def _event(self, row: tuple[Any, ...]) -> RecordedEvent:
        position, time_ns, stream, seq, kind, detail, state = row
        return RecordedEvent(position, time_ns, stream, seq, kind, detail, self.state(state, position))

    def resets(self, first: int = 1) -> Iterator[StateReset]:
        """The resets of states from position `first` on, in order; those in the states it was trimmed to left out."""
        for event in self.events(first):
            if event.kind == RESET_EVENT:
                if event.stream is None or event.seq is None:
                    raise self.damaged(f"the event at position {event.position} resets no stream")
                if event.position > self._oldest.completed or not (
                    event.stream in self._forgotten or event.seq < self._trimmed_to.get(event.stream, (0, None))[0]
                ):
                    yield StateReset(event.position, event.time_ns, event.stream, event.seq, event.state)

    def start_states(self, streams: Sequence[StreamInfo]) -> Iterator[tuple[int, int, bytes | None]]:
        """The states that frames of these streams follow from where it is not the frame before: stream, seq, state.

        The state is None for the model's initial one, which goes without saying before frame 0.
        """
        for info in streams:
            if info.first_seq or info.initial_state is not None:
                state = info.initial_state
                yield info.stream, info.first_seq, None if state is None else state.tobytes()
        numbers = {info.stream for info in streams}
        for reset in self.resets():
            if reset.stream in numbers:
                yield reset.stream, reset.seq, None if reset.state is None else reset.state.tobytes()

    @property
    def trimmed_until(self) -> int:
        """Batches up to this position may hold frames that the states hold, too, with which the history begins."""
        return self._oldest.completed

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, in order; where the history was trimmed, it begins at the first."""
        found = [Checkpoint(*row) for row in self.rows("checkpoints")]
        for checkpoint in found:
            if not self.trimmed.position <= checkpoint.position <= checkpoint.completed <= self.last_position:
                raise self.damaged(f"its checkpoint is of position {checkpoint.position}, which there is not")
        if self.trimmed.position and (not found or found[0].position != self.trimmed.position):
            raise self.damaged(f"the checkpoint at position {self.trimmed.position}, where it was trimmed, is missing")
        return found

    def checkpoint(self) -> Checkpoint:
        """The newest complete checkpoint; of position 0 when there is none."""
        return (self.checkpoints() or [Checkpoint()])[-1]

    def states(self) -> Iterator[StreamState]:
        """All states, by stream and checkpoint: the last of a stream is its newest; closed streams may be there."""
        return map(self.stream_state, self.rows("states"))

    def stream_state(self, row: tuple[Any, ...]) -> StreamState:
        """A row of the table `states`."""
        stream, position, seq, state, tail_seq, tail_x, tail_y = row
        if not 0 <= tail_seq <= seq:
            raise self.damaged(f"the state of stream {stream} has a tail from {tail_seq} to {seq}")
        widths = (self.header.features, self.header.outputs)
        for blob, width in zip((tail_x, tail_y), widths, strict=True):
            self.check_bytes(blob, (seq - tail_seq) * width * 4, position)
        found = self.state(state, position)
        assert found is not None, "the column is NOT NULL"
        x, y = (
            np.frombuffer(blob, "<f4").reshape(-1, width) for blob, width in zip((tail_x, tail_y), widths, strict=True)
        )
        return StreamState(stream, position, seq, found, tail_seq, x, y)

    def check_checkpoint(self, announced: int, positions: Mapping[str, I64]) -> None:
        """Raise unless the newest checkpoint is the one that an event announced, and counts the rows that are there.

        Args:
            announced: the position in the newest event `checkpoint`, 0 where there is none.
            positions: those of the rows of each of the tables that a checkpoint counts.
        """
        mark = self.checkpoint()
        if mark.position != announced:
            raise self.damaged(f"its newest checkpoint should be of position {announced}, and is of {mark.position}")
        for table in COUNTED:
            later = positions[table][positions[table] > self.trimmed.position]
            count = int((later <= mark.position).sum())
            expected = getattr(mark, table) - getattr(self._oldest, table)
            if count != expected:
                raise self.damaged(f"up to position {mark.position} it holds {count:,} {table} instead of {expected:,}")

    @cached_property
    def _marks(self) -> list[RecordedEvent]:
        """The events that say how to read the others."""
        return self._read_marks()

    def _read_marks(self) -> list[RecordedEvent]:
        before = self.events_that_count() if self.trimmed.position else []
        return [event for event in (*before, *self.events()) if event.kind in MARKS]

    @cached_property
    def _oldest(self) -> Checkpoint:
        """The checkpoint that the history begins with; of position 0 where it was not trimmed."""
        return self.checkpoints()[0] if self.trimmed.position else Checkpoint()

    @cached_property
    def _trimmed_to(self) -> dict[int, tuple[int, U8]]:
        """The first frame that counts, and the state before it, of streams that were open where it was trimmed."""
        found: dict[int, tuple[int, U8]] = {}
        if self.trimmed.position:
            open_streams = self._open_where_trimmed
            for state in self.states():
                if state.position <= self.trimmed.position and state.stream in open_streams:
                    found[state.stream] = (state.seq, state.state)
        return found

    @cached_property
    def _forgotten(self) -> frozenset[int]:
        """Streams that closed while the checkpoint was taken where it was trimmed: they may have no state there."""
        if not self.trimmed.position:
            return frozenset()
        closed = {row[2] for row in self.rows("closings", self.first_position, self._oldest.completed)}
        return self._open_where_trimmed & closed

    @cached_property
    def ended_where_trimmed(self) -> frozenset[int]:
        """Streams that had closed where the history was trimmed, whose rows are about to be deleted."""
        return frozenset(row[2] for row in self.rows("closings", last=self.trimmed.position))

    @cached_property
    def _open_where_trimmed(self) -> frozenset[int]:
        return frozenset(row[2] for row in self.openings() if row[0] <= self.trimmed.position)

    def _as_trimmed(self, info: StreamInfo) -> StreamInfo:
        if info.stream not in self._trimmed_to:
            return info
        first_seq, state = self._trimmed_to[info.stream]
        return replace(info, first_seq=first_seq, initial_state=state)

    def _count_after_trimming(self, streams: U32, seqs: U64) -> list[bool]:
        """Which frames are not in the states of the checkpoint where it was trimmed."""
        return [
            stream not in self._forgotten and seq >= self._trimmed_to.get(stream, (0, None))[0]
            for stream, seq in zip(streams.tolist(), seqs.tolist(), strict=True)
        ]

    @cached_property
    def _failed(self) -> list[int]:
        """Positions of the failed batches, in order."""
        return [event.seq for event in self._marks if event.kind == FAILED_EVENT and event.seq is not None]

    @cached_property
    def recovered_at(self) -> list[int]:
        """Positions of the events `recovered`."""
        return [event.position for event in self._marks if event.kind == RECOVERED_EVENT]

    def _check_unanswered(self, position: int, next_computed: int | None) -> None:
        """A batch has no outcome: no later one may have, unless another process went on in between."""
        at = bisect_right(self._failed, position)
        outcomes = [] if next_computed is None else [next_computed]
        outcomes += self._failed[at : at + 1]
        later = bisect_right(self.recovered_at, position)
        went_on_at = self.recovered_at[later] if later < len(self.recovered_at) else self.last_position + 1
        if outcomes and min(outcomes) < went_on_at:
            raise self.damaged(f"the outputs of the batch at position {position} are missing")

    def _stream(self, opening: tuple[Any, ...], closing: tuple[Any, ...] | None) -> StreamInfo:
        opened_position, opened_ns, stream, name, epoch, first_seq, state = opening
        initial = self.state(state, opened_position)
        opened = (stream, name, epoch, first_seq, opened_ns, opened_position, initial)
        if closing is None:
            return StreamInfo(*opened)
        position, time_ns, _, frames, reason, state = closing
        return StreamInfo(*opened, time_ns, position, reason, frames, self.state(state, position))

    def _group(self, rows: list[tuple[Any, ...]], outputs: list[bytes] | None) -> BatchGroup:
        positions, times_ns, sizes, streams, seqs, x = zip(*rows, strict=True)
        for position, size in zip(positions, sizes, strict=True):
            if size < 1:
                raise self.damaged(f"the batch at position {position} holds {size} frames")
        starts: I64 = np.cumsum((0, *sizes), dtype=np.int64)
        features, width = self.header.features, self.header.outputs

        def joined(blobs: Sequence[bytes], dtype: str, values: int) -> npt.NDArray[Any]:
            item = values * np.dtype(dtype).itemsize
            if list(map(len, blobs)) != [size * item for size in sizes]:
                for blob, size, position in zip(blobs, sizes, positions, strict=True):
                    self.check_bytes(blob, size * item, position)
            return np.frombuffer(b"".join(blobs), dtype)

        return BatchGroup(
            positions,
            times_ns,
            starts,
            joined(streams, "<u4", 1),
            joined(seqs, "<u8", 1),
            joined(x, "<f4", features).reshape(-1, features),
            None if outputs is None else joined(outputs, "<f4", width).reshape(-1, width),
        )
