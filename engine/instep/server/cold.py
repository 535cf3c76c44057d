"""Cold states: those that are in the recording and nowhere else, read by the step worker."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, Bool
from instep.recording.stored_states import StoredStates
from instep.runtime.errors import StateLost


class RecordedStates:
    """Finds the states of slots in the recording; see `ColdStates` of the runtime.

    What it looks up in the table stands still meanwhile: a stream's number, and, while its state is cold, the seq of
    its next step.

    Args:
        table: the streams.
        layers: layers of the network.
        size: its hidden size.
        live: which file holds the newest states of all open streams; asked before every reading.
    """

    def __init__(self, table: StreamTable, layers: int, size: int, live: Callable[[], Path]) -> None:
        self.live = live
        self._table = table
        self._layers = layers
        self._size = size
        self._stored: StoredStates | None = None

    def is_kept(self, slots: I64) -> Bool:
        """Whether the recording holds the states as they are: int64 [N] → bool [N]."""
        return self._table.keeping.is_kept(slots)

    def read(self, slots: I64) -> F32:
        """States of slots: float32 [N, layers, hidden size].

        Raises:
            StateLost: with the slots whose states are missing or damaged.
            sqlite3.Error: when the file cannot be read now.
        """
        stored, (states, found) = self._read(slots)
        if not found.all():
            gone = slots[~found]
            raise StateLost(
                f"{stored.path} is damaged: it does not hold the states of {len(gone)} streams, first of stream "
                f"{self._table.recording_id[gone[0]]}, as they were written",
                gone,
            )
        return states

    def _read(self, slots: I64) -> tuple[StoredStates, tuple[F32, Bool]]:
        """Out of the newest file. One that is followed in the meantime may be removed under the reader's hands."""
        streams, seqs, path = self._table.numbers(slots), self._table.step_seq[slots], self.live()
        try:
            stored = self._open(path)
            return stored, stored.read(streams, seqs)
        except sqlite3.Error:
            if (newest := self.live()) == path:
                raise
            stored = self._open(newest)
            return stored, stored.read(streams, seqs)

    def close(self) -> None:
        """Let go of the file."""
        if self._stored is not None:
            self._stored.close()
            self._stored = None

    def _open(self, path: Path) -> StoredStates:
        if self._stored is None or self._stored.path != path:
            self.close()
            self._stored = StoredStates(path, self._layers, self._size)
        return self._stored
