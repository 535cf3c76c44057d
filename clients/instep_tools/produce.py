"""`instep-client produce`: a live producer of lines, files or generated signals."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import Refused, StreamRefused
from instep_client.protocol.wire import F32, ServerInfo
from instep_tools.connect import Target, connected, may_give_up
from instep_tools.feed import read_lines
from instep_tools.formats.columns import Choice, output_columns
from instep_tools.formats.read import holds_lines, read_sequences
from instep_tools.formats.write import SavedOutputs, check_output_path
from instep_tools.live import ALL_ENDED, LiveRun, Pace, why_not_opened
from instep_tools.outputs import Answers, OutputFormat, Outputs, PrintedOutputs, SentFrames
from instep_tools.pacing import Clock, Stop
from instep_tools.plan import Send, make_plan
from instep_tools.plan_run import PlanRun
from instep_tools.problems import BadFile, CommandProblem, Exit, reads_or_writes
from instep_tools.sequences import RecordedSequences
from instep_tools.signals import Signal, make_signal
from instep_tools.terminal import Terminal, progress
from instep_tools.words import counted


@dataclass(frozen=True, slots=True)
class Produce:
    """What to do."""

    target: Target
    pace: Pace
    file: Path | None = None
    """Any file of frames; None for the signal, or else lines from standard input."""
    choice: Choice = field(default_factory=Choice)
    """Which of its columns and streams."""
    signal: Signal | None = None
    streams: int | None = None
    """None: one; of a file that is not text one a sequence."""
    name: str | None = None
    """Streams are called NAME-0, NAME-1, …; None: as in the file, or else produce-PID-0, …"""
    save: Path | None = None
    """None: print the outputs."""
    format: OutputFormat | None = None
    """How outputs are printed; None for CSV, or JSON lines where the command's result is JSON, too."""


async def produce(what: Produce, terminal: Terminal, stop: Stop, clock: Clock) -> Exit:
    """Send until the input ends, enough was sent, the server ended all streams, or a stop; then close and report.

    Raises:
        InstepError: as the client does.
        CommandProblem: when a file cannot be used, or does not fit the model.
    """
    format = _checked(what, terminal)
    lines = what.signal is None and (what.file is None or holds_lines(what.file))
    sequences = None if lines or what.file is None else read_sequences(what.file, what.choice)
    with ExitStack() as stack:
        descriptor = _descriptor(what.file, stack) if lines else None
        async with connected(what.target, "produce", terminal, stop) as client:
            outputs = _outputs(what, format, terminal, stop, client.info, stack)
            answers = Answers(outputs, terminal)
            live = LiveRun(client, what.pace, answers, terminal, stop, clock)
            started = clock.now()
            streams = what.streams or 1
            with may_give_up(stop), _told_how_to_open():
                if descriptor is not None:
                    names = _names(what.name, streams)
                    with _progress(what, terminal, answers, math.inf):
                        streams = await live.send_lines(read_lines(descriptor, stop), names, what.choice)
                elif sequences is not None:
                    sequences = _repeated(sequences, what)
                    streams = len(sequences)
                    live.all_ended = await _send_sequences(what, client, sequences, answers, terminal, stop, clock)
                else:
                    signal = make_signal(what.signal or Signal.SINE, streams, client.info.features)
                    with _progress(what, terminal, answers, (what.pace.frames or math.inf) * streams):
                        await live.send_signal(_names(what.name, streams), signal)
            seconds = clock.now() - started
    if lines and not (answers.frames or answers.refused or live.bad_lines or stop.requested):
        raise BadFile(f"there are no frames {'on standard input' if what.file is None else f'in {what.file}'}")
    if live.all_ended:
        terminal.error(ALL_ENDED)
    return _report(what, terminal, stop, answers, live, streams, seconds)


@contextmanager
def _told_how_to_open() -> Iterator[None]:
    try:
        yield
    except StreamRefused as refused:
        raise CommandProblem(why_not_opened(refused)) from None


