"""The commands `instep recordings info|repair|cut`."""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from instep.interrupts import Stopped
from instep.recording.copies import Bound, cut, repair
from instep.recording.database import bytes_on_disk, lost_tail
from instep.recording.errors import DamagedRecording, RecordingError, with_advice
from instep.recording.inspection import facts, inspect, look_over, recordings_in, when
from instep.recording.lock import is_being_written
from instep_tools.terminal import say
from instep_tools.words import COLUMNS, counted, printable

DONE: Final = 0
DAMAGED: Final = 1
NOT_DONE: Final = 2


def info(place: Path, console: Console, *, json: bool = False) -> int:
    """Say what a recording is, without reading all of it; of a folder, what each recording in it is.

    Returns:
        0, 1 where one is damaged, 2 where one cannot be read.
    """
    try:
        if not os.path.isdir(place):
            return _info_of_file(place, console, json=json)
        files = recordings_in(place)
    except RecordingError as error:
        if json:
            write_json({"file": str(place), "error": with_advice(error)})
        return _failed(error, Console(stderr=True) if json else console, "read")
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
    indent = max(map(len, known)) + 2
    columns = (console.width if console.is_terminal else COLUMNS) - indent
    for name, value in known.items():
        # A long word, such as a path, is cut on a terminal only.
        lines = textwrap.wrap(value, columns, break_long_words=console.is_terminal, break_on_hyphens=False) or [""]
        for label, line in zip_longest([name], lines, fillvalue=""):
            _print(console, f"{label:<{indent}}{line}")
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


def repair_file(file: Path, output: Path | None, console: Console) -> int:
    """Save everything before the first damage into a new file, next to the damaged one by default.

    Returns:
        0 when frames or states were saved, or nothing is damaged; 2 when nothing could be saved.
    """
    target = output or file.with_name(f"{file.stem}.repaired{file.suffix}")
    try:
        if _is_whole(file):
            say(console, f"{file} is whole: nothing to repair, and nothing was written", "bold green")
            return DONE
        found = repair(file, target)
    except RecordingError as error:
        return _failed(error, console, "repaired")
    kept = (
        f"{target}: saved {counted(found.frames, 'frame')} of {counted(found.streams, 'stream')} "
        f"({counted(found.positions, 'position')})"
    )
    say(console, f"{kept}; left out: {found.left_out}" if found.left_out else kept, "bold yellow")
    return DONE


def _is_whole(file: Path) -> bool:
    try:
        inspect(file)
    except RecordingError:
        return False  # `repair` gives the reason where nothing can be saved
    return True


def cut_file(file: Path, output: Path, begin: str | None, end: str | None, console: Console) -> int:
    """Write a range of a recording to a new file and sum it up.

    Returns:
        0 when it was written, 1 when the recording is damaged, 2 when it was not written for another reason.
    """
    try:
        bounds = [None if text is None else Bound.parse(text) for text in (begin, end)]
        found = cut(file, output, *bounds)
    except RecordingError as error:
        return _failed(error, console, "cut")
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
    return DONE


def _failed(error: RecordingError, console: Console, what: str) -> int:
    is_damaged = isinstance(error, DamagedRecording)
    say(console, with_advice(error) if is_damaged else f"not {what}: {with_advice(error)}", "bold red")
    return DAMAGED if is_damaged else NOT_DONE


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
    console.print(Text(printable(line)), soft_wrap=True, highlight=False)
