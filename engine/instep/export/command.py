"""The command `instep export`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from json import dumps
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from instep.export import csv_file, mcap_file, npz_file, parquet_file
from instep.export.errors import CannotExport
from instep.export.new_file import new_file
from instep.export.table import FrameTable
from instep.recording.errors import RecordingError, with_advice
from instep.recording.reader import RecordingReader

Format: TypeAlias = Literal["parquet", "npz", "csv", "mcap"]

WRITERS: Final[dict[Format, Callable[[FrameTable, BinaryIO], None]]] = {
    "parquet": parquet_file.write,
    "npz": npz_file.write,
    "csv": csv_file.write,
    "mcap": mcap_file.write,
}
EXPORTED: Final = 0
NOT_EXPORTED: Final = 2
PATIENCE_S: Final = 2.0
"""A progress bar appears after so long."""
_STEP: Final = 0.002


def run(
    file: Path, *, format: Format | None, output: Path | None, streams: Sequence[str], json: bool, console: Console
) -> int:
    """Write a recording's frames and outputs into one file, and say what is in it.

    Args:
        file: the recording.
        format: of the output; None for what the output's suffix says, or parquet.
        output: the new file; None for the recording's name with the format's suffix.
        streams: names or numbers; empty for all.
        json: write one JSON object to standard output and nothing else.
        console: where everything else goes.

    Returns:
        The exit status: 0, or 2 when it could not be exported.
    """
    try:
        kind = _format_of(output) if format is None else format
        if output is not None and output.suffix.lower().removeprefix(".") in WRITERS.keys() - {kind}:
            raise CannotExport(
                f"the name {output.name!r} says another format than --format {kind}: leave one of them out"
            )
        path = output or file.with_suffix(f".{kind}")
        with RecordingReader(file) as reader, new_file(path) as target:
            with _progress(console, shown=console.is_terminal and not json) as on_progress:
                table = FrameTable(reader, streams, on_progress)
                WRITERS[kind](table, target)
            finished = reader.finished
    except (RecordingError, CannotExport) as error:
        if json:
            _write_json({"file": str(file), "exported": False, "error": with_advice(error)})
        else:
            console.print(Text(f"not exported: {with_advice(error)}", "bold red"), soft_wrap=True)
        return NOT_EXPORTED
    if json:
        _write_json(_as_json(file, path, kind, table, finished))
    else:
        console.print(Text(_summary(path, table, finished), "bold green"), soft_wrap=True, highlight=False)
    return EXPORTED


def _format_of(output: Path | None) -> Format:
    if output is None:
        return "parquet"
    for kind in WRITERS:
        if output.suffix.lower() == f".{kind}":
            return kind
    raise CannotExport(
        f"the name {output.name!r} says no format: let it end in .parquet, .npz, .csv or .mcap, or give --format"
    )


def _summary(path: Path, table: FrameTable, finished: bool) -> str:
    parts = [
        f"{path}: {_count(table.frames, 'frame')} of {_count(len(table.names), 'stream')}, "
        f"{_count(table.features, 'input')} and {_count(table.outputs, 'output')} each, {path.stat().st_size:,} bytes"
    ]
    if table.left_out:
        parts.append(f"left out {_count(table.left_out, 'frame')} whose outputs are not recorded")
    if not finished:
        parts.append("the recording was not closed: exported up to its last commit")
    return "; ".join(parts)


def _as_json(file: Path, path: Path, kind: Format, table: FrameTable, finished: bool) -> dict[str, object]:
    return {
        "file": str(file),
        "exported": True,
        "output": str(path),
        "format": kind,
        "frames": table.frames,
        "streams": len(table.names),
        "features": table.features,
        "outputs": table.outputs,
        "left_out": table.left_out,
        "finished": finished,
        "bytes": path.stat().st_size,
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _write_json(fields: dict[str, object]) -> None:
    sys.stdout.write(dumps(fields, allow_nan=False) + "\n")


@contextmanager
def _progress(console: Console, shown: bool) -> Iterator[Callable[[float], None]]:
    """A bar for what takes long; what is quick comes without one."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True)
    task = bars.add_task("exporting", total=1.0)
    began, drawn = time.monotonic(), 0.0
    with ExitStack() as stack:

        def on_progress(share: float) -> None:
            nonlocal drawn
            if not shown or share - drawn < _STEP:
                return
            drawn = share
            if not bars.live.is_started and time.monotonic() - began >= PATIENCE_S:
                stack.enter_context(bars)
            bars.update(task, completed=share)

        yield on_progress
