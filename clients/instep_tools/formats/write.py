"""Writing frames and outputs into a file whose name says its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeAlias

import numpy as np

from instep_client.protocol.wire import F32, ServerInfo
from instep_client.states import state_rows
from instep_tools.formats.columns import input_columns, output_columns
from instep_tools.formats.mcap_file import McapWriter
from instep_tools.formats.npz import NpzWriter
from instep_tools.formats.parquet import ParquetWriter
from instep_tools.formats.table import (
    CHUNK_FRAMES,
    StartState,
    TableHeader,
    TableRows,
    TableWriter,
    about_model,
    optional_libraries,
)
from instep_tools.formats.text import TextWriter
from instep_tools.problems import (
    BadFile,
    CommandProblem,
    check_writable,
    reads_or_writes,
    written_aside,
)
from instep_tools.sequences import RecordedSequences

Format: TypeAlias = Literal["parquet", "npz", "csv", "mcap"]

WRITERS: Final[dict[Format, Callable[[BinaryIO, TableHeader], TableWriter]]] = {
    "parquet": ParquetWriter,
    "npz": NpzWriter,
    "csv": TextWriter,
    "mcap": McapWriter,
}


_LIBRARIES: Final[dict[Format, str]] = {"parquet": "pyarrow", "mcap": "mcap"}


def format_of(path: Path) -> Format | None:
    """The format that a file's name says, or None."""
    return next((kind for kind in WRITERS if path.suffix.lower() == f".{kind}"), None)


def check_output_path(path: Path) -> Format:
    """Find out before the work, not after it, whether outputs can be saved there.

    Raises:
        CommandProblem: when they cannot, or a library is missing.
    """
    kind = format_of(path)
    if kind is None:
        raise BadFile(f"cannot tell from the name {path} how to save: it must end in .csv, .npz, .parquet or .mcap")
    if kind in _LIBRARIES:
        with optional_libraries(path.suffix):
            import_module(_LIBRARIES[kind])
    check_writable(path)
    return kind


def table_header(info: ServerInfo, timed: bool = False, states: tuple[StartState, ...] = ()) -> TableHeader:
    """What is known about outputs of a server."""
    return TableHeader(
        input_columns(info.features),
        output_columns(info, info.outputs),
        timed,
        about_model(info.model, info.fingerprint, info.arithmetic),
        info.state,
        states,
    )


class SavedOutputs:
    """A file of frames and their outputs, as they come from a live producer; used in a `with` block.

    It takes the place of an older file when the block ends. Only a new CSV can be watched: it grows with every answer.
    Rows have no time.

    Args:
        path: where it is saved.
        info: of the server.
        tell: called once, with the reason, when it cannot be written any more; what comes later is left out.
        stop: called then, too, unless everything has come.

    Raises:
        CommandProblem: when it cannot be begun.
    """

    def __init__(self, path: Path, info: ServerInfo, tell: Callable[[str], None], stop: Callable[[], None]) -> None:
        self.path = path
        self.has_failed = False
        self._tell, self._stop = tell, stop
        kind = check_output_path(path)
        self._is_watched = kind == "csv" and not path.exists()
        with ExitStack() as stack:
            stack.enter_context(reads_or_writes(path, "written"))
            place = path if self._is_watched else stack.enter_context(written_aside(path))
            self._file = stack.enter_context(place.open("wb"))
            self._writer = stack.enter_context(WRITERS[kind](self._file, table_header(info)))
            self._stack = stack.pop_all()
        self._most = 0 if kind == "csv" else CHUNK_FRAMES
        self._ids: dict[str, int] = {}
        self._rows: list[TableRows] = []
        self._count = 0

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Frames `seq`, `seq + 1`, … of one stream: float32 [T, features] and [T, outputs]."""
        number = self._ids.setdefault(stream, len(self._ids) + 1)
        count = len(frames)
        seqs = np.arange(seq, seq + count, dtype=np.uint64)
        names, ids = np.full(count, stream, np.object_), np.full(count, number, np.int64)
        self._rows.append(TableRows(names, ids, seqs, None, frames, outputs))
        self._count += count
        if self._count > self._most:
            with self._told_of_failure():
                self._flush()
            if self.has_failed:
                self._stop()

    @property
    def outcome(self) -> str:
        """Whether the file was saved, in words that end a sentence; known after the block."""
        if not self.has_failed:
            return f"saved in {self.path}"
        return f"{self.path} {'is incomplete' if self._is_watched else 'not written'}"

    def _flush(self) -> None:
        rows, self._rows, self._count = self._rows, [], 0
        if rows and not self.has_failed:
            with reads_or_writes(self.path, "written"):
                self._writer.add(_joined(rows))
                self._file.flush()

    @contextmanager
    def _told_of_failure(self) -> Iterator[None]:
        try:
            yield
        except CommandProblem as problem:
            if not self.has_failed:
                self.has_failed = True
                self._tell(str(problem))

    def __enter__(self) -> SavedOutputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._told_of_failure(), self._stack:
            self._flush()
            if self.has_failed:
                raise BadFile(f"{self.path} is not complete")


def save_sequences(path: Path, sequences: RecordedSequences, info: ServerInfo) -> None:
    """Save whole sequences with the outputs that a server gave, its initial states, and times where they are known.

    Raises:
        CommandProblem: when it cannot be written; an older file is as it was.
    """
    kind = check_output_path(path)
    states = tuple(
        StartState(row + 1, 0, state_rows(state, info.state, None)[0].tobytes())
        for row, state in sequences.initial_states.items()
    )
    outputs = sequences.outputs
    assert outputs is not None
    header = table_header(info, sequences.times_ns is not None, states)
    rows = np.repeat(np.arange(len(sequences)), sequences.lengths)
    names = np.array(sequences.names, np.object_)
    with written_aside(path) as part, part.open("wb") as file, WRITERS[kind](file, header) as writer:
        for first in range(0, len(rows), CHUNK_FRAMES):
            chunk = slice(first, first + CHUNK_FRAMES)
            seqs = np.arange(first, first + len(rows[chunk])) - sequences.starts[rows[chunk]]
            times_ns = None if sequences.times_ns is None else sequences.times_ns[chunk]
            labels = (names[rows[chunk]], rows[chunk] + 1, seqs.astype(np.uint64), times_ns)
            writer.add(TableRows(*labels, sequences.frames[chunk], outputs[chunk]))


def _joined(parts: list[TableRows]) -> TableRows:
    """Rows without times as one."""
    return TableRows(
        np.concatenate([part.names for part in parts]),
        np.concatenate([part.stream_ids for part in parts]),
        np.concatenate([part.seqs for part in parts]),
        None,
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.y for part in parts]),
    )
