"""The checkpoints of a recording, checked: states of all streams that a restart begins with."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import numpy as np

from instep.core.typing import I64, U8
from instep.recording.frames import FrameStore
from instep.recording.reader import RecordingReader
from instep.recording.records import StreamState
from instep.recording.schema import CHECKPOINT_EVENT
from instep.recording.sequences import SequenceIndex

_ROWS_AT_ONCE: Final = 256
"""Rows whose frames are stored together."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """A stream's state in a checkpoint."""

    position: int
    """All batches and resets up to it are in the state."""
    seq: int
    """The state is that before this frame."""
    state: U8
    """uint8 [row_bytes]."""
    tail_seq: int
    """The checkpoint also holds the frames from here to `seq`, because the client may not have their outputs."""
    tail_at: int
    """Where those begin in `StoredCheckpoints.tail_x` and `tail_y`."""


class StoredCheckpoints:
    """Reads the tables `checkpoints` and `states` as of one commit; the reader shows that commit from then on.

    Args:
        reader: the recording, before anything else was read from it.

    Attributes:
        positions: of the checkpoints, in order.
        states: by number of the stream, in order.
        tail_x: float32 [frames, features]: the frames that the states hold.
        tail_y: float32 [frames, outputs]: their outputs.

    Raises:
        RecordingError: when a row is damaged or missing.
    """

    def __init__(self, reader: RecordingReader) -> None:
        self._reader = reader
        self.states: dict[int, list[StoredState]] = defaultdict(list)
        with reader.at_once():
            self._mark = reader.checkpoint()
            self.positions = [checkpoint.position for checkpoint in reader.checkpoints()]
            self._read_states()
            self._check_counts()

    def check_complete(self, index: SequenceIndex) -> None:
        """Raise when a state that belongs into a checkpoint is missing, or is older than the checkpoint.

        Args:
            index: of the recording, made with these `positions`.
        """
        known = {info.stream for info in index.streams}
        for stream in self.states.keys() - known:
            raise self._reader.damaged(f"a checkpoint holds a state of stream {stream}, which was never opened")
        for seqs, stretches in zip(index.checkpoint_seqs, index.checkpoint_stretches, strict=True):
            for row, info in enumerate(index.streams):
                if info.closed_position is not None or row in index.defects:
                    continue  # it gives up the states of streams that have closed since
                stored = self.states.get(info.stream)
                has_changed = int(seqs[row]) != info.first_seq or int(stretches[row]) != row
                if not stored and has_changed:
                    raise self._reader.damaged(
                        f"the state of stream {info.stream} is missing from the checkpoint of position "
                        f"{self._mark.position}"
                    )
                if stored and stored[-1].seq < seqs[row]:
                    raise self._reader.damaged(
                        f"the checkpoint of position {self._mark.position} holds the state of stream {info.stream} "
                        f"before frame {stored[-1].seq}, but should hold one before frame {seqs[row]} or later"
                    )

    def _read_states(self) -> None:
        reader = self._reader
        store = FrameStore(reader.path, reader.header.features, reader.header.outputs)
        waiting: list[StreamState] = []
        frames = rows = 0
        for row in reader.states():
            rows += 1
            if row.position > reader.last_position:
                raise reader.damaged(
                    f"a state of stream {row.stream} is of position {row.position}, which there is not"
                )
            if row.position <= reader.trimmed.position:
                continue  # what the stream begins with, or about to be deleted
            self.states[row.stream].append(StoredState(row.position, row.seq, row.state, row.tail_seq, frames))
            frames += row.seq - row.tail_seq
            waiting.append(row)
            if len(waiting) == _ROWS_AT_ONCE:
                _append(store, waiting)
                waiting = []
        if waiting:
            _append(store, waiting)
        if rows != reader.state_rows:
            raise reader.damaged(f"it holds {rows:,} states instead of {reader.state_rows:,}")
        tails = store.sequences(np.zeros(1, np.int64), np.array([frames]))
        self.tail_x, self.tail_y = tails.x, tails.y

    def _check_counts(self) -> None:
        reader = self._reader
        events = list(reader.events())
        announced = [event.seq or 0 for event in events if event.kind == CHECKPOINT_EVENT] or [0]
        positions: dict[str, I64] = {"events": np.array([event.position for event in events], np.int64)}
        for table in ("openings", "closings"):
            positions[table] = np.array([row[0] for row in reader.rows(table, reader.first_position)], np.int64)
        reader.check_checkpoint(announced[-1], positions)


def _append(store: FrameStore, rows: list[StreamState]) -> None:
    x, y = np.concatenate([row.tail_x for row in rows]), np.concatenate([row.tail_y for row in rows])
    if len(x):
        store.append(np.zeros(len(x), np.int64), x, y)
