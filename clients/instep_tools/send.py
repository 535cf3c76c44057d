"""`instep send`: sends lines as they arrive, or a file's frames, and prints, saves or compares the outputs."""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import Refused, StreamRefused
from instep_client.protocol.wire import F32, ServerInfo
from instep_tools.command_line import CommandLine, positive
from instep_tools.comparison import ReplayComparison, compare
from instep_tools.connect import Target, connected, may_give_up
from instep_tools.formats.columns import Choice, output_columns
from instep_tools.formats.read import read_sequences
from instep_tools.formats.write import SavedOutputs, check_output_path, save_sequences
from instep_tools.outputs import Answers, OutputFormat, PrintedOutputs, SentFrames
from instep_tools.pacing import Clock, Pace, Stop, WallClock
from instep_tools.plan import Send, check_fits, distinct, make_plan
from instep_tools.plan_run import PlanRun
from instep_tools.problems import BadFile, CommandProblem, Exit, is_special, reads_or_writes
from instep_tools.sequences import RecordedSequences
from instep_tools.standard_input import LineSender, read_lines, why_not_opened
from instep_tools.terminal import Terminal, progress, show_progress
from instep_tools.words import counted

LONG_S: Final = 60.0
"""A file that takes longer than this in real time is announced."""
NAMED: Final = 3
"""The most streams named in a sentence."""
ALL_ENDED: Final = "the server has ended every stream, so nothing more is sent: run the command again to open new ones"

app: Final = CommandLine()


def _speed(text: str) -> float:
    if text == "max":
        return math.inf
    try:
        speed = float(text.strip("x×"))
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise typer.BadParameter("it must be 1 (real time), xN (N times as fast) or max (as fast as possible)")
    return speed


@app.server_command(
    "send",
    drains=True,
    examples=[
        "instep send sensor.csv --columns x,y,z --time at_s",
        "instep send today.instep --check --speed max",
        "instep send bag.mcap --streams /imu --output y.csv",
        "read-microphone | instep send --name mic --format jsonl",
    ],
)
async def send_command(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="A recording, Parquet, MCAP, NPZ, NPY, CSV or other text, or JSON lines. Without FILE, or with -, "
            "lines are read from standard input.",
        ),
    ] = None,
    named: Annotated[
        bool, typer.Option("--named", help="The first column of text or Parquet names the stream.")
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="The columns of the frame, or patterns: 'mfcc*'. (default: x0,x1,… or all)"),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The column of times. (default: time, time_ns or time_s)"),
    ] = None,
    streams: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only streams whose names match, as in 'mic-*'.")
    ] = "*",
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name the stream, or several NAME-0, NAME-1, … (default: as in the file)"),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            parser=_speed,
            metavar="1|xN|max",
            help="1: in real time; xN: N times as fast; max: as fast as possible. "
            "(default: 1 where the times are known, else max)",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="HZ", callback=positive, help="Frames per second for each stream, instead of the file's times."
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", min=1, help="The most frames of each stream.")] = None,
    format: Annotated[OutputFormat | None, typer.Option(help="How outputs are printed. (default: csv)")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save frames and outputs, instead of printing them: a .csv, .npz, .parquet or .mcap file.",
            dir_okay=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare the outputs with the file's, bit for bit, instead of printing them."),
    ] = False,
) -> Exit:
    """Send frames from lines or a file, and print, save or compare the outputs.

    A line is one frame: numbers separated by commas or white space, sent when it arrives. A bad line is reported on
    stderr and skipped, and the exit status is then 1. A file is read before its first frame is sent. Each of its
    sequences is a new stream with its name in the file, or with a suffix where the server has a stream of that name.

    Each output is printed as a line of stream, seq and values, or as JSON with its frame. With --json, only the result
    of the command is printed. Sending stops when the server has ended all streams.

    With --check the exit status is 0 when all outputs equal those in the file, 1 when one differs, and 2 when one
    could not be compared.
    """
    job = SendJob(
        target=target,
        pace=Pace(rate, frames, speed),
        file=None if file == Path("-") else file,
        choice=Choice(named, tuple(filter(None, map(str.strip, (columns or "").split(",")))), time, streams),
        name=name,
        output=output,
        format=format,
        check=check,
    )
    with WallClock() as clock:
        return await send(job, terminal, stop, clock)


