"""What `instep recordings` does: check, info, list, repair."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from instep.recording.errors import DamagedRecording, RecordingError, with_advice
from instep.recording.inspection import how_it_ends, inspect
from instep.recording.one_file import bytes_on_disk
from instep.recording.reader import RecordingReader
from instep.recording.repair import repair as save
from instep.recording.schema import APPLICATION_ID, RECOVERED_EVENT, RecordingHeader

WHOLE: Final = 0
DAMAGED: Final = 1
NOT_READ: Final = 2

_SQLITE_MAGIC: Final = b"SQLite format 3\0"
_APPLICATION_ID_OFFSET: Final = 68


def check(file: Path, console: Console) -> int:
    """Read all of a recording and say in one line whether it is whole; 0, 1 when it is damaged, 2 when not readable."""
    columns = (TextColumn("checking"), BarColumn(), TaskProgressColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task("checking", total=1.0)
            found = inspect(file, lambda share: bars.update(task, completed=share))
    except RecordingError as error:
        return _failed(error, console)
    parts = [
        f"whole: {_count(found.streams, 'stream')} ({found.open_streams:,} open), {_count(found.frames, 'frame')}, "
        f"{_count(found.positions, 'position')}",
        found.ending,
    ]
    if found.unanswered:
        parts.append(f"{_count(found.unanswered, 'frame')} without outputs")
    if found.restarts:
        parts.append(_count(found.restarts, "restart"))
    if found.snapshot_position:
        parts.append(f"states up to position {found.snapshot_position:,}")
    _say(console, "; ".join(parts), "bold green")
    return WHOLE


def info(file: Path, console: Console) -> int:
    """Say what a recording is, without reading all of it."""
    try:
        with RecordingReader(file) as reader:
            facts = _facts(reader)
    except RecordingError as error:
        return _failed(error, console)
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console.print(table, highlight=False)
    return WHOLE


def list_folder(folder: Path, console: Console) -> int:
    """Say which recordings a folder holds."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and _looks_like_one(path))
    except OSError as error:
        return _failed(RecordingError(f"cannot read the folder {folder}: {error.strerror}"), console)
    table = Table()
    for heading in ("file", "began", "model", "ends"):
        table.add_column(heading)
    for heading in ("streams", "open", "frames", "bytes"):
        table.add_column(heading, justify="right")
    for path in files:
        table.add_row(*(Text(value) for value in _line(path)))
    if files:
        console.print(table, highlight=False)
    else:
        _say(console, f"{folder} holds no recordings", "yellow")
    return WHOLE


def repair(file: Path, output: Path | None, console: Console) -> int:
    """Save what comes before the first damage into a new file, beside the damaged one unless told otherwise."""
    target = output or file.with_name(f"{file.stem}.repaired{file.suffix}")
    try:
        found = save(file, target)
    except RecordingError as error:
        return _failed(error, console)
    kept = f"{target}: {_count(found.positions, 'position')} saved"
    if found.left_out:
        _say(console, f"{kept}; left out: {found.left_out}", "bold yellow")
    else:
        _say(console, f"{kept}; nothing was damaged", "bold green")
    return WHOLE


def _facts(reader: RecordingReader) -> dict[str, str]:
    streams, events = reader.streams(), list(reader.events())
    batches, frames = reader.totals()
    header, snapshot = reader.header, reader.snapshot()
    engine = reader.engines[-1].header
    closed = sum(info.closed_position is not None for info in streams)
    return {
        "file": str(reader.path),
        "began": _when(header.created_ns),
        "ends": how_it_ends(reader),
        "part": _part(header),
        "model": f"{header.model_name} ({header.features} → {header.outputs})",
        "model's place": header.model_folder,
        "fingerprint": header.model_fingerprint,
        "written by": f"instep {engine.instep_version}",
        "durability": engine.durability,
        "exactness": engine.exactness,
        "numerics": ", ".join(f"{key} {value}" for key, value in sorted(engine.numerics.items())),
        "streams": f"{len(streams):,}, {len(streams) - closed:,} of them open",
        "batches": f"{batches:,}, with {frames:,} frames",
        "restarts": f"{sum(event.kind == RECOVERED_EVENT for event in events):,}",
        "states": f"up to position {snapshot.position:,}" if snapshot and snapshot.position else "none",
        "positions": f"{header.first_position:,} to {reader.last_position:,}",
        "bytes": f"{bytes_on_disk(reader.path):,}",
    }


def _part(header: RecordingHeader) -> str:
    if header.number == 1:
        return "file 1"
    return f"file {header.number:,} of the recording that began {_when(header.family)}"


def _line(path: Path) -> list[str]:
    """A row of the list."""
    try:
        with RecordingReader(path) as reader:
            streams = reader.streams()
            is_open = sum(info.closed_position is None for info in streams)
            numbers = [f"{number:,}" for number in (len(streams), is_open, reader.totals()[1])]
            header = reader.header
            names = [path.name, _when(header.created_ns), header.model_name, how_it_ends(reader)]
            return [*names, *numbers, f"{bytes_on_disk(path):,}"]
    except RecordingError as error:
        what = "damaged" if isinstance(error, DamagedRecording) else "of another version"
        return [path.name, "", "", what, "", "", "", f"{bytes_on_disk(path):,}"]


def _looks_like_one(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_APPLICATION_ID_OFFSET + 4)
    return start.startswith(_SQLITE_MAGIC) and start[_APPLICATION_ID_OFFSET:] == struct.pack(">I", APPLICATION_ID)


def _when(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _failed(error: RecordingError, console: Console) -> int:
    damaged = isinstance(error, DamagedRecording)
    _say(console, with_advice(error) if damaged else f"not read: {error}", "bold red")
    return DAMAGED if damaged else NOT_READ


def _say(console: Console, sentence: str, style: str) -> None:
    console.print(Text(sentence, style), soft_wrap=True, highlight=False)
