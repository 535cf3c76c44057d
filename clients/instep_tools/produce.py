"""`instep produce`: sends lines or a file's frames live."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import Refused, StreamRefused
from instep_client.protocol.wire import F32, ServerInfo
from instep_tools.connect import Target, connected, may_give_up
from instep_tools.formats.columns import Choice, output_columns
from instep_tools.formats.read import read_sequences
from instep_tools.formats.write import SavedOutputs, check_output_path
from instep_tools.live import ALL_ENDED, LiveRun, Pace, read_lines, why_not_opened
from instep_tools.outputs import Answers, OutputFormat, Outputs, PrintedOutputs, SentFrames
from instep_tools.pacing import Clock, Stop
from instep_tools.plan import Send, check_fits, distinct, make_plan
from instep_tools.plan_run import PlanRun
from instep_tools.problems import BadFile, CommandProblem, Exit, is_special, reads_or_writes
from instep_tools.sequences import RecordedSequences
from instep_tools.terminal import Terminal, progress, show_progress
from instep_tools.words import counted


@dataclass(frozen=True, slots=True)
class Produce:
    """The options of the command."""

    target: Target
    pace: Pace
    file: Path | None = None
    """A file of frames; None for lines from standard input."""
    choice: Choice = field(default_factory=Choice)
    """The columns and streams of the file to send."""
    name: str | None = None
    """The stream's name, or the prefix of several names; None for the names in the file."""
    save: Path | None = None
    """The file for outputs; None to print them."""
    format: OutputFormat | None = None
    """The format of printed outputs; None for CSV."""


async def produce(what: Produce, terminal: Terminal, stop: Stop, clock: Clock) -> Exit:
    """Send until the input ends, the server has ended all streams, or a stop; then close and report.

    Raises:
        InstepError: as the client does.
        CommandProblem: when a file cannot be used, or does not fit the model.
    """
    if what.save is not None:
        check_output_path(what.save)
    if what.format is not None and (what.save is not None or terminal.as_json):
        raise CommandProblem("--format is for outputs that are printed; with --save and --json they are not")
    by_lines = what.file is None or is_special(what.file)
    sequences = None
    if what.file is not None and not by_lines:
        with show_progress(f"reading {what.file}") as on_progress:
            sequences = read_sequences(what.file, what.choice, on_progress)
    if sequences is not None and what.pace.frames is not None:
        places = np.arange(len(sequences.frames)) - np.repeat(sequences.starts, sequences.lengths)
        sequences = sequences.keep(places < what.pace.frames)
    with ExitStack() as stack:
        descriptor = _descriptor(what.file, stack) if by_lines else -1
        async with connected(what.target, "produce", terminal, stop) as client:
            answers = Answers(_outputs(what, terminal, stop, client.info, stack), terminal)
            live = LiveRun(client, what.pace, answers, terminal, stop, clock)
            started = clock.now()
            streams = 0
            try:
                with may_give_up(stop):
                    if sequences is not None:
                        streams = len(sequences)
                        live.all_ended = await _send_sequences(what, client, sequences, answers, terminal, stop, clock)
                    else:
                        name = what.name or f"produce-{os.getpid()}"
                        with _progress(what, terminal, answers):
                            streams = await live.send_lines(read_lines(descriptor, stop), name, what.choice)
            except StreamRefused as refused:
                raise CommandProblem(why_not_opened(refused)) from None
            seconds = clock.now() - started
    if by_lines and not (answers.frames or answers.refused or live.bad_lines or stop.requested):
        raise BadFile(f"there are no frames {'on standard input' if what.file is None else f'in {what.file}'}")
    if live.all_ended:
        terminal.error(ALL_ENDED)
    return _report(what, terminal, stop, answers, live, streams, seconds)


def _report(
    what: Produce, terminal: Terminal, stop: Stop, answers: Answers, live: LiveRun, streams: int, seconds: float
) -> Exit:
    good = not (live.bad_lines or answers.refused or live.all_ended or stop.gave_up)
    rate = answers.frames / seconds if seconds > 0 else 0.0
    if terminal.as_json:
        terminal.result(
            {
                "streams": streams,
                "frames": answers.frames,
                "refused_frames": answers.refused,
                "bad_lines": live.bad_lines,
                "seconds": seconds,
                "saved": None if what.save is None else str(what.save),
                "stopped": stop.requested,
                "all_streams_ended": live.all_ended,
            }
        )
    terminal.summary(
        f"{counted(answers.frames, 'frame')} of {counted(streams, 'stream')} sent and answered in {seconds:.1f} s "
        f"({rate:,.1f} frames/s)"
        f"{', ' + counted(live.bad_lines, 'bad line') if live.bad_lines else ''}"
        f"{', ' + counted(answers.refused, 'frame') + ' refused' if answers.refused else ''}"
        f"{f'; {stop.words}' if stop.requested else ''}"
        f"{'' if what.save is None else f'; saved in {what.save}'}",
        good=good,
    )
    return Exit.OK if good else Exit.FOUND_PROBLEMS


def _descriptor(file: Path | None, stack: ExitStack) -> int:
    if file is None:
        return sys.stdin.fileno()
    with reads_or_writes(file, "read"):
        return stack.enter_context(file.open("rb", buffering=0)).fileno()


def _outputs(what: Produce, terminal: Terminal, stop: Stop, info: ServerInfo, stack: ExitStack) -> Outputs:
    if what.save is not None:
        return stack.enter_context(SavedOutputs(what.save, info))

    def write(text: str) -> None:
        if not terminal.as_json and not terminal.write(text):  # nobody reads any more
            stop.request()

    terminal.data_on_stdout = True
    return PrintedOutputs(write, what.format or OutputFormat.CSV, output_columns(info, info.outputs))


async def _send_sequences(
    what: Produce,
    client: AsyncClient,
    sequences: RecordedSequences,
    answers: Answers,
    terminal: Terminal,
    stop: Stop,
    clock: Clock,
) -> bool:
    """Send all sequences; returns whether the server ended all streams before the end."""
    assert what.file is not None
    check_fits(what.file, sequences, client.info)
    plan = make_plan(sequences, what.pace.speed, what.pace.rate_hz, client.info, what.file)
    names = distinct(sequences.names)
    if what.name is not None:
        names = [what.name] if len(names) == 1 else [f"{what.name}-{row}" for row in range(len(names))]

    def take(block: Send, result: F32 | Refused) -> None:
        members = plan.cohorts[block.cohort][block.rows]
        sent = SentFrames(tuple(names[member] for member in members), sequences.frames[block.flat])
        answers.take(sent, result)

    run = PlanRun(client, plan, names, take, stop, clock)
    with _progress(what, terminal, answers, len(sequences.frames), run):
        await run.run()
    return run.all_ended


def _progress(
    what: Produce, terminal: Terminal, answers: Answers, total: float = inf, run: PlanRun | None = None
) -> AbstractContextManager[None]:
    """A progress display, unless outputs are printed, which show progress themselves."""
    if what.save is None:
        return nullcontext()
    return progress(
        terminal.err, "sending", total, "frames", lambda: answers.frames, None if run is None else run.waits
    )