@dataclass(frozen=True, slots=True)
class SendJob:
    """The options of the command."""

    target: Target
    pace: Pace = field(default_factory=Pace)
    file: Path | None = None
    """A file of frames; None for lines from standard input."""
    choice: Choice = field(default_factory=Choice)
    """The columns and streams of the file to send."""
    name: str | None = None
    """The stream's name, or the prefix of several names; None for the names in the file."""
    output: Path | None = None
    """The file for outputs; None to print them."""
    format: OutputFormat | None = None
    """The format of printed outputs; None for CSV."""
    check: bool = False
    """Whether to compare with the outputs in the file, instead of printing them."""

    def prints(self, terminal: Terminal) -> bool:
        """Whether outputs are printed."""
        return self.output is None and not self.check and not terminal.as_json


@dataclass(slots=True)
class SendResult:
    """What became of the frames."""

    info: ServerInfo
    answers: Answers
    streams: int = 0
    frames: int = 0
    """Frames to be sent: those of the file, or those of all lines."""
    sent: int = 0
    bad_lines: int = 0
    seconds: float = 0.0
    all_ended: bool = False
    """Whether sending stopped because the server had ended every stream."""
    is_saved: bool = False
    comparison: ReplayComparison | None = None
    """None if no comparison was requested."""

    @property
    def is_whole(self) -> bool:
        """Whether every frame was answered."""
        return self.answers.frames == self.frames


async def send(job: SendJob, terminal: Terminal, stop: Stop, clock: Clock) -> Exit:
    """Send until the input ends, the server has ended all streams, or a stop; then close and report.

    Raises:
        InstepError: as the client does.
        CommandProblem: when a file cannot be used, does not fit the model, or cannot be compared.
    """
    if job.output is not None:
        check_output_path(job.output)
        if job.file is not None and job.output.resolve() == job.file.resolve():
            raise CommandProblem(f"--output would replace {job.file}, which is sent: name another file")
    if job.format is not None and not job.prints(terminal):
        raise CommandProblem("--format is for outputs that are printed; with --output, --check and --json they are not")
    try:
        if job.file is None or is_special(job.file):
            if job.check:
                raise CommandProblem("--check compares with the outputs in a file, and lines have none: name a file")
            done = await _send_lines(job, terminal, stop, clock)
        else:
            done = await _send_file(job, job.file, terminal, stop, clock)
    except StreamRefused as refused:
        raise CommandProblem(why_not_opened(refused)) from None
    if done.all_ended:
        terminal.error(ALL_ENDED)
    return _report(job, terminal, stop, done)


async def _send_lines(job: SendJob, terminal: Terminal, stop: Stop, clock: Clock) -> SendResult:
    with ExitStack() as stack:
        if job.file is None:
            descriptor = sys.stdin.fileno()
        else:
            with reads_or_writes(job.file, "read"):
                descriptor = stack.enter_context(job.file.open("rb", buffering=0)).fileno()
        async with connected(job.target, "send", terminal, stop) as client:
            outputs = _printed(job, terminal, stop, client.info)
            saved = None if job.output is None else stack.enter_context(SavedOutputs(job.output, client.info))
            answers = Answers(saved or outputs, terminal)
            sender = LineSender(client, job.pace, answers, terminal, stop, clock)
            done, started = SendResult(client.info, answers), clock.now()
            with may_give_up(stop), _progress(job, terminal, answers):
                done.streams = await sender.send_lines(
                    read_lines(descriptor, stop), job.name or f"send-{os.getpid()}", job.choice
                )
            done.seconds = clock.now() - started
    if not (answers.frames or answers.refused or sender.bad_lines or stop.requested):
        raise BadFile(f"there are no frames {'on standard input' if job.file is None else f'in {job.file}'}")
    done.frames = done.sent = answers.frames + answers.refused
    done.bad_lines, done.all_ended, done.is_saved = (
        sender.bad_lines,
        sender.all_ended,
        saved is not None and saved.has_rows,
    )
    return done


