"""The command `instep verify`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from rich.console import Console

from instep.models.portable.machine import host
from instep.recording.commands import write_failure, write_json
from instep.recording.database import SUFFIX
from instep.recording.errors import RecordingError, with_advice
from instep.recording.inspection import facts, look_over, recordings_in
from instep.recording.reader import RecordingReader
from instep.replay.recorded_model import recorded_model
from instep.replay.rendering import Outcome, failure_verdict, render, verify_page
from instep.replay.report import CannotVerify, NoFrames, Report
from instep.replay.verifier import verify
from instep_tools.page import check_report_path, write_page
from instep_tools.problems import BadFile
from instep_tools.terminal import say, show_progress
from instep_tools.words import counted

VERIFIED: Final = 0
MISMATCH: Final = 1
NOT_CHECKED: Final = 2
WITHOUT_FRAMES: Final = -1
"""The result for a recording without frames among several; it is not an exit status."""


def run(
    places: Sequence[Path],
    folder: Path | None,
    streams: Sequence[str],
    console: Console,
    *,
    json: bool = False,
    page: Path | None = None,
) -> int:
    """Verify recordings, one after another, and print the results.

    Args:
        places: recordings, and folders of recordings.
        folder: of the model; None for the recorded path.
        streams: names, patterns or numbers of the streams to check; none for all.
        console: prints everything except JSON, and except progress, which goes to standard error.
        json: write one JSON object for each recording to standard output and nothing else.
        page: an HTML page to write as well.

    Returns:
        The exit status: 1 if any recording has a mismatch, else 2 if any could not be checked, none has frames, or the
        page could not be written, else 0.
    """
    if not host().has_fma:
        sentence = "this processor has no fused multiply-adds (FMA): computing again takes 7 to 30 times as long"
        say(Console(stderr=True), sentence, "yellow")
    try:
        if page is not None:
            check_report_path(page)
    except BadFile as error:
        _print(places[0], error, console, json=json)
        return NOT_CHECKED
    files = dict(_recordings(places))
    is_one, found = list(files) == [places[0]], dict[Path, Outcome]()
    for file, unreadable in files.items():
        title = "verifying" if is_one else f"{file.name}: verifying"
        found[file] = unreadable or _verify(file, folder, streams, title)
        _print(file, found[file], console, json=json, briefly=not is_one)
    status, summary = _sum_up(found.values())
    if not is_one and not json:
        say(console, summary, "bold red" if status else "bold green")
    return status if page is None else _write_page(page, found, summary, status, None if json else console)


def _recordings(places: Sequence[Path]) -> Iterator[tuple[Path, RecordingError | None]]:
    """Each file, or a folder with the reason why no file can be named."""
    for place in places:
        try:
            files = recordings_in(place) if os.path.isdir(place) else [place]
            if not files:
                raise RecordingError(f"{place} holds no recordings: no file there is named *{SUFFIX} or begins as one")
            yield from ((file, None) for file in files)
        except RecordingError as error:
            yield place, error


def _verify(file: Path, folder: Path | None, streams: Sequence[str], title: str) -> Outcome:
    try:
        with RecordingReader(file) as reader, show_progress(title) as show:
            return verify(reader, recorded_model(reader.header, folder), streams, show)
    except (RecordingError, CannotVerify) as error:
        return error
    except BrokenPipeError:
        raise
    except Exception as error:  # a bug, or no memory: Python's own exit status, 1, would say that something differs
        with suppress(OSError):
            traceback.print_exc()
        return CannotVerify(repr(error))


def _print(file: Path, found: Outcome, console: Console, *, json: bool, briefly: bool = False) -> None:
    if isinstance(found, Report):
        if json:
            write_json(found.as_json())
        else:
            render(found, console, briefly=briefly)
        return
    verdict = failure_verdict(found)
    with suppress(OSError):  # the terminal may be gone
        if json:
            write_failure(found, file=str(file), verified=False, verdict=verdict)
        else:
            say(console, f"{f'{file}: ' if briefly else ''}{verdict}: {with_advice(found)}", "bold red")


def _status(found: Outcome) -> int:
    if isinstance(found, Report):
        return MISMATCH if found.mismatches else VERIFIED if found.verified else NOT_CHECKED
    return WITHOUT_FRAMES if isinstance(found, NoFrames) else NOT_CHECKED


def _sum_up(found: Iterable[Outcome]) -> tuple[int, str]:
    """The exit status and a sentence for all recordings."""
    statuses = [*map(_status, found)]
    good, differing, unchecked, empty = map(statuses.count, (VERIFIED, MISMATCH, NOT_CHECKED, WITHOUT_FRAMES))
    without = f", {empty:,} empty" if empty else ""
    if good and not differing and not unchecked:
        return VERIFIED, f"verified: {counted(good, 'recording')}{without}"
    parts = f"{good:,} verified, {differing:,} with a mismatch, {unchecked:,} not checked{without}"
    sentence = f"not verified: {counted(len(statuses), 'recording')}, {parts}"
    return MISMATCH if differing else NOT_CHECKED, sentence


def _write_page(page: Path, found: Mapping[Path, Outcome], summary: str, status: int, console: Console | None) -> int:
    try:
        known = {file: facts(look_over(file)) for file, each in found.items() if isinstance(each, Report)}
        write_page(page, verify_page(found, summary, known))
    except (BadFile, RecordingError) as error:  # the result was printed
        say(Console(stderr=True), str(error), "bold red")
        return status or NOT_CHECKED
    if console is not None:
        say(console, f"report in {page}")
    return status