def _report(
    what: Produce, terminal: Terminal, stop: Stop, answers: Answers, live: LiveRun, streams: int, seconds: float
) -> Exit:
    good = not (live.bad_lines or answers.refused or live.all_ended or stop.gave_up)
    rate = answers.frames / seconds if seconds > 0 else 0.0
    file = answers.outputs if isinstance(answers.outputs, SavedOutputs) else None
    is_saved = file is None or not file.has_failed
    if terminal.as_json:
        terminal.result(
            {
                "streams": streams,
                "frames": answers.frames,
                "refused_frames": answers.refused,
                "bad_lines": live.bad_lines,
                "seconds": seconds,
                "saved": str(file.path) if file is not None and is_saved else None,
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
        f"{'' if file is None else f'; {file.outcome}'}",
        good=good and is_saved,
    )
    if not good:
        return Exit.FOUND_PROBLEMS
    return Exit.OK if is_saved else Exit.COULD_NOT_RUN


def _checked(what: Produce, terminal: Terminal) -> OutputFormat:
    """The format of printed outputs, after checking what does not go together."""
    if what.file is not None and what.signal is not None:
        raise CommandProblem("give a file or a signal, not both")
    if what.signal is not None and what.choice != Choice():
        raise CommandProblem("--named, --columns, --time and --only are for files and lines, not for a signal")
    if what.save is not None:
        if what.format is not None:
            raise CommandProblem(
                f"--format is for outputs that are printed; the name {what.save} says how to save them"
            )
        check_output_path(what.save)
    if terminal.as_json and what.format not in (None, OutputFormat.JSONL):
        raise CommandProblem(f"--json prints outputs as JSON lines: leave out --format {what.format}")
    return what.format or (OutputFormat.JSONL if terminal.as_json else OutputFormat.CSV)


def _descriptor(file: Path | None, stack: ExitStack) -> int:
    """Where the lines come from."""
    if file is None:
        return sys.stdin.fileno()
    with reads_or_writes(file, "read"):
        return stack.enter_context(file.open("rb", buffering=0)).fileno()


def _outputs(
    what: Produce, format: OutputFormat, terminal: Terminal, stop: Stop, info: ServerInfo, stack: ExitStack
) -> Outputs:
    if what.save is not None:
        return stack.enter_context(SavedOutputs(what.save, info, terminal.error, stop.request))

    def write(text: str) -> None:
        if not terminal.write(text):  # nobody reads any more
            stop.request()

    terminal.data_on_stdout = True
    return PrintedOutputs(write, format, output_columns(info, info.outputs))


def _repeated(sequences: RecordedSequences, what: Produce) -> RecordedSequences:
    """As many sequences as there are streams, the first again after the last, no longer than asked for."""
    if what.streams is not None:
        sequences = sequences.select([row % len(sequences) for row in range(what.streams)])
    if what.pace.frames is not None:
        places = np.arange(len(sequences.frames)) - np.repeat(sequences.starts, sequences.lengths)
        sequences = sequences.keep(places < what.pace.frames)
    return sequences


async def _send_sequences(
    what: Produce,
    client: AsyncClient,
    sequences: RecordedSequences,
    answers: Answers,
    terminal: Terminal,
    stop: Stop,
    clock: Clock,
) -> bool:
    """Send all of them; whether the server ended all streams before."""
    assert what.file is not None
    check_fits(what.file, sequences, client.info)
    plan = make_plan(sequences, what.pace.speed, what.pace.rate_hz, client.info, what.file)
    names = _names(what.name, len(sequences)) if what.name is not None else distinct(sequences.names)

    def take(block: Send, result: F32 | Refused) -> None:
        members = plan.cohorts[block.cohort][block.rows]
        sent = SentFrames(tuple(names[member] for member in members), sequences.frames[block.flat])
        answers.take(sent, result)

    run = PlanRun(client, plan, names, take, stop, clock)
    with _progress(what, terminal, answers, len(sequences.frames), run.waits):
        await run.run(math.inf if what.pace.seconds is None else what.pace.seconds)
    return run.all_ended


def check_fits(file: Path, sequences: RecordedSequences, info: ServerInfo) -> None:
    """Raise CommandProblem unless the frames have as many numbers as the model takes."""
    if sequences.features == info.features:
        return
    is_of_another = sequences.model not in (None, info.model) and sequences.fingerprint not in (None, info.fingerprint)
    of = f" was recorded with the model {sequences.model!r} and" if is_of_another else ""
    cure = ""
    if is_of_another:
        cure = f"; connect to a server of {sequences.model!r}, by --endpoint or --model"
    elif sequences.features > info.features:
        cure = "; choose columns with --columns"
    raise CommandProblem(
        f"{file}{of} has {sequences.features} numbers a frame, the model {info.model!r} takes {info.features}{cure}"
    )


def distinct(names: tuple[str, ...]) -> list[str]:
    """Names of streams that are open together: the second of a name is called NAME-2, and so on."""
    found: dict[str, None] = {}
    counts: dict[str, int] = {}
    for name in names:
        new = name
        while new in found:
            counts[name] = counts.get(name, 1) + 1
            new = f"{name}-{counts[name]}"
        found[new] = None
    return list(found)


def _names(name: str | None, streams: int) -> list[str]:
    prefix = f"produce-{os.getpid()}" if name is None else name
    return [f"{prefix}-{number}" for number in range(streams)]


def _progress(
    what: Produce, terminal: Terminal, answers: Answers, total: float, detail: Callable[[], str] | None = None
) -> AbstractContextManager[None]:
    """Where the outputs are printed they are the progress."""
    if what.save is None:
        return nullcontext()
    return progress(terminal.err, "sending", total, "frames", lambda: answers.frames, detail)