async def _send_file(job: SendJob, file: Path, terminal: Terminal, stop: Stop, clock: Clock) -> SendResult:
    with show_progress(f"reading {file}") as on_progress:
        sequences = read_sequences(file, job.choice, on_progress)
    if job.pace.frames is not None:
        places = np.arange(len(sequences.frames)) - np.repeat(sequences.starts, sequences.lengths)
        sequences = sequences.keep(places < job.pace.frames)
    async with connected(job.target, "send", terminal, stop) as client:
        info = client.info
        _check_fits(job, file, sequences, info)
        plan = make_plan(sequences, job.pace.speed, job.pace.rate_hz, info, file)
        names = await _names(client, sequences, job.name)
        answers = Answers(_printed(job, terminal, stop, info), terminal)
        outputs = np.full((len(sequences.frames), info.outputs), np.nan, np.float32)
        answered = np.zeros(len(outputs), np.bool_)

        def take(block: Send, result: F32 | Refused) -> None:
            members = plan.cohorts[block.cohort][block.rows]
            sent = SentFrames(tuple(names[member] for member in members), sequences.frames[block.flat])
            applied, y = answers.take(sent, result)
            flat = block.flat[applied]
            outputs[flat], answered[flat] = y[applied], True

        run = PlanRun(client, plan, names, take, stop, clock)
        _announce(job.pace, sequences, terminal)
        done = SendResult(info, answers, len(sequences), len(sequences.frames))
        started = clock.now()
        try:
            with may_give_up(stop), _progress(job, terminal, answers, len(sequences.frames), run):
                await run.run()
        finally:
            done.seconds = clock.now() - started
            if job.output is not None and answered.any():
                done.is_saved = _save(job.output, replace(sequences, outputs=outputs).keep(answered), info, terminal)
    done.sent, done.all_ended = run.sent_frames, run.all_ended
    if job.check:
        done.comparison = compare(sequences, outputs, answered)
        _explain(sequences, done.comparison, terminal)
    return done


def _check_fits(job: SendJob, file: Path, sequences: RecordedSequences, info: ServerInfo) -> None:
    if job.check and sequences.outputs is None:
        raise CommandProblem(f"{file} holds no outputs to compare with: it has no columns y0, y1, …")
    if job.check and sequences.fingerprint is not None and sequences.fingerprint != info.fingerprint:
        other = "another model" if sequences.model in (None, info.model) else f"{sequences.model!r}, another model"
        raise CommandProblem(
            f"{file} was recorded with {other} than {info.model!r}, which the server runs "
            f"(fingerprints {sequences.fingerprint[:12]} and {info.fingerprint[:12]}): there is nothing to compare"
        )
    check_fits(file, sequences, info)
    if job.check and sequences.outputs is not None and sequences.outputs.shape[1] != info.outputs:
        raise CommandProblem(
            f"{file} has {sequences.outputs.shape[1]} outputs a frame, the model {info.model!r} gives {info.outputs}"
        )


async def _names(client: AsyncClient, sequences: RecordedSequences, name: str | None) -> Sequence[str]:
    """The streams' names: those given, or those in the file, with a suffix if the server has a stream of that name."""
    if name is not None:
        return [name] if len(sequences) == 1 else [f"{name}-{row}" for row in range(len(sequences))]
    taken = {stream.name for stream in await client.list_streams()}
    suffix = f"~{secrets.token_hex(4)}"
    return [each + suffix if each in taken else each for each in distinct(sequences.names)]


def _announce(pace: Pace, sequences: RecordedSequences, terminal: Terminal) -> None:
    """Say how long a file takes in real time, if that is long and nobody asked for it."""
    if pace.speed is not None or pace.rate_hz is not None or sequences.times_ns is None:
        return
    real_s = np.ptp(sequences.times_ns) / 1e9
    if real_s > LONG_S:
        minutes = counted(round(real_s / 60), "minute")
        terminal.note(f"sending in real time, which takes {minutes}; --speed max is as fast as possible")


def _printed(job: SendJob, terminal: Terminal, stop: Stop, info: ServerInfo) -> PrintedOutputs | None:
    if not job.prints(terminal):
        return None

    def write(text: str) -> None:
        if not terminal.write(text):  # nobody reads any more
            stop.request()

    terminal.data_on_stdout = True
    return PrintedOutputs(write, job.format or OutputFormat.CSV, output_columns(info, info.outputs))


