"""Reads any file of frames: recognises its format by content, reads columns, and splits them into sequences."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_tools.formats.columns import Choice, Roles, column_names, find_roles, input_columns, output_columns
from instep_tools.formats.grouping import CHOOSE, Columns, sequences_of
from instep_tools.formats.mcap_file import read_mcap
from instep_tools.formats.table import StartState, TableHeader
from instep_tools.problems import BadFile, CommandProblem, reads_or_writes
from instep_tools.sequences import RecordedSequences

Table: TypeAlias = tuple[Columns, Roles, TableHeader]
OnProgress: TypeAlias = Callable[[float], None]
Reader: TypeAlias = Callable[[Path, Choice, OnProgress], Table]

_START_BYTES: Final = 4096


def read_sequences(
    path: Path, choice: Choice | None = None, on_progress: OnProgress = lambda share: None
) -> RecordedSequences:
    """Read a recording, text, JSON lines, NPZ, NPY, Parquet or MCAP; empty sequences are left out.

    `on_progress` is called with the share (0 to 1) of a recording or an MCAP file that has been read.

    Raises:
        BadFile: naming the file and the problem.
        CommandProblem: when a chosen column or stream does not exist, or a library is missing.
    """
    choice = choice or Choice()
    reader = _reader(path)
    if choice.named and reader not in (_read_text, _read_parquet):
        raise CommandProblem(f"--named is for text and Parquet, whose first column names the stream: {path} is neither")
    try:
        sequences = sequences_of(path, *reader(path, choice, on_progress))
    except CommandProblem:
        raise
    except Exception as error:  # of a damaged file, the libraries raise errors of many kinds
        why = str(getattr(error, "strerror", None) or error)
        raise BadFile(f"{path} cannot be read: {' '.join(why.split())}") from None
    kept = [row for row, name in enumerate(sequences.names) if fnmatchcase(name, choice.streams)]
    if not kept:
        raise CommandProblem(
            f"no stream's name fits {choice.streams!r}; the first one is called {sequences.names[0]!r}"
        )
    sequences = sequences if len(kept) == len(sequences) else sequences.select(kept)
    _check_values(path, sequences)
    return sequences


def _check_values(path: Path, sequences: RecordedSequences) -> None:
    good = np.isfinite(sequences.frames).all(axis=1)
    if not good.all():
        flat = int(np.argmin(good))
        row = int(np.searchsorted(sequences.starts, flat, side="right")) - 1
        raise BadFile(
            f"{path}: frame {flat - sequences.starts[row]} of {sequences.names[row]!r} is not finite in float32; "
            "no server applies such a frame"
        )
    if sequences.times_ns is not None:
        goes_back = np.flatnonzero(np.diff(sequences.times_ns) < 0) + 1
        if len(np.setdiff1d(goes_back, sequences.starts)):
            raise BadFile(f"{path}: the times of a stream must never go back")


def _reader(path: Path) -> Reader:
    with reads_or_writes(path, "read"):
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    for magic, reader in _READERS.items():
        if start.startswith(magic):
            return reader
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        start = b"\0"
    if b"\0" in start:
        raise _unknown(path)
    return _read_text


def _unknown(path: Path) -> BadFile:
    return BadFile(
        f"{path} is of another kind: recordings, CSV and other UTF-8 text, JSON lines, NPZ, NPY, Parquet and MCAP can "
        "be read"
    )


def _read_recording(path: Path, choice: Choice, on_progress: OnProgress) -> Table:
    """Read all streams of a recording, which may still be being written, up to its last commit."""
    from instep.recording.errors import RecordingError
    from instep.recording.reader import RecordingReader
    from instep.recording.records import RecordedFrames
    from instep.recording.table import StreamIndex, known_outputs, read_frames

    try:
        with RecordingReader(path) as reader:
            streams, of = reader.streams(), reader.header
            frames = RecordedFrames.join(list(read_frames(reader, streams, range(len(streams)), on_progress)))
            states = [StartState(*start) for start in reader.start_states(streams)]
    except RecordingError as error:
        raise BadFile(str(error)) from None
    names = np.array([info.name for info in streams], np.object_)
    columns: dict[str, npt.NDArray[Any]] = {
        "stream": names[StreamIndex(streams).rows(frames.streams)],
        "stream_id": frames.streams,
        "seq": frames.seqs,
        "time_ns": frames.times_ns,
        **dict(zip(input_columns(of.features), frames.x.T, strict=True)),
        **dict(zip(output_columns(of, of.outputs), known_outputs(frames).T, strict=True)),
    }
    about = {"fingerprint": of.model_fingerprint, "model": of.model_name}
    outputs = output_columns(of, of.outputs)
    header = TableHeader(input_columns(of.features), outputs, about=about, spec=of.state_spec, states=states)
    return columns, find_roles(list(columns), choice, header), header


def _read_numpy(path: Path, choice: Choice, on_progress: OnProgress) -> Table:
    """Read a table from `NpzWriter`, or any arrays [T, features] or [R, T, features]."""
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        loaded = np.load(file, allow_pickle=False)
        arrays = (
            {path.stem: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
        )
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise _unknown(path)  # a zip archive of other files
    header = TableHeader()
    if {"stream", "x"} <= arrays.keys():
        header = TableHeader.from_metadata(json.loads(arrays.pop("metadata", np.array(b"{}")).item()))
    else:
        arrays = _end_to_end(path, arrays)
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        if name not in ("x", "y"):
            columns[name] = array
        elif array.ndim != 2:
            raise BadFile(f"{path}: {name!r} must be [frames, numbers]")
        else:
            columns |= {f"{name}{at}": column for at, column in enumerate(array.T)}
    return columns, find_roles(list(columns), choice, header), header


def _end_to_end(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Join arrays of one stream each to the columns `stream` and `x`."""
    parts: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        if array.ndim == 3:
            width = len(str(len(array) - 1))
            parts |= {f"{name}-{row:0{width}}": part for row, part in enumerate(array)}
        else:
            parts[name] = array
    for name, part in parts.items():
        if part.ndim != 2 or part.dtype.kind not in "fiu":
            raise BadFile(
                f"{path}: {name!r} must be numbers [T, features], or [R, T, features] for R streams; "
                "streams of different lengths are arrays of their own"
            )
    if len({part.shape[1] for part in parts.values()}) > 1:
        raise BadFile(f"{path} holds arrays of different widths; all streams must have the same number of features")
    return {
        "stream": np.repeat(np.array(list(parts), np.object_), [len(part) for part in parts.values()]),
        "x": np.concatenate(list(parts.values())),
    }


