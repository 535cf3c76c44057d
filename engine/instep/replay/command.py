"""The command `instep verify`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from instep.models.portable.machine import host
from instep.recording.commands import write_failure, write_json
from instep.recording.database import SUFFIX
from instep.recording.errors import RecordingError, with_advice
from instep.recording.inspection import facts, look_over, recordings_in
from instep.recording.reader import RecordingReader
from instep.replay.recorded_model import recorded_model
from instep.replay.rendering import render, verify_page
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
    file: Path,
    *,
    model_folder: Path | None,
    streams: Sequence[str],
    json: bool,
    console: Console,
    page: Path | None = None,
    briefly: bool = False,
) -> int:
    """Verify a recording and print the result.

    Args:
        file: the recording.
        model_folder: the model; None for the recorded path.
        streams: names or numbers of the streams to check; none for all.
        json: write one JSON object to standard output and nothing else.
        console: prints everything else, except progress, which goes to standard error.
        page: an HTML page to write as well.
        briefly: print as few lines as possible, for one recording among several.

    Returns:
        The exit status: 0 if everything was checked and matched, 1 on a mismatch, 2 if something could not be checked
        or the page not be written. For one of several also `WITHOUT_FRAMES`.
    """
    prefix = f"{file}: " if briefly else ""
    if not briefly:
        _say_if_slow()
    try:
        if page is not None:
            check_report_path(page)
        title = f"{file.name}: verifying" if briefly else "verifying"
        with RecordingReader(file) as reader, show_progress(title) as show:
            report = verify(reader, recorded_model(reader.header, model_folder), streams, show)
        if json:
            write_json(report.as_json())
        else:
            render(report, console, briefly=briefly)
        status = MISMATCH if report.mismatches else VERIFIED if report.verified else NOT_CHECKED
        return status if page is None else _write_page(page, report, status, None if json else console)
    except NoFrames as error:
        if not briefly:
            return _failed(file, json, console, error)
        if json:
            write_json({"file": str(file), "verified": False, "verdict": "empty", "reason": str(error)})
        else:
            say(console, f"{file}: empty: it holds no frames", "dim")
        return WITHOUT_FRAMES
    except (RecordingError, CannotVerify, BadFile) as error:
        return _failed(file, json, console, error, prefix)
    except BrokenPipeError:
        raise
    except Exception as error:  # a bug, or no memory: Python's own exit status, 1, would say that something differs
        with suppress(OSError):
            traceback.print_exc()
        return _failed(file, json, console, CannotVerify(repr(error)), prefix)


def run_all(
    places: Sequence[Path], *, model_folder: Path | None, streams: Sequence[str], json: bool, console: Console
) -> int:
    """Verify several recordings, and those in folders, one after another; print a line for each and a summary.

    Returns:
        The exit status: 1 if any recording has a mismatch, else 2 if any could not be checked or none has frames, else
        0. Recordings without frames do not count.
    """
    found: list[Path] = []
    for place in places:
        try:
            files = recordings_in(place) if os.path.isdir(place) else [place]
            if not files:
                raise RecordingError(f"{place} holds no recordings: no file there is named *{SUFFIX} or begins as one")
        except RecordingError as error:
            return _failed(place, json, console, error)
        found += files
    _say_if_slow()
    every = list(dict.fromkeys(found))
    options: dict[str, Any] = {"model_folder": model_folder, "streams": streams, "json": json, "console": console}
    statuses = [run(file, **options, briefly=True) for file in every]
    good, differing, unchecked, empty = map(statuses.count, (VERIFIED, MISMATCH, NOT_CHECKED, WITHOUT_FRAMES))
    status = MISMATCH if differing else NOT_CHECKED if unchecked or not good else VERIFIED
    if not json:
        without = f", {empty:,} empty" if empty else ""
        if status == VERIFIED:
            say(console, f"verified: {counted(good, 'recording')}{without}", "bold green")
        else:
            parts = f"{good:,} verified, {differing:,} with a mismatch, {unchecked:,} not checked{without}"
            say(console, f"not verified: {counted(len(every), 'recording')}, {parts}", "bold red")
    return status


def _write_page(page: Path, report: Report, status: int, console: Console | None) -> int:
    try:
        write_page(page, verify_page(report, facts(look_over(report.file))))
    except (BadFile, RecordingError) as error:  # the result was printed
        say(Console(stderr=True), str(error), "bold red")
        return status or NOT_CHECKED
    if console is not None:
        say(console, f"report in {page}")
    return status


def _say_if_slow() -> None:
    if not host().has_fma:
        sentence = "this processor has no fused multiply-adds (FMA): computing again takes 7 to 30 times as long"
        say(Console(stderr=True), sentence, "yellow")


def _failed(file: Path, json: bool, console: Console, error: Exception, prefix: str = "") -> int:
    with suppress(OSError):  # the terminal may be gone
        if json:
            write_failure(error, file=str(file), verified=False, verdict="not checked")
        else:
            say(console, f"{prefix}not checked: {with_advice(error)}", "bold red")
    return NOT_CHECKED
