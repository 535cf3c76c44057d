"""The command `instep verify`."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from json import dumps
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from instep.models.errors import ModelError
from instep.recording.choice import Chosen, choose
from instep.recording.errors import NoSuchStream, RecordingError, with_advice
from instep.recording.joints import Following
from instep.recording.reader import RecordingReader
from instep.recording.records import StreamInfo
from instep.recording.select import select_streams
from instep.verify import verifier
from instep.verify.errors import CannotVerify
from instep.verify.model_source import recorded_model
from instep.verify.render import render, render_all
from instep.verify.report import Report, Reports
from instep.verify.ways import Ways

VERIFIED: Final = 0
MISMATCH: Final = 1
NOT_CHECKED: Final = 2

LINE_S: Final = 5.0
"""How often progress is told where it cannot be redrawn: in a file or a pipe."""


def run(
    wanted: Sequence[Path], *, model_folder: Path | None, streams: Sequence[str], json: bool, console: Console
) -> int:
    """Verify a recording, or some files of it, and say what was found.

    Args:
        wanted: files; the first of a recording alone means all that are there.
        model_folder: the model; None for where the recording says.
        streams: check only those of these names or numbers; none for all.
        json: write one JSON object to standard output and nothing else.
        console: where everything else goes.

    Returns:
        The exit status: 0 only when everything that is there was checked and matched, 1 on a mismatch, 2 when it could
        not be checked.
    """
    file = wanted[0]
    try:
        chosen = choose(wanted)
        with _bars(console) if console.is_terminal and not json else nullcontext(_lines()) as on_progress:
            reports = _verify(chosen, model_folder, streams, on_progress)
    except (RecordingError, CannotVerify) as error:
        if json:
            _write_json({"file": str(file), "verified": False, "verdict": "not checked", "error": with_advice(error)})
        else:
            console.print(Text(f"not checked: {with_advice(error)}", "bold red"), soft_wrap=True)
        return NOT_CHECKED
    except ModelError:
        raise
    except Exception:  # a bug, or no memory: Python's own status for it would say that something differs
        traceback.print_exc()
        return NOT_CHECKED
    if len(chosen.files) == 1 and chosen.is_complete:
        if json:
            _write_json({**reports.reports[0].as_json(), "not_looked_at": list(reports.notes)})
        else:
            render(reports.reports[0], console, reports.notes)
    elif json:
        _write_json(reports.as_json())
    else:
        render_all(reports, console)
    if reports.mismatches:
        return MISMATCH
    return VERIFIED if reports.is_complete else NOT_CHECKED


def _verify(
    chosen: Chosen, model_folder: Path | None, streams: Sequence[str], on_progress: verifier.Progress
) -> Reports:
    """Every file, and where the next one is there, the joint between them."""
    files, reports = chosen.files, list[Report]()
    if streams:
        select_streams(_opened(files), streams)
    is_alone = len(files) == 1
    found_before: dict[str, Ways] = {}
    for at, file in enumerate(files):

        def tell(stage: verifier.Stage, share: float, at: int = at) -> None:
            on_progress(stage, (at + share) / len(files))

        with RecordingReader(file) as reader:
            model = recorded_model(reader.header, model_folder)
            following = Following.after(file, files[at + 1]) if at + 1 < len(files) else None
            with suppress(NoSuchStream):  # it is in another file; this one was read, and is not damaged
                reports.append(
                    verifier.verify(
                        reader, model, streams, tell, following, is_alone=is_alone, found_before=found_before
                    )
                )
    if not sum(report.frames for report in reports) and not sum(report.mismatches for report in reports):
        whose = " of these streams" if streams else ""
        raise CannotVerify(f"no file holds frames with outputs{whose}: there is nothing to verify")
    return Reports(tuple(reports), chosen.notes, chosen.is_complete)


def _opened(files: Sequence[Path]) -> list[StreamInfo]:
    """What any of them says was opened."""
    opened: list[StreamInfo] = []
    for file in files:
        with RecordingReader(file) as reader:
            opened += reader.streams()
    return opened


def _write_json(fields: dict[str, object]) -> None:
    sys.stdout.write(dumps(fields, allow_nan=False) + "\n")


@contextmanager
def _bars(console: Console) -> Iterator[verifier.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {stage: bars.add_task(stage, total=1.0) for stage in verifier.STAGES}
        yield lambda stage, share: bars.update(tasks[stage], completed=share)


def _lines() -> verifier.Progress:
    """A line on standard error now and then."""
    began = told = time.monotonic()

    def tell(stage: verifier.Stage, share: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_S:
            told = now
            sys.stderr.write(f"{stage}: {share:.0%}, {now - began:.0f} s\n")
            sys.stderr.flush()

    return tell
