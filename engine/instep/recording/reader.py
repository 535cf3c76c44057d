"""Reading a recording: what it holds, as values, up to the last commit at the time it was opened."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from instep.recording.file import RecordingFile
from instep.recording.records import (
    Engine,
    RecordedBatch,
    RecordedEvent,
    SnapshotMark,
    StateReset,
    StreamInfo,
    StreamState,
)
from instep.recording.schema import (
    END_EVENT,
    ENGINE_EVENT,
    FAILED_EVENT,
    RECOVERED_EVENT,
    RESET_EVENT,
)


class RecordingReader(RecordingFile):
    """The streams, batches and events of a recording; see `RecordingFile` for what it shows and raises."""

    @property
    def finished(self) -> bool:
        """Whether it was closed in order."""
        return any(row[4] == END_EVENT for row in self.rows("events", self.last_position))

    @cached_property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that wrote it, in order."""
        engines = [Engine(0, self.header)]
        for event in self._marks:
            if event.kind == ENGINE_EVENT:
                changes = json.loads(event.detail)
                changes["buckets"] = tuple(changes.get("buckets", engines[-1].header.buckets))
                engines.append(Engine(event.position, replace(engines[-1].header, **changes)))
        return tuple(engines)

    def streams(self) -> list[StreamInfo]:
        """Every opening, in the order they opened."""
        closings = {row[2]: row for row in self.rows("closings")}
        opened = [self._stream(row, closings.pop(row[2], None)) for row in self.rows("openings")]
        if closings:
            raise self.damaged(f"stream {min(closings)} was closed, but never opened")
        return opened

    def batches(self, first: int = 1, last: int | None = None) -> Iterator[RecordedBatch]:
        """The batches at positions `first` to `last` (None: the newest), in order, but those whose step failed.

        A batch without outputs may only be followed by others without, up to the end or to an event `recovered`.
        """
        outputs = self.rows("outputs", first)
        output = next(outputs, None)
        for row in self.rows("batches", first, last):
            if row[0] in self._failed:
                continue
            while output is not None and output[2] < first:
                output = next(outputs, None)
            if output is not None and output[2] < row[0]:
                break
            y = None
            if output is not None and output[2] == row[0]:
                y, output = output[3], next(outputs, None)
            else:
                self._check_unanswered(row[0], None if output is None else output[2])
            yield self._batch(row, y)
        else:
            if output is None or last is not None or output[2] < first:
                return
        raise self.damaged(
            f"the outputs at position {output[0]} are said to be those of the batch at position {output[2]}, which "
            "there is not, or not in this order"
        )

    def events(self, first: int = 1) -> Iterator[RecordedEvent]:
        """The events from position `first` on, in order."""
        for position, time_ns, stream, seq, kind, detail, state in self.rows("events", first):
            yield RecordedEvent(position, time_ns, stream, seq, kind, detail, self.state(state, position))

    def resets(self, first: int = 1) -> Iterator[StateReset]:
        """The resets of states from position `first` on, in order."""
        for event in self.events(first):
            if event.kind == RESET_EVENT:
                if event.stream is None or event.seq is None:
                    raise self.damaged(f"the event at position {event.position} resets no stream")
                yield StateReset(event.position, event.stream, event.seq, event.state)

    def snapshot(self) -> SnapshotMark | None:
        """How far the states go; None when there was no snapshot yet."""
        marks = [SnapshotMark(*row) for row in self.rows("snapshot", first=0)]
        if len(marks) > 1:
            raise self.damaged("it holds more than one newest snapshot")
        return marks[0] if marks else None

    def states(self) -> Iterator[StreamState]:
        """The states of the newest snapshot, by stream; closed streams may be among them."""
        for stream, position, seq, state, tail_seq, tail_x, tail_y in self.rows("states"):
            if not 0 <= tail_seq <= seq:
                raise self.damaged(f"the state of stream {stream} has a tail from {tail_seq} to {seq}")
            widths = (self.header.features, self.header.outputs)
            for blob, width in zip((tail_x, tail_y), widths, strict=True):
                self.check_bytes(blob, (seq - tail_seq) * width * 4, position)
            found = self.state(state, position)
            assert found is not None, "the column is NOT NULL"
            x, y = (
                np.frombuffer(blob, "<f4").reshape(-1, width)
                for blob, width in zip((tail_x, tail_y), widths, strict=True)
            )
            yield StreamState(stream, position, seq, found, tail_seq, x, y)

    def check_states(self) -> None:
        """Read what a restart would begin with.

        Raises:
            DamagedRecording: when a CRC or a length is wrong.
        """
        self.snapshot()
        for _ in self.states():
            pass

    @cached_property
    def _marks(self) -> list[RecordedEvent]:
        """The events that say how to read the others."""
        kinds = (ENGINE_EVENT, FAILED_EVENT, RECOVERED_EVENT)
        return [event for event in self.events() if event.kind in kinds]

    @cached_property
    def _failed(self) -> dict[int, None]:
        """Positions of the failed batches, in order."""
        return {event.seq: None for event in self._marks if event.kind == FAILED_EVENT and event.seq is not None}

    @cached_property
    def _failed_in_order(self) -> list[int]:
        return list(self._failed)

    @cached_property
    def _recovered(self) -> list[int]:
        """Positions of the events `recovered`."""
        return [event.position for event in self._marks if event.kind == RECOVERED_EVENT]

    @cached_property
    def _buckets(self) -> frozenset[int]:
        return frozenset(bucket for engine in self.engines for bucket in engine.header.buckets)

    def _check_unanswered(self, position: int, next_computed: int | None) -> None:
        """A batch has no outcome: no later one may have, unless another process went on in between."""
        at = bisect_right(self._failed_in_order, position)
        outcomes = [] if next_computed is None else [next_computed]
        outcomes += self._failed_in_order[at : at + 1]
        later = bisect_right(self._recovered, position)
        went_on_at = self._recovered[later] if later < len(self._recovered) else self.last_position + 1
        if outcomes and min(outcomes) < went_on_at:
            raise self.damaged(f"the outputs of the batch at position {position} are missing")

    def _stream(self, opening: tuple[Any, ...], closing: tuple[Any, ...] | None) -> StreamInfo:
        opened_position, opened_ns, stream, name, epoch, first_seq, state = opening
        initial = self.state(state, opened_position)
        opened = (stream, name, epoch, first_seq, opened_ns, opened_position, initial)
        if closing is None:
            return StreamInfo(*opened, *[None] * 5)
        position, time_ns, _, frames, reason, state = closing
        return StreamInfo(*opened, time_ns, position, reason, frames, self.state(state, position))

    def _batch(self, row: tuple[Any, ...], y: bytes | None) -> RecordedBatch:
        position, time_ns, bucket, size, streams, seqs, x = row
        if not 0 < size <= bucket:
            raise self.damaged(f"the batch at position {position} holds {size} frames in a bucket of {bucket}")
        if bucket not in self._buckets:
            raise self.damaged(
                f"the batch at position {position} was stepped in a bucket of {bucket}, which is none of the engine's"
            )
        self.check_bytes(streams, size * 4, position)
        self.check_bytes(seqs, size * 8, position)
        self.check_bytes(x, size * 4 * self.header.features, position)
        if y is not None:
            self.check_bytes(y, size * 4 * self.header.outputs, position)
        return RecordedBatch(
            position,
            time_ns,
            bucket,
            np.frombuffer(streams, "<u4"),
            np.frombuffer(seqs, "<u8"),
            np.frombuffer(x, "<f4").reshape(size, -1),
            None if y is None else np.frombuffer(y, "<f4").reshape(size, -1),
        )
