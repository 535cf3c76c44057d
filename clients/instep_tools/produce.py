"""`instep-client produce`: a live producer of lines, arrays or generated signals."""

from __future__ import annotations

import math
import os
import sys
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instep_client.protocol.wire import ServerInfo
from instep_tools.answers import Answers
from instep_tools.connect import connected
from instep_tools.feed import read_lines
from instep_tools.files import is_numpy, read_sequences
from instep_tools.live import ENDLESS, LiveRun, Pace, Source, array_source
from instep_tools.outputs import NoOutputs, Outputs, PrintedOutputs, open_outputs
from instep_tools.pacing import Clock, Stop
from instep_tools.problems import BadFile, CommandProblem, Exit
from instep_tools.sequences import RecordedSequences
from instep_tools.signals import Signal, make_signal
from instep_tools.terminal import Terminal
from instep_tools.words import counted


@dataclass(frozen=True, slots=True)
class Produce:
    """What to do."""

    endpoint: str
    pace: Pace
    file: Path | None = None
    """NPZ, NPY, or lines; None for the signal, or else lines from standard input."""
    signal: Signal | None = None
    streams: int | None = None
    """None: one; for arrays one a sequence."""
    name: str | None = None
    """Streams are called NAME-0, NAME-1, …; None: as the arrays in the file, or else produce-PID-0, …"""
    named: bool = False
    """The first column of a line names its stream."""
    save: Path | None = None
    """None: print the outputs."""


async def produce(what: Produce, terminal: Terminal, stop: Stop, clock: Clock) -> Exit:
    """Send until the input ends, enough was sent, or a stop; then drain, close and report.

    Raises:
        InstepError: as the client does.
        CommandProblem: when a file cannot be used, or does not fit the model.
    """
    if what.file is not None and what.signal is not None:
        raise CommandProblem("give a file or a signal, not both")
    sequences = read_sequences(what.file) if what.file is not None and is_numpy(what.file) else None
    from_lines = sequences is None and what.signal is None
    if what.named and not from_lines:
        raise CommandProblem("--named is for lines of text: their first column names the stream")
    with ExitStack() as stack:
        descriptor = _descriptor(what.file, stack) if from_lines else None
        outputs = _outputs(what, terminal, stop)
        answers = Answers(outputs, terminal)
        async with connected(what.endpoint, "produce", terminal, stop) as client:
            live = LiveRun(client, what.pace, answers, terminal, stop, clock)
            started = clock.now()
            if descriptor is not None:
                names = _names(what, None, what.streams or 1)
                async with _progress(what, terminal, answers, math.inf):
                    streams = await live.send_lines(read_lines(descriptor, stop), names, what.named)
            else:
                source = _source(what, sequences, client.info)
                streams = len(source.lengths)
                total = float(np.minimum(source.lengths, what.pace.frames or ENDLESS).astype(float).sum())
                async with _progress(what, terminal, answers, total if total < ENDLESS else math.inf):
                    await live.send_arrays(_names(what, sequences, streams), source)
            seconds = clock.now() - started
            fingerprint = client.info.fingerprint
        saved = outputs.finish(fingerprint)
    if descriptor is not None and not (answers.frames or answers.refused or live.bad_lines or stop.requested):
        raise BadFile(f"there are no frames {'on standard input' if what.file is None else f'in {what.file}'}")
    rate = answers.frames / seconds if seconds > 0 else 0.0
    good = not live.bad_lines and not answers.refused
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
            }
        )
    terminal.summary(
        f"{counted(answers.frames, 'frame')} of {counted(streams, 'stream')} sent and answered in {seconds:.1f} s "
        f"({rate:,.1f} frames/s)"
        f"{', ' + counted(live.bad_lines, 'bad line') if live.bad_lines else ''}"
        f"{', ' + counted(answers.refused, 'frame') + ' refused' if answers.refused else ''}"
        f"{'; stopped, all streams closed' if stop.requested else ''}{saved}",
        good=good,
    )
    return Exit.OK if good else Exit.FOUND_PROBLEMS


def _descriptor(file: Path | None, stack: ExitStack) -> int:
    """Where the lines come from."""
    if file is None:
        return sys.stdin.fileno()
    try:
        return stack.enter_context(file.open("rb", buffering=0)).fileno()
    except OSError as error:
        raise BadFile(f"{file} cannot be read: {error.strerror}") from None


def _outputs(what: Produce, terminal: Terminal, stop: Stop) -> Outputs:
    if what.save is not None:
        return open_outputs(what.save)
    if terminal.as_json:
        return NoOutputs()

    def write(text: str) -> None:
        if not terminal.write(text):  # nobody reads any more
            stop.request()

    return PrintedOutputs(write)


def _source(what: Produce, sequences: RecordedSequences | None, info: ServerInfo) -> Source:
    if sequences is not None:
        if sequences.features != info.features:
            raise CommandProblem(
                f"{what.file} has {sequences.features} numbers a frame, the model {info.model!r} takes {info.features}"
            )
        return array_source(sequences, what.streams or len(sequences))
    streams = what.streams or 1
    signal = make_signal(what.signal or Signal.SINE, streams, info.features)
    return Source(np.full(streams, ENDLESS), lambda first, count, rows: signal(first, count)[:, rows])


def _names(what: Produce, sequences: RecordedSequences | None, streams: int) -> list[str]:
    """What the streams are called: as the arrays that they send, where each sends one of its own."""
    if what.name is None and sequences is not None and len(set(sequences.names)) == len(sequences) >= streams:
        return list(sequences.names[:streams])
    prefix = f"produce-{os.getpid()}" if what.name is None else what.name
    return [f"{prefix}-{number}" for number in range(streams)]


def _progress(what: Produce, terminal: Terminal, answers: Answers, total: float) -> AbstractAsyncContextManager[None]:
    """Where the outputs are printed they are the progress."""
    if what.save is None and not terminal.as_json:
        return nullcontext()
    return terminal.progress("sending", total, "frames", lambda: answers.frames)
