"""States of streams out of a recording that is being written, some at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from instep.core.typing import F32, I64, Bool
from instep.recording.schema import TABLES, row_is_sound

_AT_ONCE: Final = 512
"""Streams in one query."""


class StoredStates:
    """Reads the states that the newest committed snapshot holds, and, of streams in none, those they opened with.

    One thread at a time may use it. Between calls it holds nothing that keeps a writer waiting.

    Args:
        path: the recording.
        layers: first extent of a state.
        size: second extent of a state.

    Raises:
        sqlite3.Error: when it cannot be opened.
    """

    def __init__(self, path: Path, layers: int, size: int) -> None:
        self.path = path
        self._shape = (layers, size)
        uri = f"file:{quote(str(path.absolute()))}?mode=ro"
        self._database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def read(self, streams: I64, seqs: I64) -> tuple[F32, Bool]:
        """States of streams that are open, before the frames `seqs`.

        Args:
            streams: int64 [N], distinct.
            seqs: int64 [N].

        Returns:
            states: float32 [N, layers, size], zeros where not found.
            found: bool [N], False where the row is missing, damaged, or of another frame.

        Raises:
            sqlite3.Error: when the file cannot be read.
        """
        states = np.zeros((len(streams), *self._shape), np.float32)
        found = np.zeros(len(streams), np.bool_)
        place = {stream: at for at, stream in enumerate(streams.tolist())}
        seq_of = dict(zip(streams.tolist(), seqs.tolist(), strict=True))
        with_row = set()
        for row in self._rows("states", streams.tolist()):
            with_row.add(row["stream"])
            if row["is_sound"] and row["seq"] == seq_of[row["stream"]]:
                self._put(row["state"], place[row["stream"]], states, found)
        for row in self._rows("openings", [stream for stream in place if stream not in with_row]):
            if row["is_sound"] and row["first_seq"] == seq_of[row["stream"]]:
                self._put(row["initial_state"], place[row["stream"]], states, found)
        return states, found

    def _put(self, blob: bytes | None, at: int, states: F32, found: Bool) -> None:
        found[at] = blob is None or len(blob) == states[at].nbytes
        if found[at] and blob is not None:
            states[at] = np.frombuffer(blob, "<f4").reshape(self._shape)

    def _rows(self, table: str, streams: list[int]) -> Iterator[dict[str, Any]]:
        columns = [*TABLES[table], "crc"]
        for first in range(0, len(streams), _AT_ONCE):
            part = streams[first : first + _AT_ONCE]
            query = f"SELECT {', '.join(columns)} FROM {table} WHERE stream IN ({', '.join('?' * len(part))})"
            for row in self._database.execute(query, part).fetchall():
                yield {**dict(zip(columns, row, strict=True)), "is_sound": row_is_sound(table, row)}
