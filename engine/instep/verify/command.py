"""The command `instep verify`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from instep.recording.commands import facts, write_json
from instep.recording.errors import RecordingError, with_advice
from instep.recording.inspection import look_over
from instep.recording.reader import RecordingReader
from instep.verify import verifier
from instep.verify.conditions import recorded_model
from instep.verify.follow_command import Following
from instep.verify.render import render
from instep.verify.report import CannotVerify
from instep_tools.page import check_report_path, write_page
from instep_tools.problems import BadFile

VERIFIED: Final = 0
MISMATCH: Final = 1
NOT_CHECKED: Final = 2


def run(
    file: Path,
    *,
    model_folder: Path | None,
    streams: Sequence[str],
    json: bool,
    console: Console,
    page: Path | None = None,
) -> int:
    """Verify a recording and print the result.

    Args:
        file: the recording.
        model_folder: the model; None for where the recording says.
        streams: names or numbers of the streams to check; none for all.
        json: write one JSON object to standard output and nothing else.
        console: where everything else goes.
        page: an HTML page to write as well.

    Returns:
        The exit status: 0 only when everything was checked and matched, 1 on a mismatch, 2 when something could not be
        checked, or the page not be written although everything matched.
    """

    def verified() -> int:
        if page is not None:
            check_report_path(page)
        with (
            RecordingReader(file) as reader,
            _progress(console, is_shown=console.is_terminal and not json) as on_progress,
        ):
            model = recorded_model(reader.header, model_folder)
            report = verifier.verify(reader, model, streams, on_progress)
        if json:
            write_json(report.as_json())
        else:
            render(report, console)
        status = MISMATCH if report.mismatches else VERIFIED if report.verified else NOT_CHECKED
        if page is not None:
            from instep.verify.page import verify_page

            try:
                write_page(page, verify_page(report, facts(look_over(file))))
            except (BadFile, RecordingError) as error:  # the result was printed
                Console(stderr=True).print(Text(str(error), "bold red"), soft_wrap=True)
                return status or NOT_CHECKED
            if not json:
                console.print(Text(f"report in {page}"), soft_wrap=True)
        return status

    return _status(file, json, console, verified)


def follow(
    file: Path, *, model_folder: Path | None, streams: Sequence[str], json: bool, for_s: float, console: Console
) -> int:
    """Verify a recording while it is written, until Ctrl-C or for some seconds; arguments and status as of `run`."""

    def followed() -> int:
        following = Following(file, model_folder, streams)
        verdict = following.in_json(for_s, write_json) if json else following.in_words(for_s, console)
        return MISMATCH if verdict == "mismatch" else NOT_CHECKED if verdict == "not checked" else VERIFIED

    return _status(file, json, console, followed)


def _status(file: Path, json: bool, console: Console, check: Callable[[], int]) -> int:
    """The exit status of a check, whatever it raises."""
    try:
        return check()
    except (RecordingError, CannotVerify, BadFile) as error:
        if json:
            write_json({"file": str(file), "verified": False, "verdict": "not checked", "error": with_advice(error)})
        else:
            console.print(Text(f"not checked: {with_advice(error)}", "bold red"), soft_wrap=True)
        return NOT_CHECKED
    except BrokenPipeError:
        raise
    except Exception:  # a bug, or no memory: Python's own exit status, 1, would say that something differs
        traceback.print_exc()
        return NOT_CHECKED


@contextmanager
def _progress(console: Console, *, is_shown: bool) -> Iterator[verifier.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bars:
        tasks = {stage: bars.add_task(stage, total=1.0) for stage in verifier.STAGES}
        yield lambda stage, share: bars.update(tasks[stage], completed=share)
