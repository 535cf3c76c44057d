"""From a recording back to a running engine: states, frame buffers and owners as they were, to the bit."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.tables import SCRATCH_SLOT, Tables, rows_of
from instep.core.typing import F32, I64
from instep.models.portable.form import ARITHMETIC
from instep.recording.errors import RecordingError
from instep.recording.records import StateReset
from instep.recording.recovery import Recovered, ReplayStep
from instep.recording.schema import RecordingHeader
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.streaming.states import put_into_memory

_LOAD_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Recovery:
    """The result of continuing a recording."""

    streams: int
    """Streams that are open again, until somebody resumes them: parked, or hibernated."""
    frames: int
    """Frames that were stepped again."""
    seconds: float
    last_stream: int
    """The highest number that a stream of the recording has."""
    hibernated: dict[str, int]
    """The streams that are not in memory, since nothing of them had to be stepped again: name → number."""
    checkpoint_position: int
    """Of what the recording holds up to here, only what still counts was read; 0 where all of it was."""


def resume_recording(
    path: Path,
    header: RecordingHeader,
    tables: Tables,
    table: StreamTable,
    dirty: DirtyTracker,
    stepper: Stepper,
    retention: Retention = KEEP_ALL,
) -> tuple[RecordingWriter, Recovery]:
    """Continue the open streams of a recording in an engine that serves nobody yet, and continue writing it.

    Only streams whose frames have to be stepped again are put into memory; the others are as if they hibernated.
    `header` is what the engine says of itself now, and `dirty` is told of the states that the recording lacks.

    Raises:
        RecordingError: when the recording is being written, damaged or of another model, more streams have to be
            stepped again than fit, or the replay gives other outputs than were recorded in `portable-1`.
    """
    began = time.perf_counter()
    writer = RecordingWriter.resume(path, header, retention)
    try:
        with Recovered(path) as recovered:
            has_same_bits = recovered.arithmetics() == {header.arithmetic} == {ARITHMETIC}
            replay = _Replay(recovered, tables, table, dirty, stepper, check_outputs=has_same_bits)
            table.last_epoch = max(table.last_epoch, recovered.last_epoch)
            for item in recovered.replay():
                if isinstance(item, StateReset):
                    replay.reset(item)
                else:
                    replay.add(item)
            replay.flush()
            for position, y in replay.missing:
                writer.add_outputs(time.time_ns(), position, y)
            writer.commit()
            seconds = time.perf_counter() - began
            names = recovered.names
            asleep = {names[stream]: stream for stream in names if not replay.has(stream)}
            return writer, Recovery(
                len(names), replay.frames, seconds, recovered.last_stream, asleep, recovered.checkpoint_position
            )
    except sqlite3.Error as error:
        writer.abandon()
        raise RecordingError(f"cannot continue the recording {path}: {error}") from None
    except BaseException:
        writer.abandon()
        raise


class _Replay:
    """Steps recorded inputs again, several batches in one step where no stream is in two of them."""

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
        self._recovered = recovered
        self._path = recovered.path
        self._table = table
        self._tables = tables
        self._dirty = dirty
        self._stepper = stepper
        self._check_outputs = check_outputs
        self._numbers = recovered.open_streams()
        self._slots_of_numbers: I64 = np.full(len(self._numbers), SCRATCH_SLOT, np.int64)
        """The scratch slot for those that are not in memory."""
        self._steps: list[tuple[ReplayStep, I64]] = []
        """Batches that were added, with the slots of the frames that apply."""
        self._size = 0
        self._taken = np.zeros(len(table.owner), np.bool_)
        self.frames = 0
        self.missing: list[tuple[int, F32]] = []
        """Batches, by position, whose outputs were not recorded any more, with the outputs."""

    def has(self, stream: int) -> bool:
        """Whether an open stream is in memory."""
        return bool(self._slots_of_numbers[np.searchsorted(self._numbers, stream)] != SCRATCH_SLOT)

    def _load(self, numbers: I64) -> None:
        """Put streams that are not in memory there, parked, in the states from which they are stepped."""
        for first in range(0, len(numbers), _LOAD_AT_ONCE):
            streams = self._recovered.load(numbers[first : first + _LOAD_AT_ONCE].tolist())
            slots = put_into_memory(self._tables, self._table, self._stepper, streams)
            if len(slots) < len(streams):
                raise RecordingError(
                    f"{self._path} holds more streams whose frames have to be stepped again than engine.max_streams = "
                    f"{len(self._table.owner) - 1}; raise it"
                )
            self._slots_of_numbers[np.searchsorted(self._numbers, numbers[first : first + _LOAD_AT_ONCE])] = slots

    def reset(self, reset: StateReset) -> None:
        """A stream was given another state."""
        self.flush()
        slots = self._slots(np.array([reset.stream], np.int64))
        self._dirty.mark_dirty(slots)
        self._stepper.load(slots, None if reset.state is None else reset.state[None])

    def add(self, step: ReplayStep) -> None:
        """A batch was stepped."""
        slots = self._slots(step.batch.streams[step.applies].astype(np.int64))
        if self._size + len(slots) > self._stepper.max_batch_size or self._taken[slots].any():
            self.flush()
        self._steps.append((step, slots))
        self._size += len(slots)
        self._taken[slots] = True

    def _slots(self, streams: I64) -> I64:
        """Of streams that are open."""
        places = np.searchsorted(self._numbers, streams)
        missing = places[self._slots_of_numbers[places] == SCRATCH_SLOT]
        if len(missing):
            self._load(self._numbers[np.unique(missing)])
        return self._slots_of_numbers[places]

    @torch.inference_mode()
    def flush(self) -> None:
        """Step the batches that were added."""
        steps, self._steps, self._size = self._steps, [], 0
        if not steps:
            return
        slots = np.concatenate([slots for _, slots in steps])
        self._taken[slots] = False
        table, tables = self._table, self._tables
        rows = rows_of(tables, slots, table.step_seq[slots])
        if len(slots):
            tables.x[rows] = np.concatenate([step.batch.x[step.applies] for step, _ in steps])
            self._dirty.mark_dirty(slots)
            most = self._stepper.max_batch_size
            for first in range(0, len(slots), most):  # a recorded batch may be larger than any that is made now
                part = slice(first, first + most)
                self._stepper.step(slots[part], rows[part], tables.x, tables.y)
            table.step_seq[slots] += 1
            table.next_seq[slots] = table.step_seq[slots]
            self.frames += len(slots)
        first = 0
        for step, own in steps:
            self._compare(step, rows[first : first + len(own)])
            first += len(own)

    def _compare(self, step: ReplayStep, rows: I64) -> None:
        """Compare the outputs in these rows with the recorded ones, which are what clients were answered."""
        batch, y = step.batch, self._tables.y[rows]
        if batch.y is None:
            if not step.applies.all():
                raise RecordingError(
                    f"{self._path} is damaged: the batch at position {batch.position} has no outputs, and a state "
                    "holds its frames"
                )
            self.missing.append((batch.position, y))
        elif self._check_outputs:
            differs = (y.view(np.uint32) != batch.y[step.applies].view(np.uint32)).any(axis=1)
            if differs.any():
                which = np.flatnonzero(step.applies)[differs][0]
                raise RecordingError(
                    f"stepping the batch at position {batch.position} of {self._path} again gives other outputs than "
                    f"were recorded, first for frame {batch.seqs[which]} of stream {batch.streams[which]}: the file "
                    "was changed, or a machine is faulty; `instep verify` says what differs, and another file begins "
                    "a new recording"
                )
        else:
            self._tables.y[rows] = batch.y[step.applies]  # who asks for an output again gets the same bytes
