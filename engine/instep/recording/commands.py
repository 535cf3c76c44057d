"""The commands of `instep recordings`: check, info, list, repair, cut."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from instep.interrupts import Stopped, stop_no_more
from instep.recording.cut import Bound, cut
from instep.recording.database import bytes_on_disk
from instep.recording.errors import DamagedRecording, RecordingError, with_advice
from instep.recording.inspection import Inspection, Overview, inspect, list_recordings, look_over, when
from instep.recording.repair import repair as save
from instep_tools.terminal import say, show_progress
from instep_tools.words import COLUMNS, counted

WHOLE: Final = 0
DAMAGED: Final = 1
NOT_READ: Final = 2

_HEADINGS: Final = ("file", "began (UTC)", "model", "ends", "streams", "open", "frames", "MB")
_RIGHT: Final = [_HEADINGS.index(name) for name in ("streams", "open", "frames", "MB")]
"""The columns of numbers."""


def check(file: Path, console: Console, *, json: bool = False) -> int:
    """Read all of a recording and say in one line whether it is whole.

    Returns:
        0 when it is, 1 when it is damaged, 2 when it cannot be read.
    """
    try:
        with show_progress("checking") as on_progress:
            found = inspect(file, partial(on_progress, "checking"))
    except RecordingError as error:
        return _failed(file, error, console, "whole", json=json)
    if json:
        write_json({"file": str(file), "whole": True, **asdict(found)})
    else:
        say(console, f"whole: {_holds(found)}", "bold green")
    return WHOLE


def info(file: Path, console: Console, *, json: bool = False) -> int:
    """Say what a recording is, without reading all of it."""
    try:
        found = look_over(file)
    except RecordingError as error:
        return _failed(file, error, console, "read", json=json)
    if json:
        write_json(asdict(found))
        return WHOLE
    known, is_shown = facts(found), console.is_terminal
    indent = max(map(len, known)) + 2
    columns = (console.width if is_shown else COLUMNS) - indent
    for name, value in known.items():
        # A long word, such as a path, is cut on a terminal only.
        lines = textwrap.wrap(value, columns, break_long_words=is_shown, break_on_hyphens=False) or [""]
        for label, line in zip_longest([name], lines, fillvalue=""):
            _print(console, f"{label:<{indent}}{line}")
    return WHOLE


def list_folder(folder: Path, console: Console, *, json: bool = False) -> int:
    """List the recordings of a folder, each in one line."""
    try:
        found = list_recordings(folder)
    except RecordingError as error:
        return _failed(folder, error, console, "read", json=json)
    if json:
        write_json([_as_json(path, listed) for path, listed in found.items()])
    elif found:
        _in_columns(console, [_HEADINGS, *(_line(path, listed) for path, listed in found.items())])
    else:
        say(console, f"{folder} holds no recordings", "yellow")
    return WHOLE


def repair(file: Path, output: Path | None, console: Console, *, json: bool = False) -> int:
    """Save everything before the first damage into a new file, next to the damaged one by default.

    Returns:
        0 when frames or states were saved, or nothing is damaged; 2 when nothing could be saved.
    """
    try:
        if _is_whole(file):
            stop_no_more()
            if json:
                write_json({"file": str(file), "repaired": False, "whole": True, "output": None})
            else:
                say(console, f"{file} is whole: nothing to repair, and nothing was written", "bold green")
            return WHOLE
        target = output or file.with_name(f"{file.stem}.repaired{file.suffix}")
        found = save(file, target)
    except RecordingError as error:
        return _failed(file, error, console, "repaired", json=json)
    except Stopped as stop:
        say_stopped(stop, f"not repaired: {stop}, and nothing was written", **_not_done(file, "repaired", json=json))
        raise
    if json:
        write_json({"file": str(file), "repaired": True, "whole": False, "output": str(target), **asdict(found)})
        return WHOLE
    kept = (
        f"{target}: saved {counted(found.frames, 'frame')} of {counted(found.streams, 'stream')} "
        f"({counted(found.positions, 'position')})"
    )
    say(console, f"{kept}; left out: {found.left_out}" if found.left_out else kept, "bold yellow")
    return WHOLE


def cut_out(
    file: Path, output: Path, begin: str | None, end: str | None, console: Console, *, json: bool = False
) -> int:
    """Write a range of a recording to a new file and sum it up.

    Returns:
        0 when it was written, 1 when the recording is damaged, 2 when it was not written for another reason.
    """
    try:
        bounds = [None if text is None else Bound.parse(text) for text in (begin, end)]
        found = cut(file, output, *bounds)
    except RecordingError as error:
        return _failed(file, error, console, "cut", json=json)
    except Stopped as stop:
        say_stopped(stop, f"not cut: {stop}, and nothing was written", **_not_done(file, "cut", json=json))
        raise
    if json:
        write_json({"file": str(file), "cut": True, "output": str(output), **asdict(found)})
        return WHOLE
    say(
        console,
        f"{output}: positions {found.first_position:,} to {found.last_position:,} of {file} "
        f"({when(found.first_ns)} to {when(found.last_ns)}), "
        f"{counted(found.frames, 'frame')} of {counted(found.streams, 'stream')}",
        "bold green",
    )
    if found.begins_early:
        say(
            console,
            "it begins earlier than --from, because a range can begin only where the recording does, or at a "
            "checkpoint that was kept",
            "yellow",
        )
    return WHOLE


def _is_whole(file: Path) -> bool:
    try:
        inspect(file, lambda _: None)
    except RecordingError:
        return False  # `repair` gives the reason where nothing can be saved
    return True


def _holds(found: Inspection) -> str:
    parts = [
        f"{counted(found.streams, 'stream')} ({found.open_streams:,} open), {counted(found.frames, 'frame')}, "
        f"{counted(found.positions, 'position')}",
        found.ending,
    ]
    if found.unanswered:
        parts.append(f"{counted(found.unanswered, 'frame')} without outputs")
    if found.restarts:
        parts.append(counted(found.restarts, "restart"))
    if found.first_position > 1:
        parts.append(f"trimmed, it begins at position {found.first_position:,}")
    if found.checkpoint_position:
        parts.append(f"newest checkpoint at position {found.checkpoint_position:,}")
    return "; ".join(parts)


def facts(found: Overview) -> dict[str, str]:
    """A summary of a recording in words."""
    return {
        "file": found.file,
        "began": found.began,
        "ends": found.ends,
        "model": f"{found.model} ({found.features} → {found.outputs})",
        "model's place": found.model_folder,
        "fingerprint": found.fingerprint,
        "written by": f"instep {found.instep_version}",
        "durability": found.durability,
        "arithmetic": found.arithmetic,
        "streams": f"{found.streams:,}, {found.open_streams:,} of them open",
        "batches": f"{found.batches:,}, with {found.frames:,} frames",
        "history": found.trimmed or "from the beginning on",
        "restarts": f"{found.restarts:,}{' since then' if found.trimmed else ''}",
        "states": f"newest checkpoint at position {found.checkpoint_position:,}; a restart replays what comes after it"
        if found.checkpoint_position
        else "no checkpoint; a restart replays everything",
        "positions": f"{found.first_position:,} to {found.last_position:,}; each opening, batch, output, closing and "
        "event has one",
        "bytes": f"{found.bytes:,}",
    }


def _line(path: Path, found: Overview | str) -> list[str]:
    """A row of the list."""
    if isinstance(found, str):
        return [path.name, "", "", found, "", "", "", _megabytes(bytes_on_disk(path))]
    numbers = [f"{number:,}" for number in (found.streams, found.open_streams, found.frames)]
    began = found.began.removesuffix(" UTC").rpartition(":")[0]
    ends = found.ends.partition(":")[0].removesuffix(" in order")
    return [path.name, began, found.model, ends, *numbers, _megabytes(found.bytes)]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _as_json(path: Path, found: Overview | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"file": str(path), "error": found, "bytes": bytes_on_disk(path)}
    return asdict(found)


def _in_columns(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: a terminal folds long cells, a pipe gets each row as one line, however long."""
    if console.is_terminal:
        table = Table.grid(padding=(0, 2, 0, 0))
        for at in range(len(_HEADINGS)):
            table.add_column(justify="right" if at in _RIGHT else "left", no_wrap=at in _RIGHT, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if at in _RIGHT else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _print(console, "  ".join(cells).rstrip())


def _failed(file: Path, error: RecordingError, console: Console, what: str, *, json: bool) -> int:
    damaged = isinstance(error, DamagedRecording)
    if json:
        write_failure(error, **_not_done(file, what, json=json))
    else:
        said = f"not {what}" if what in ("repaired", "cut") else "not read"
        say(console, with_advice(error) if damaged else f"{said}: {error}", "bold red")
    return DAMAGED if damaged else NOT_READ


def _not_done(file: Path, what: str, *, json: bool) -> dict[str, Any]:
    """The fields that stand beside the error in a JSON object; none without `json`."""
    return {"file": str(file), what: False} if json else {}


def write_json(value: Any) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(jsonlib.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def write_failure(error: Exception, **about: Any) -> None:
    """Say why a command with --json failed: in an object on standard output, and in words on standard error."""
    sentence = with_advice(error)
    write_json({**about, "error": sentence})
    say(Console(stderr=True), sentence, "bold red")


def say_stopped(stop: Stopped, what: str, **about: Any) -> None:
    """Say on standard error that a signal has stopped a command; of what, in an object as well where some is given."""
    stop.is_told = True
    with contextlib.suppress(OSError):  # nobody is left to read it
        if about:
            write_json({**about, "error": what})
        say(Console(stderr=True), what, "bold red")


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True, highlight=False)