def _read_parquet(path: Path, choice: Choice, on_progress: OnProgress) -> Table:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        own = {key.decode(): text.decode() for key, text in (file.schema_arrow.metadata or {}).items()}
        prefix = "instep."
        header = TableHeader.from_metadata(
            {key.removeprefix(prefix): text for key, text in own.items() if key.startswith(prefix)}
        )
        names = file.schema_arrow.names
        roles = find_roles(names, choice, header)
        labels = ["stream_id", "seq", roles.stream, roles.time]
        table = file.read([name for name in names if name in (*labels, *roles.inputs, *roles.outputs)])
    return {name: table.column(name).to_numpy() for name in table.column_names}, roles, header


def _read_json(path: Path, choice: Choice, on_progress: OnProgress) -> Table:
    """Read JSON lines as `send` prints them; lists of numbers become columns x0, x1 and so on."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, first in lines[0].items():
        values = [line[name] for line in lines]
        if isinstance(first, list):
            columns |= {f"{name}{at}": column for at, column in enumerate(np.array(values, np.float64).T)}
        else:
            columns[name] = np.array(values)
    return columns, find_roles(list(columns), choice), TableHeader()


def _read_text(path: Path, choice: Choice, on_progress: OnProgress) -> Table:
    """Read numbers separated by commas, semicolons, tabs or spaces, with or without a line of names."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = enumerate(io.BytesIO(data))
    skipped, first = next(((at, line) for at, line in lines if line.strip() and line[:1] != b"#"), (0, b""))
    separator = next((each for each in ",;\t" if each.encode() in first), " ")
    if separator == " ":
        data = re.sub(rb"[ \t]+", b" ", re.sub(rb"(?m)^[ \t]+|[ \t\r]+$", b"", data))
        first = b" ".join(first.split())
    fields = next(csv.reader([first.decode().strip()], delimiter=separator), [])
    names, has_names = column_names([each.strip() for each in fields], choice.named)
    roles = find_roles(names, choice)
    if not names:
        return {}, roles, TableHeader()
    types = {name: pa.float64() for name in (*roles.inputs, *roles.outputs)}
    types |= {name: pa.int64() for name in ("stream_id", "seq") if name in names}
    types |= {} if roles.stream is None else {roles.stream: pa.string()}
    try:
        table = arrow_csv.read_csv(
            pa.py_buffer(data),
            arrow_csv.ReadOptions(column_names=names, skip_rows=skipped + has_names, use_threads=False),
            arrow_csv.ParseOptions(delimiter=separator),
            arrow_csv.ConvertOptions(
                column_types=types, include_columns=[name for name in names if name in types or name == roles.time]
            ),
        )
    except pa.ArrowInvalid as error:
        why, in_columns = re.subn(
            r"In CSV column #(\d+)", lambda at: f"in column {names[int(at[1])]!r}", " ".join(str(error).split())
        )
        hint = f"{CHOOSE}: " if in_columns and not choice.columns else ""
        raise BadFile(f"{path}: {hint}{why}") from None
    return {name: table.column(name).to_numpy() for name in table.column_names}, roles, TableHeader()


_READERS: Final[dict[bytes, Reader]] = {
    b"SQLite format 3\0": _read_recording,
    b"PAR1": _read_parquet,
    b"\x89MCAP0\r\n": read_mcap,
    b"PK": _read_numpy,
    b"\x93NUMPY": _read_numpy,
    b"{": _read_json,
}
