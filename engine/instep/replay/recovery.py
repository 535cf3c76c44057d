"""Restores an engine from a recording: states, frame buffers and owners, to the bit."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.tables import Tables, rows_of
from instep.core.typing import F32
from instep.models.portable.form import ARITHMETIC
from instep.recording.errors import RecordingError
from instep.recording.recovery import Recovered
from instep.recording.schema import RecordingHeader
from instep.recording.segments import Segment
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.replay.replay import NoStates, Replay, Stepping, Stretches, differ
from instep.runtime.stepper import Stepper
from instep.streaming.service import Recovery
from instep.streaming.states import put_into_memory

_LOAD_AT_ONCE: Final = 4096


def resume_recording(
    path: Path,
    header: RecordingHeader,
    tables: Tables,
    table: StreamTable,
    dirty: DirtyTracker,
    stepper: Stepper,
    retention: Retention = KEEP_ALL,
) -> tuple[RecordingWriter, Recovery]:
    """Continue a recording and its open streams in an engine that serves nobody yet.

    Only streams with frames to step again are loaded into memory; the others hibernate. `header` describes the present
    engine, and `dirty` marks the states that the recording lacks.

    Raises:
        RecordingError: when the recording is being written, damaged or of another model, more streams have to be
            stepped again than fit, or the replay gives other outputs than were recorded in `portable-1`.
    """
    began = time.perf_counter()
    writer = RecordingWriter.resume(path, header, retention)
    try:
        with Recovered(path) as recovered:
            has_same_bits = recovered.arithmetics() == {header.arithmetic} == {ARITHMETIC}
            replay = _EngineReplay(recovered, tables, table, dirty, stepper, check_outputs=has_same_bits)
            table.last_epoch = max(table.last_epoch, recovered.last_epoch)
            for segment in recovered.segments():
                replay.advance(segment)
            for position, y in replay.missing:
                writer.add_outputs(time.time_ns(), position, y)
            writer.commit()
            seconds = time.perf_counter() - began
            asleep = {name: stream for stream, name in recovered.names.items() if stream not in replay}
            return writer, Recovery(
                len(recovered.names),
                replay.count,
                seconds,
                recovered.last_stream,
                asleep,
                recovered.checkpoint_position,
            )
    except sqlite3.Error as error:
        writer.abandon()
        raise RecordingError(f"cannot continue the recording {path}: {error}") from None
    except BaseException:
        writer.abandon()
        raise


def look_through(path: Path) -> tuple[int, int]:
    """Check all rows that `resume_recording` would read; return the numbers of open streams and frames to step.

    Raises:
        RecordingError: when the recording is damaged.
    """
    with Recovered(path) as recovered:
        replay, frames = _OpenStreams(recovered, NoStates(recovered.reader.header.state_spec)), 0
        for segment in recovered.segments():
            frames += int(replay.checked(segment).lengths.sum())
        return len(recovered.names), frames


class _OpenStreams(Replay):
    """Follows the open streams of a recording that have frames to step."""

    def __init__(self, recovered: Recovered, stepper: Stepping) -> None:
        super().__init__(stepper, recovered.reader)
        self.recovered = recovered

    def meet(self, numbers: Sequence[int]) -> None:
        """Add streams without loading their states."""
        for stream in self.recovered.load(numbers):
            self.add_loaded(stream.stream, stream.seq, stream.stream)

    def checked(self, segment: Segment) -> Stretches:
        """Plan as `plan` does, and treat a defect as damage."""
        stretches = self.plan(segment)
        for defect in stretches.defects:
            raise self.reader.damaged(
                f"the row at position {defect.position}, of stream {defect.stream}, does not belong there: "
                f"{defect.sentence}"
            )
        return stretches


class _EngineReplay(_OpenStreams):
    """Loads the streams into the engine's memory and steps them there."""

    def __init__(
        self,
        recovered: Recovered,
        tables: Tables,
        table: StreamTable,
        dirty: DirtyTracker,
        stepper: Stepper,
        *,
        check_outputs: bool,
    ) -> None:
        super().__init__(recovered, stepper)
        self._table = table
        self._tables = tables
        self._dirty = dirty
        self._engine = stepper
        self._check_outputs = check_outputs
        self.count = 0
        """Frames that were stepped."""
        self.missing: list[tuple[int, F32]] = []
        """Outputs by position of the batch, for batches whose outputs had not been recorded."""

    def meet(self, numbers: Sequence[int]) -> None:
        """Load streams, as parked, in the states from which they are stepped."""
        for first in range(0, len(numbers), _LOAD_AT_ONCE):
            streams = self.recovered.load(numbers[first : first + _LOAD_AT_ONCE])
            slots = put_into_memory(self._tables, self._table, self._engine, streams)
            if len(slots) < len(streams):
                raise RecordingError(
                    f"{self.recovered.path} holds more streams whose frames have to be stepped again than "
                    f"engine.max_streams = {len(self._table.owner) - 1}; raise it"
                )
            for stream, slot in zip(streams, slots.tolist(), strict=True):
                self.add_loaded(stream.stream, stream.seq, slot)

    @torch.inference_mode()
    def advance(self, segment: Segment) -> None:
        """Step the frames of a segment, and put them into the frame buffer with their outputs."""
        stretches = self.checked(segment)
        y, _ = self.step(stretches)
        frames, applied = stretches.frames, stretches.applied()
        if self._check_outputs:
            self._compare(segment, y)
        else:
            y[frames.answered] = frames.y[frames.answered]  # an output that is asked for again has the same bytes
        slots, seqs = np.repeat(stretches.slots, stretches.lengths), frames.seqs[applied]
        rows = rows_of(self._tables, slots, seqs)  # of frames beyond the window, the newest stay
        self._tables.x[rows], self._tables.y[rows] = frames.x[applied], y[applied]
        self._dirty.mark_dirty(stretches.slots)
        table = self._table
        table.step_seq[stretches.slots] = stretches.first_seqs + stretches.lengths
        table.next_seq[stretches.slots] = table.step_seq[stretches.slots]
        self.count += len(applied)
        positions = frames.positions[~frames.answered]
        self.missing += [(position, y[frames.positions == position]) for position in np.unique(positions).tolist()]

    def _compare(self, segment: Segment, y: F32) -> None:
        frames = segment.frames
        for at in np.flatnonzero(differ(y, frames.y) & frames.answered)[:1].tolist():
            raise RecordingError(
                f"stepping the batch at position {frames.positions[at]} of {self.recovered.path} again gives other "
                f"outputs than were recorded, first for frame {frames.seqs[at]} of stream {frames.streams[at]}: the "
                "file was changed, or a machine is faulty; `instep verify` says what differs, and another file begins "
                "a new recording"
            )
