"""The commands `instep recordings info|repair|cut`."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from instep.recording.database import bytes_on_disk, lost_tail
from instep.recording.errors import DamagedRecording, RecordingError, UnavailableRecording, with_advice
from instep.recording.inspection import facts, inspect, look_over, recordings_in, when
from instep.recording.lock import check_not_written, is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.repair import cut, repair
from instep_tools.terminal import say
from instep_tools.words import counted, printable

DONE: Final = 0
DAMAGED: Final = 1
NOT_DONE: Final = 2


def info(place: Path, console: Console, *, json: bool = False) -> int:
    """Summarize a recording without reading all of it, or each recording in a folder.

    Returns:
        0; 1 if a recording is damaged; 2 if one in a folder cannot be read.

    Raises:
        RecordingError: when it cannot be read.
    """
    if not os.path.isdir(place):
        return _show(place, console, json=json)
    files = recordings_in(place)
    if not files:
        say(Console(stderr=True), f"{place} holds no recordings", "yellow")
    statuses = [DONE]
    for file in files:
        try:
            statuses.append(_show(file, console, json=json, name=str(file.relative_to(place))))
        except RecordingError as error:
            if json:
                write_json({"file": str(file), "error": str(error), "bytes": bytes_on_disk(file)})
            else:
                _print(console, f"{file.relative_to(place)}: {error}")
            statuses.append(DAMAGED if isinstance(error, DamagedRecording) else NOT_DONE)
    return max(statuses)


def _show(file: Path, console: Console, *, json: bool, name: str = "") -> int:
    found = look_over(file)
    if json:
        write_json(found)
    elif name:
        streams = f"{counted(found['streams'], 'stream')} ({found['open_streams']:,} open)"
        parts = f"{found['model']} from {found['began']}", streams, counted(found["frames"], "frame"), found["ends"]
        _print(console, f"{name}: {', '.join(parts)}; {found['bytes']:,} bytes")
    else:
        known = facts(found)
        width = max(map(len, known)) + 2
        for name, value in known.items():
            _print(console, f"{name:<{width}}{value}".rstrip())
    return DAMAGED if not is_being_written(file) and lost_tail(file) else DONE


def repair_file(file: Path, output: Path | None, console: Console) -> None:
    """Save everything before the first damage into a new file, next to the damaged one by default.

    Raises:
        RecordingError: when nothing could be saved.
    """
    target = output or file.with_name(f"{file.stem}.repaired{file.suffix}")
    check_not_written(file)
    try:
        inspect(file)
    except UnavailableRecording:
        raise
    except RecordingError:  # `repair` gives the reason where nothing can be saved
        found = repair(file, target)
        parts = (
            f"{target}: saved {counted(found.frames, 'frame')} of {counted(found.streams, 'stream')} "
            f"({counted(found.positions, 'position')})",
            f"left out: {found.left_out}" if found.left_out else "",
        )
        say(console, "; ".join(filter(None, parts)), "bold yellow")
    else:
        say(console, f"{file} is whole: nothing to repair, and nothing was written", "bold green")


def cut_file(file: Path, output: Path, begin: str | None, end: str | None, console: Console) -> None:
    """Write the rows between two times to a new file, and print a summary of it.

    Raises:
        RecordingError: when it was not written.
    """
    begin_ns, end_ns = (None if text is None else parse_time(text) for text in (begin, end))
    with RecordingReader(file) as reader:
        after = 0 if begin_ns is None else reader.first_at(begin_ns) - 1
        found = cut(reader, output, after, None if end_ns is None else reader.first_at(end_ns + 1) - 1)
    with RecordingReader(output) as reader:
        times = [when(reader.time_at(position)) for position in (found.first_position, found.last_position)]
    of = f"{counted(found.frames, 'frame')} of {counted(found.streams, 'stream')}"
    say(console, f"{output}: {of} of {file}, {' to '.join(times)}", "bold green")


def parse_time(text: str) -> int:
    """Nanoseconds since 1970 for `2026-11-26T18:30`, which is UTC unless it names an offset.

    Raises:
        RecordingError: when it is not a time.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise RecordingError(f"{text!r} is not a time like 2026-11-26T18:30 or 2026-11-26T18:30:05+01:00") from None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1e6) * 1000


def write_json(value: Any) -> None:
    """Write a line to standard output and flush it."""
    sys.stdout.write(jsonlib.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def write_failure(error: Exception, **about: Any) -> None:
    """Print the error of a command with --json: an object on stdout and the sentence on stderr."""
    sentence = with_advice(error)
    write_json({**about, "error": sentence})
    say(Console(stderr=True), sentence, "bold red")


def _print(console: Console, line: str) -> None:
    console.print(Text(printable(line)), soft_wrap=True, highlight=False)
