"""Any file of frames: recognised by its content, read by its format's module."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import numpy as np

from instep_tools.formats.columns import Choice, chosen_columns
from instep_tools.formats.mcap_file import read_mcap
from instep_tools.formats.npz import read_numpy
from instep_tools.formats.parquet import read_parquet
from instep_tools.formats.recording import read_recording
from instep_tools.formats.text import read_text
from instep_tools.problems import BadFile, CommandProblem, reads_or_writes
from instep_tools.sequences import RecordedSequences

Reader = Callable[[Path, Choice], RecordedSequences]

READABLE: Final = "recordings, CSV and other text, NPZ, NPY, Parquet and MCAP can be read"


def _read_recording(path: Path, choice: Choice) -> RecordedSequences:
    return chosen_columns(read_recording(path), choice)


def _read_archive(path: Path, choice: Choice) -> RecordedSequences:
    """Other programs write zip archives, too."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") for name in names):
        raise BadFile(f"{path} is a PyTorch file: save its frames with numpy.savez; {READABLE}")
    if not all(name.endswith(".npy") for name in names):
        raise BadFile(f"{path} is a zip archive, but no NPZ: {READABLE}")
    return read_numpy(path, choice)


_READERS: Final[dict[bytes, Reader]] = {
    b"SQLite format 3\0": _read_recording,
    b"PAR1": read_parquet,
    b"\x89MCAP0\r\n": read_mcap,
    b"PK\x03\x04": _read_archive,
    b"PK\x05\x06": _read_archive,
    b"\x93NUMPY": read_numpy,
}
"""By the first bytes of a file."""
_STRANGERS: Final = {
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"RIFF": "a WAV file",
    b"\x89PNG": "a picture",
    b"#ROSBAG": "a bag of ROS 1",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "text in UTF-16",
}
_START_BYTES: Final = 4096


def holds_lines(path: Path) -> bool:
    """Whether it is text, or no file but a pipe or a device: it is read line by line, as lines come.

    Raises:
        BadFile: when it cannot be opened, or is of a kind that cannot be read.
    """
    return (os.path.exists(path) and not path.is_file()) or _reader(path) is read_text


def read_sequences(path: Path, choice: Choice | None = None) -> RecordedSequences:
    """Read a recording, NPZ, NPY, Parquet, MCAP, or text; sequences without a frame are left out.

    Raises:
        BadFile: naming the file and what is wrong with it.
        CommandProblem: when something that was chosen is not there, or a library is missing.
    """
    choice = choice or Choice()
    reader = _reader(path)
    if choice.named and reader not in (read_text, read_parquet):
        raise CommandProblem(f"--named is for text and Parquet, whose first column names the stream: {path} is neither")
    if choice.time and reader not in (read_text, read_parquet):
        raise CommandProblem(f"--time names a column of text or Parquet: {path} has none")
    try:
        sequences = reader(path, choice)
    except UnicodeDecodeError:
        raise BadFile(f"{path} is not UTF-8 text: {READABLE}") from None
    except (EOFError, OSError, OverflowError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        why = str(getattr(error, "strerror", None) or error)
        raise BadFile(f"{path} cannot be read: {' '.join(why.split())}") from None
    if not sequences.lengths.any():
        raise BadFile(f"{path} holds no frames")
    kept = [
        row
        for row, (name, length) in enumerate(zip(sequences.names, sequences.lengths, strict=True))
        if length and fnmatchcase(name, choice.only)
    ]
    if not kept:
        raise CommandProblem(f"no stream's name fits {choice.only!r}; the first one is called {sequences.names[0]!r}")
    sequences = sequences if len(kept) == len(sequences) else sequences.select(kept)
    _check_values(path, sequences)
    return sequences


def _reader(path: Path) -> Reader:
    with reads_or_writes(path, "read"):
        if path.is_dir():
            raise BadFile(f"{path} is a folder: name one file in it")
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    for magic, reader in _READERS.items():
        if start.startswith(magic):
            return reader
    for magic, what in _STRANGERS.items():
        if start.startswith(magic):
            raise BadFile(f"{path} is {what}: {READABLE}")
    if start[8:9] == b"{" and b"\0" in start[:8]:
        raise BadFile(f"{path} is a safetensors file: {READABLE}")
    if b"\0" in start:
        raise BadFile(f"{path} is a binary file of another kind: {READABLE}")
    if not start and path.suffix.lower() not in ("", ".csv", ".txt", ".tsv"):
        raise BadFile(f"{path} is empty")
    return read_text


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
