"""The commands `instep recordings info|repair|cut`."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from instep.recording.copies import Bound, cut, repair
from instep.recording.database import bytes_on_disk, lost_tail
from instep.recording.errors import DamagedRecording, RecordingError, UnavailableRecording, with_advice
from instep.recording.inspection import facts, inspect, look_over, recordings_in, when
from instep.recording.lock import check_not_written, is_being_written
from instep_tools.terminal import say
from instep_tools.words import counted, printable

DONE: Final = 0
DAMAGED: Final = 1
NOT_DONE: Final = 2


def info(place: Path, console: Console, *, json: bool = False) -> int:
    """Say what a recording is, without reading all of it; of a folder, what each recording in it is.

    Returns:
        0, 1 where one is damaged, 2 where one of a folder cannot be read.

    Raises:
        RecordingError: when it cannot be read.
    """
    if not os.path.isdir(place):
        return _info_of_file(place, console, json=json)
    files = recordings_in(place)
    if not files:
        say(Console(stderr=True), f"{place} holds no recordings", "yellow")
    statuses = [_line_of_file(file, console, json=json) for file in files]
    return max(statuses, default=DONE)


def _info_of_file(file: Path, console: Console, *, json: bool) -> int:
    found = look_over(file)
    if json:
        write_json(found)
        return _status(file)
    known = facts(found)
    width = max(map(len, known)) + 2
    for name, value in known.items():
        _print(console, f"{name:<{width}}{value}".rstrip())
    return _status(file)


def _line_of_file(file: Path, console: Console, *, json: bool) -> int:
    """Print one of several recordings as a line, or as an object."""
    try:
        found = look_over(file)
        if json:
            write_json(found)
        else:
            streams = f"{counted(found['streams'], 'stream')} ({found['open_streams']:,} open)"
            parts = (
                f"{found['model']} from {found['began']}",
                streams,
                counted(found["frames"], "frame"),
                found["ends"],
            )
            _print(console, f"{file.name}: {', '.join(parts)}; {found['bytes']:,} bytes")
        return _status(file)
    except RecordingError as error:
        if json:
            write_json({"file": str(file), "error": str(error), "bytes": bytes_on_disk(file)})
        else:
            _print(console, f"{file.name}: {error}")
        return DAMAGED if isinstance(error, DamagedRecording) else NOT_DONE


def _status(file: Path) -> int:
    """Of a recording that was read: its WAL may have lost commits."""
    return DAMAGED if not is_being_written(file) and lost_tail(file) else DONE


def repair_file(file: Path, output: Path | None, console: Console) -> None:
    """Save everything before the first damage into a new file, next to the damaged one by default.

    Raises:
        RecordingError: when nothing could be saved.
    """
    target = output or file.with_name(f"{file.stem}.repaired{file.suffix}")
    if _is_whole(file):
        say(console, f"{file} is whole: nothing to repair, and nothing was written", "bold green")
        return
    found = repair(file, target)
    kept = (
        f"{target}: saved {counted(found.frames, 'frame')} of {counted(found.streams, 'stream')} "
        f"({counted(found.positions, 'position')})"
    )
    say(console, f"{kept}; left out: {found.left_out}" if found.left_out else kept, "bold yellow")


def _is_whole(file: Path) -> bool:
    check_not_written(file)
    try:
        inspect(file)
    except UnavailableRecording:
        raise
    except RecordingError:
        return False  # `repair` gives the reason where nothing can be saved
    return True


def cut_file(file: Path, output: Path, begin: str | None, end: str | None, console: Console) -> None:
    """Write a range of a recording to a new file and sum it up.

    Raises:
        RecordingError: when it was not written.
    """
    bounds = [None if text is None else Bound.parse(text) for text in (begin, end)]
    found = cut(file, output, *bounds)
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


def write_json(value: Any) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(jsonlib.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def write_failure(error: Exception, **about: Any) -> None:
    """Say why a command with --json failed: in an object on standard output, and in words on standard error."""
    sentence = with_advice(error)
    write_json({**about, "error": sentence})
    say(Console(stderr=True), sentence, "bold red")


def _print(console: Console, line: str) -> None:
    console.print(Text(printable(line)), soft_wrap=True, highlight=False)