def _progress(
    job: SendJob, terminal: Terminal, answers: Answers, total: float = math.inf, run: PlanRun | None = None
) -> AbstractContextManager[None]:
    """A progress display, unless outputs are printed, which show progress themselves."""
    if job.prints(terminal):
        return nullcontext()
    waits = None if run is None else run.waits
    return progress(terminal.err, "sending", total, "frames", lambda: answers.frames, waits)


def _save(path: Path, sequences: RecordedSequences, info: ServerInfo, terminal: Terminal) -> bool:
    """Save the answered frames with their states and times; a failure must not hide what the server has answered."""
    try:
        save_sequences(path, sequences, info)
    except CommandProblem as problem:
        terminal.error(str(problem))
        return False
    return True


def _explain(sequences: RecordedSequences, comparison: ReplayComparison, terminal: Terminal) -> None:
    """Say why frames cannot be compared, and where the first difference is."""
    if late := sequences.late:
        named = ", ".join(map(repr, late[:NAMED])) + (", …" if len(late) > NAMED else "")
        terminal.note(
            f"{counted(len(late), 'stream')} ({named}) {'begins' if len(late) == 1 else 'begin'} after the first "
            "frame, and the file does not hold the state there: the outputs cannot be compared"
        )
    if comparison.unrecorded:
        have = "has" if comparison.unrecorded == 1 else "have"
        terminal.note(
            f"{counted(comparison.unrecorded, 'frame')} {have} no output in the file, as when a server was killed "
            "before it recorded one, and cannot be compared"
        )
    if comparison.first is not None and not terminal.as_json:
        terminal.say(comparison.first.sentence())


def _report(job: SendJob, terminal: Terminal, stop: Stop, done: SendResult) -> Exit:
    answers, comparison = done.answers, done.comparison
    is_lost = job.output is not None and not done.is_saved
    if terminal.as_json:
        terminal.result(
            {
                "streams": done.streams,
                "frames": done.frames,
                "answered_frames": answers.frames,
                "refused_frames": answers.refused,
                "bad_lines": done.bad_lines,
                "seconds": done.seconds,
                "exactness": done.info.exactness,
                "saved": str(job.output) if done.is_saved else None,
                "stopped": stop.requested,
                "all_streams_ended": done.all_ended,
                "check": None if comparison is None else asdict(comparison),
            }
        )
    rate = answers.frames / done.seconds if done.seconds > 0 else 0.0
    parts = [
        f"{counted(answers.frames, 'frame')} of {counted(done.streams, 'stream')} in {done.seconds:.1f} s "
        f"({rate:,.1f} frames/s){f', {stop.words}' if stop.requested else ''}"
    ]
    parts += [counted(done.bad_lines, "bad line")] if done.bad_lines else []
    unanswered, unsent = done.sent - answers.frames - answers.refused, done.frames - done.sent
    parts += [f"{counted(answers.refused, 'frame')} refused"] if answers.refused else []
    parts += [f"{counted(unanswered, 'frame')} got no answer"] if unanswered else []
    parts += [f"{counted(unsent, 'frame')} {'was' if unsent == 1 else 'were'} not sent"] if unsent else []
    parts += [] if comparison is None else [comparison.sentence(done.info.exactness)]
    parts += [] if job.output is None else [f"{job.output} not written" if is_lost else f"saved in {job.output}"]
    status = _status(done, stop)
    terminal.summary("; ".join(parts), good=status is Exit.OK and not is_lost)
    return Exit.COULD_NOT_RUN if is_lost and status is Exit.OK else status


def _status(done: SendResult, stop: Stop) -> Exit:
    if (comparison := done.comparison) is not None:
        if comparison.different:
            return Exit.FOUND_PROBLEMS
        return Exit.OK if comparison.complete else Exit.COULD_NOT_RUN
    has_problems = done.bad_lines or done.answers.refused or done.all_ended or stop.gave_up
    return Exit.OK if not has_problems and (done.is_whole or stop.requested) else Exit.FOUND_PROBLEMS
