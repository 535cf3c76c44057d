"""The parts of an engine that serves nobody: what a restart puts the streams of a recording into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.tables import Tables, make_tables
from instep.models.model import Model
from instep.recording.reader import load_open_streams
from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.runtime.stepper import Stepper
from instep.streaming.service import Recovery
from instep.streaming.states import put_into_memory
from tests.support.running import CPU, prepared


@dataclass(frozen=True)
class EngineParts:
    """Streams, frames and states; all empty at first."""

    tables: Tables
    table: StreamTable
    dirty: DirtyTracker
    stepper: Stepper

    def resume(self, path: Path, header: RecordingHeader) -> tuple[RecordingWriter, Recovery]:
        """Put the open streams of a recording into it, those too that would hibernate."""
        writer, recovery = resume_recording(path, header, self.tables, self.table, self.dirty, self.stepper)
        try:
            streams = load_open_streams(path, recovery.hibernated.values())
        except BaseException:
            writer.abandon()
            raise
        put_into_memory(self.tables, self.table, self.stepper, streams)
        return writer, recovery

    def slot(self, name: str) -> int:
        """The slot of an open stream."""
        slot = int(self.table.find([name])[0])
        assert slot, f"{name} is not open"
        return slot


def new_parts(model: Model, window: int, max_streams: int) -> EngineParts:
    """Room for so many streams of a model, and as many frames of each as the window.

    Those of one model and size share a stepper, which takes long to make: each call clears its states.
    """
    sizes = model.description.features, model.description.outputs
    tables = make_tables(max_streams, 4, window, *sizes, 1000, 1000, 1000)
    table = StreamTable(tables, np.ones(max_streams + 1, np.uint32))
    key = model.fingerprint, max_streams
    if key not in _STEPPERS:
        _STEPPERS[key] = Stepper(prepared(model).network, 256, max_streams, CPU)
    stepper = _STEPPERS[key]
    stepper.load(np.arange(1, max_streams + 1), None)
    return EngineParts(tables, table, DirtyTracker(max_streams), stepper)


_STEPPERS: dict[tuple[str, int], Stepper] = {}
