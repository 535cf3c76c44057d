"""Files of recorded sequences: NPZ, NPY and CSV."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32
from instep_client.states import State
from instep_tools.lines import BadLine, LineReader
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences

BAD_LINES_NAMED: Final = 5
"""How many bad lines of a file its message names."""

Array = npt.NDArray[Any]


def is_numpy(path: Path) -> bool:
    """Whether the file's name says that it holds arrays, not lines."""
    return path.suffix.lower() in (".npz", ".npy")


def read_sequences(path: Path) -> RecordedSequences:
    """Read an NPZ, NPY or CSV file; which one it is, is told by its ending (anything else is read as CSV).

    * NPZ: `frames [sum, features]` with `lengths [R]`, and beside them, if they are there, `names [R]`,
      `outputs [sum, outputs]`, `times_s [sum]`, `initial_states [R, *shape]` and `fingerprint`;
      or any arrays [T, features], one a stream, called as the array; or one array [R, T, features].
    * NPY: one array [T, features] or [R, T, features].
    * CSV: one frame a line, see `LineReader`; without a column `stream` the file is one sequence.

    Sequences without a frame are left out.

    Raises:
        BadFile: naming the file and what is wrong with it.
    """
    try:
        sequences = _from_numpy(path) if is_numpy(path) else _from_lines(path)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from None
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadFile(f"{path} cannot be read: {error}") from None
    filled = np.flatnonzero(sequences.lengths)
    if not len(filled):
        raise BadFile(f"{path} holds no frames")
    if len(filled) < len(sequences):
        sequences = sequences.select(filled.tolist())
    _check_values(path, sequences)
    return sequences


def save_sequences(path: Path, sequences: RecordedSequences) -> None:
    """Write an NPZ that `read_sequences` reads, with all that it has."""
    arrays: dict[str, Any] = {
        "names": np.array(sequences.names),
        "lengths": sequences.lengths,
        "frames": sequences.frames,
    }
    if sequences.outputs is not None:
        arrays["outputs"] = sequences.outputs
    if sequences.times_s is not None:
        arrays["times_s"] = sequences.times_s
    if sequences.initial_states:
        given = np.zeros(len(sequences), np.bool_)
        for row, state in sequences.initial_states.items():
            given[row] = True
            for name, leaf in _leaves(state):
                arrays.setdefault(name, np.zeros((len(sequences), *leaf.shape), leaf.dtype))[row] = leaf
        arrays["has_initial_state"] = given
    if sequences.fingerprint is not None:
        arrays["fingerprint"] = np.array(sequences.fingerprint)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _from_numpy(path: Path) -> RecordedSequences:
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _from_array(path, path.stem, loaded)
        arrays: dict[str, Array] = {name: loaded[name] for name in loaded.files}
    if "frames" in arrays and "lengths" in arrays:
        return _from_columns(path, arrays)
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


def _from_columns(path: Path, arrays: Mapping[str, Array]) -> RecordedSequences:
    frames = _frames(path, "frames", arrays["frames"], 2)
    lengths = _column(path, arrays, "lengths", "iu", (None,))
    if (lengths < 0).any() or lengths.sum() != len(frames):
        raise BadFile(f"{path}: 'lengths' must add up to the {len(frames)} rows of 'frames', not {lengths.sum()}")
    sequences = RecordedSequences(_numbered(path.stem, len(lengths)), lengths.astype(np.int64), frames)
    if "names" in arrays:
        names = _column(path, arrays, "names", "U", lengths.shape)
        sequences = replace(sequences, names=tuple(str(name) for name in names))
    if "outputs" in arrays:
        sequences = replace(sequences, outputs=_column(path, arrays, "outputs", "f", (len(frames), None)))
    if "times_s" in arrays:
        times_s = _column(path, arrays, "times_s", "fiu", (len(frames),))
        sequences = replace(sequences, times_s=times_s.astype(np.float64))
    leaves = {name: array for name, array in arrays.items() if name.partition(".")[0] == "initial_states"}
    if leaves:
        sequences = replace(sequences, initial_states=_initial_states(path, arrays, leaves, len(lengths)))
    if "fingerprint" in arrays:
        sequences = replace(sequences, fingerprint=str(_column(path, arrays, "fingerprint", "U", ())))
    return sequences


def _leaves(state: State) -> Iterator[tuple[str, Array]]:
    """The names of a state's arrays in a file, with the arrays."""
    if isinstance(state, Mapping):
        yield from ((f"initial_states.{name}", leaf) for name, leaf in state.items())
    else:
        yield "initial_states", state


