"""What becomes of outputs: lines on stdout, or a file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from instep_client.protocol.wire import F32
from instep_tools.files import save_sequences
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences


class Outputs(Protocol):
    """Takes answered frames in order and keeps or shows them."""

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Frames `seq`, `seq + 1`, … of one stream: float32 [T, features] and [T, outputs]."""
        ...

    def finish(self, fingerprint: str) -> str:
        """All were added, from the model of this fingerprint; where they are now, to end a sentence, or nothing."""
        ...


class NoOutputs:
    """Keeps nothing."""

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Forget them."""

    def finish(self, fingerprint: str) -> str:
        """Nothing is left to do."""
        return ""


class PrintedOutputs:
    """One line a frame: stream, seq, values, separated by spaces."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Print them."""
        lines = [f"{stream} {seq + step} {' '.join(values)}\n" for step, values in enumerate(_texts(outputs))]
        self._write("".join(lines))

    def finish(self, fingerprint: str) -> str:
        """Nothing is left to do."""
        return ""


class NpzOutputs:
    """An NPZ with the frames and their outputs, which `replay --check` can run again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._streams: dict[str, list[tuple[F32, F32]]] = {}

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Keep them until the end."""
        self._streams.setdefault(stream, []).append((frames, outputs))

    def finish(self, fingerprint: str) -> str:
        """Write the file."""
        parts = [part for parts in self._streams.values() for part in parts]
        if not parts:
            return f"; nothing to save in {self._path}"
        sequences = RecordedSequences(
            names=tuple(self._streams),
            lengths=np.array([sum(len(x) for x, _ in parts) for parts in self._streams.values()]),
            frames=np.concatenate([x for x, _ in parts]),
            outputs=np.concatenate([y for _, y in parts]),
            fingerprint=fingerprint,
        )
        save_sequences(self._path, sequences)
        return f"; saved in {self._path}"


class CsvOutputs:
    """A CSV of the outputs: stream, seq, y0, y1, …; written as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._started = False

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Write them."""
        if not self._started:
            self._started = True
            self._rows.writerow(["stream", "seq", *(f"y{column}" for column in range(outputs.shape[1]))])
        self._rows.writerows([stream, seq + step, *values] for step, values in enumerate(_texts(outputs)))

    def finish(self, fingerprint: str) -> str:
        """Close the file."""
        self._file.close()
        return f"; saved in {self._path}"


def open_outputs(path: Path) -> Outputs:
    """Where to put outputs that come one by one: an NPZ or CSV. An older file of that name is written over.

    Raises:
        BadFile: another ending, or the file cannot be written.
    """
    check_output_path(path)
    return NpzOutputs(path) if path.suffix.lower() == ".npz" else CsvOutputs(path)


def save_outputs(path: Path, sequences: RecordedSequences) -> None:
    """Save the outputs of whole sequences: an NPZ with all that they have, or a CSV."""
    if path.suffix.lower() == ".npz":
        save_sequences(path, sequences)
        return
    if sequences.outputs is None:
        raise ValueError("the sequences have no outputs")
    table = CsvOutputs(path)
    for name, start, length in zip(sequences.names, sequences.starts, sequences.lengths, strict=True):
        frames = slice(start, start + length)
        table.add(name, 0, sequences.frames[frames], sequences.outputs[frames])
    table.finish("")


def check_output_path(path: Path) -> None:
    """Find out before the work, not after it, whether outputs can be saved there.

    Raises:
        BadFile: when they cannot.
    """
    if path.suffix.lower() not in (".npz", ".csv"):
        raise BadFile(f"cannot tell from the name {path} how to save: it must end in .npz or .csv")
    try:
        path.open("ab").close()
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None


def _texts(values: F32) -> list[list[str]]:
    """Every float32 in the fewest digits that give it back."""
    return [[str(value) for value in row] for row in values]
