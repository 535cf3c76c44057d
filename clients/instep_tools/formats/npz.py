"""NumPy's own files: NPZ, as it is written here or with arrays of any names, and NPY."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32
from instep_tools.formats.columns import Choice, chosen_columns
from instep_tools.formats.grouping import sequences_of
from instep_tools.formats.table import CHUNK_FRAMES, TableHeader, TableRows, TableWriter
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences

Array = npt.NDArray[Any]

_COPY_BYTES: Final = 2**20
_KINDS: Final = {"iu": "integers", "U": "text", "f": "float32", "S": "bytes"}


def read_numpy(path: Path, choice: Choice) -> RecordedSequences:
    """The sequences in an NPZ or NPY file.

    * The table: `stream` [N], `stream_id` [N], `seq` [N], `time_ns` [N], `x` [N, features], `y` [N, outputs] and
      `metadata`; only `stream` and `x` must be there.
    * Sequences end to end: `frames` [sum, features] and `lengths` [R].
    * Any arrays [T, features], one a stream, called as the array; or one array [R, T, features].

    Raises:
        BadFile: naming the array that is not as it should be.
        ValueError, OSError, zipfile.BadZipFile: when the file is damaged.
    """
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return chosen_columns(_from_array(path, path.stem, loaded), choice)
        arrays: dict[str, Array] = {name: loaded[name] for name in loaded.files}
    if {"stream", "x"} <= arrays.keys():
        return _from_table(path, arrays, choice)
    return chosen_columns(_from_arrays(path, arrays), choice)


def _from_table(path: Path, arrays: Mapping[str, Array], choice: Choice) -> RecordedSequences:
    x = _frames(path, "x", arrays["x"], 2)
    rows = len(x)
    columns = {
        name: _column(path, name, arrays[name], kinds, shape)
        for name, kinds, shape in (
            ("stream", "U", (rows,)),
            ("stream_id", "iu", (rows,)),
            ("seq", "iu", (rows,)),
            ("time_ns", "iu", (rows,)),
            ("y", "f", (rows, None)),
            ("metadata", "S", ()),
        )
        if name in arrays
    }
    header = TableHeader.from_metadata(json.loads(columns["metadata"].item()) if "metadata" in columns else {})
    sequences = sequences_of(
        path,
        columns["stream"].tolist(),
        columns["stream_id"].tolist() if "stream_id" in columns else None,
        columns["seq"].astype(np.int64) if "seq" in columns else None,
        columns["time_ns"].astype(np.int64) if "time_ns" in columns else None,
        x,
        columns.get("y"),
        header,
    )
    return chosen_columns(sequences, choice, header)


def _from_arrays(path: Path, arrays: Mapping[str, Array]) -> RecordedSequences:
    if "frames" in arrays and "lengths" in arrays:
        frames = _frames(path, "frames", arrays["frames"], 2)
        lengths = _column(path, "lengths", arrays["lengths"], "iu", (None,))
        if (lengths < 0).any() or lengths.sum() != len(frames):
            raise BadFile(f"{path}: 'lengths' must add up to the {len(frames)} rows of 'frames', not {lengths.sum()}")
        return RecordedSequences(_numbered(path.stem, len(lengths)), lengths.astype(np.int64), frames)
    if len(arrays) == 1:
        ((name, array),) = arrays.items()
        return _from_array(path, name, array)
    parts = {name: _frames(path, name, array, 2) for name, array in arrays.items()}
    if len({part.shape[1] for part in parts.values()}) > 1:
        raise BadFile(f"{path} holds arrays of different widths; all streams must have the same number of features")
    return RecordedSequences(
        names=tuple(parts),
        lengths=np.array([len(part) for part in parts.values()], np.int64),
        frames=np.concatenate([*parts.values(), *([] if parts else [np.empty((0, 1), np.float32)])]),
    )


def _from_array(path: Path, name: str, array: Array) -> RecordedSequences:
    if array.ndim == 3:
        frames = _frames(path, name, array, 3)
        count, steps, features = frames.shape
        lengths = np.full(count, steps, np.int64)
        return RecordedSequences(_numbered(name, count), lengths, frames.reshape(count * steps, features))
    frames = _frames(path, name, array, 2)
    return RecordedSequences((name,), np.array([len(frames)], np.int64), frames)


def _frames(path: Path, name: str, array: Array, dimensions: int) -> F32:
    if array.ndim != dimensions or array.dtype.kind not in "fiu" or array.shape[-1] == 0:
        raise BadFile(
            f"{path}: {name!r} must be numbers [T, features] or, alone in its file, [R, T, features]; "
            f"it is {array.dtype} {list(array.shape)}"
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        return np.ascontiguousarray(array, np.float32)


def _column(path: Path, name: str, array: Array, kinds: str, shape: tuple[int | None, ...]) -> Array:
    """The array if it is of the kinds and shape it must have; None is any extent."""
    fits = len(array.shape) == len(shape) and all(
        wanted is None or wanted == extent for wanted, extent in zip(shape, array.shape, strict=False)
    )
    if array.dtype.kind not in kinds or not fits or (kinds == "f" and array.dtype != np.float32):
        wanted_shape = ", ".join("*" if extent is None else str(extent) for extent in shape)
        raise BadFile(
            f"{path}: {name!r} must be {_KINDS[kinds]} [{wanted_shape}], it is {array.dtype} {list(array.shape)}"
        )
    return array


def _numbered(name: str, count: int) -> tuple[str, ...]:
    width = len(str(count - 1))
    return tuple(f"{name}-{number:0{width}}" for number in range(count))


class NpzWriter(TableWriter):
    """The table as arrays, see `read_numpy`.

    Columns grow in temporary files beside the output and are then copied into it, one after another: no more than a
    chunk is ever in memory, and the disk must have room for as much again.
    """

    def __init__(self, file: BinaryIO, header: TableHeader) -> None:
        self._file = file
        self._header = header
        self._rows = 0
        self._names: dict[str, int] = {}
        dtypes: dict[str, tuple[str, tuple[int, ...]]] = {
            "stream": ("<i8", ()),
            "stream_id": ("<u4", ()),
            "seq": ("<u8", ()),
            "time_ns": ("<i8", ()),
            "x": ("<f4", (len(header.inputs),)),
            "y": ("<f4", (len(header.outputs),)),
        }
        if not header.timed:
            del dtypes["time_ns"]
        self._columns = {name: (np.dtype(dtype), width) for name, (dtype, width) in dtypes.items()}
        self._stack = ExitStack()
        beside = Path(file.name).parent
        self._held: dict[str, IO[bytes]] = {
            name: self._stack.enter_context(tempfile.TemporaryFile(dir=beside, prefix=".instep-"))  # noqa: SIM115
            for name in dtypes
        }

    def add(self, rows: TableRows) -> None:
        """Put them behind those before."""
        codes = [self._names.setdefault(name, len(self._names)) for name in rows.names.tolist()]
        values = {
            "stream": codes,
            "stream_id": rows.stream_ids,
            "seq": rows.seqs,
            "time_ns": rows.times_ns,
            "x": rows.x,
            "y": rows.y,
        }
        for name, (dtype, _) in self._columns.items():
            self._held[name].write(np.ascontiguousarray(values[name], dtype).data.cast("B"))
        self._rows += len(rows)

    def close(self) -> None:
        """Copy the columns into the archive."""
        metadata = np.array(json.dumps(self._header.metadata).encode())
        with self._stack, zipfile.ZipFile(self._file, "w") as archive:
            for name, (dtype, width) in self._columns.items():
                held = self._held[name]
                held.seek(0)
                dtype = np.dtype(f"<U{max(map(len, self._names), default=1)}") if name == "stream" else dtype
                header = {"descr": dtype.str, "fortran_order": False, "shape": (self._rows, *width)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    if name == "stream":
                        self._copy_names(held, member, dtype)
                    else:
                        shutil.copyfileobj(held, member, _COPY_BYTES)
            with archive.open("metadata.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, metadata)

    def discard(self) -> None:
        """Remove the temporary files."""
        self._stack.close()

    def _copy_names(self, held: IO[bytes], member: IO[bytes], dtype: np.dtype[Any]) -> None:
        names = np.array(list(self._names), dtype)
        while codes := held.read(8 * CHUNK_FRAMES):
            member.write(names[np.frombuffer(codes, "<i8")].data.cast("B"))