def _initial_states(
    path: Path, arrays: Mapping[str, Array], leaves: Mapping[str, Array], count: int
) -> dict[int, State]:
    given = np.ones(count, np.bool_)
    if "has_initial_state" in arrays:
        given = _column(path, arrays, "has_initial_state", "b", (count,))
    for name, leaf in leaves.items():
        if leaf.ndim < 1 or len(leaf) != count:
            raise BadFile(f"{path}: {name!r} must hold one state for each of the {count} sequences")
    rows = np.flatnonzero(given).tolist()
    if list(leaves) == ["initial_states"]:
        return {row: leaves["initial_states"][row] for row in rows}
    return {row: {name.partition(".")[2]: leaf[row] for name, leaf in leaves.items()} for row in rows}


def _column(path: Path, arrays: Mapping[str, Array], name: str, kinds: str, shape: tuple[int | None, ...]) -> Array:
    """One array of the kinds and shape it must have; None stands for any extent."""
    array = arrays[name]
    fits = len(array.shape) == len(shape) and all(
        wanted is None or wanted == extent for wanted, extent in zip(shape, array.shape, strict=False)
    )
    if array.dtype.kind not in kinds or not fits or (kinds == "f" and array.dtype != np.float32):
        what = {"iu": "integers", "U": "text", "f": "float32", "fiu": "numbers"}[kinds]
        wanted_shape = ", ".join("*" if extent is None else str(extent) for extent in shape)
        raise BadFile(f"{path}: {name!r} must be {what} [{wanted_shape}], it is {array.dtype} {list(array.shape)}")
    return array


def _from_array(path: Path, name: str, array: Array) -> RecordedSequences:
    if array.ndim == 3:
        frames = _frames(path, name, array, 3)
        count, steps, features = frames.shape
        lengths = np.full(count, steps, np.int64)
        return RecordedSequences(_numbered(name, count), lengths, frames.reshape(count * steps, features))
    frames = _frames(path, name, array, 2)
    return RecordedSequences((name,), np.array([len(frames)], np.int64), frames)


def _from_lines(path: Path) -> RecordedSequences:
    reader = LineReader()
    frames: dict[str, list[F32]] = {}
    times_s: dict[str, list[float]] = {}
    bad: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            try:
                line = reader.read(text)
            except BadLine as error:
                bad.append(f"line {number}: {error}")
                continue
            if line is not None:
                name = path.stem if line.stream is None else line.stream
                frames.setdefault(name, []).append(line.frame)
                if line.time_s is not None:
                    times_s.setdefault(name, []).append(line.time_s)
    if bad:
        more = f"; and {len(bad) - BAD_LINES_NAMED} more" if len(bad) > BAD_LINES_NAMED else ""
        raise BadFile(f"{path}: {'; '.join(bad[:BAD_LINES_NAMED])}{more}")
    if not frames:
        raise BadFile(f"{path} holds no frames")
    return RecordedSequences(
        names=tuple(frames),
        lengths=np.array([len(part) for part in frames.values()], np.int64),
        frames=np.concatenate([np.stack(part) for part in frames.values()]),
        times_s=np.concatenate([np.array(part) for part in times_s.values()]) if times_s else None,
    )


def _frames(path: Path, name: str, array: Array, dimensions: int) -> F32:
    if array.ndim != dimensions or array.dtype.kind not in "fiu" or array.shape[-1] == 0:
        raise BadFile(
            f"{path}: {name!r} must be numbers [T, features] or, alone in its file, [R, T, features]; "
            f"it is {array.dtype} {list(array.shape)}"
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        return np.ascontiguousarray(array, np.float32)


def _numbered(name: str, count: int) -> tuple[str, ...]:
    width = len(str(count - 1))
    return tuple(f"{name}-{number:0{width}}" for number in range(count))


def _check_values(path: Path, sequences: RecordedSequences) -> None:
    good = np.isfinite(sequences.frames).all(axis=1)
    if not good.all():
        flat = int(np.argmin(good))
        row = int(np.searchsorted(sequences.starts, flat, side="right")) - 1
        raise BadFile(
            f"{path}: frame {flat - sequences.starts[row]} of {sequences.names[row]!r} is not finite in float32; "
            "no server applies such a frame"
        )
    if sequences.times_s is not None:
        goes_back = np.flatnonzero(np.diff(sequences.times_s) < 0) + 1
        if len(np.setdiff1d(goes_back, sequences.starts)) or not np.isfinite(sequences.times_s).all():
            raise BadFile(f"{path}: the times of a stream must be finite and never go back")
