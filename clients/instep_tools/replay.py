"""`instep replay`: sends recorded sequences again, at any speed, and compares outputs if requested."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from instep_client.aio import AsyncClient
from instep_client.protocol.errors import FramesRefused, Refused
from instep_client.protocol.wire import F32, ServerInfo
from instep_tools.connect import Target, connected, may_give_up
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.formats.write import check_output_path, save_sequences
from instep_tools.pacing import Clock, Stop
from instep_tools.plan import Send, check_fits, distinct, make_plan
from instep_tools.plan_run import PlanRun
from instep_tools.problems import CommandProblem, Exit
from instep_tools.sequences import RecordedSequences
from instep_tools.terminal import Terminal, progress, show_progress
from instep_tools.words import counted

LONG_S: Final = 60.0
"""A replay in real time that takes longer than this announces it."""
NAMED: Final = 3
"""The most streams named in a sentence."""


@dataclass(frozen=True, slots=True)
class ReplayJob:
    """The options of a replay."""

    target: Target
    file: Path
    speed: float | None = None
    """The factor on real time; infinite for as fast as possible; None for real time if times are known, else infinite.
    """
    rate_hz: float | None = None
    """Frames per second for each stream in real time, whatever the file says."""
    choice: Choice = field(default_factory=Choice)
    """The columns and streams of the file to send."""
    save: Path | None = None
    check: bool = False
    """Whether to compare with the outputs in the file."""


class ReplayedOutputs:
    """The outputs of sent frames.

    Attributes:
        outputs: float32 [sum, outputs], NaN without an output.
        done: bool [sum], whether each frame was applied and answered.
        refusals: the sentences of refusals, each once, in order.
    """

    def __init__(self, frames: int, outputs: int) -> None:
        self.outputs: F32 = np.full((frames, outputs), np.nan, np.float32)
        self.done: npt.NDArray[np.bool_] = np.zeros(frames, np.bool_)
        self.answered = 0
        self.refusals: dict[str, None] = {}

    def take(self, block: Send, result: F32 | Refused) -> None:
        """Process a block's outputs [T, N, outputs], or its error."""
        applied: npt.NDArray[np.bool_] = np.ones(block.flat.shape, np.bool_)
        if isinstance(result, Refused):
            self.refusals.setdefault(str(result))
            if not isinstance(result, FramesRefused):
                return
            result = result.outputs
            applied = np.asarray(np.isfinite(result).any(axis=2))
        flat = block.flat[applied]
        self.outputs[flat] = result[applied]
        self.done[flat] = True
        self.answered += len(flat)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first value that differs."""

    stream: str
    frame: int
    element: int
    recorded: float
    now: float

    def sentence(self) -> str:
        """Both values with all their digits."""
        return (
            f"first difference: stream {self.stream!r}, frame {self.frame}, element {self.element}: "
            f"recorded {np.float32(self.recorded)!s}, now {np.float32(self.now)!s}"
        )


@dataclass(frozen=True, slots=True)
class ReplayComparison:
    """The comparison of answers with a recording."""

    total: int
    """Frames in the file."""
    frames: int
    """Frames compared: those that have an output in the file and were answered now."""
    unrecorded: int
    """Frames that have no output in the file."""
    different: int
    """Frames with at least one bit that differs."""
    streams_different: int
    first: Difference | None
    """The first difference in the order of the sequences."""

    @property
    def complete(self) -> bool:
        """Whether every frame in the file was compared."""
        return self.frames == self.total

    def sentence(self, exactness: str) -> str:
        """Summarize the differences, as the end of a sentence."""
        if not self.frames:
            return "there was nothing to compare"
        compared = "" if self.complete else f"{self.frames:,} of {counted(self.total, 'frame')} were compared: "
        if not self.different:
            return f"{compared}all {self.frames:,} equal those in the file, bit for bit"
        note = "" if exactness == "exact" else " (the server is not exact)"
        return (
            f"{compared}{self.different:,} of {self.frames:,} frames differ from those in the file, "
            f"in {counted(self.streams_different, 'stream')}{note}"
        )


def compare(recorded: RecordedSequences, outputs: F32, which: npt.NDArray[np.bool_]) -> ReplayComparison:
    """Compare outputs with the recorded ones as bits: NaN equals only the same NaN, and -0 is not 0.

    Args:
        recorded: the recorded outputs.
        outputs: the present outputs, float32 [sum, outputs].
        which: bool [sum], the frames that were answered now. Frames without a recorded output are skipped, too.
    """
    if recorded.outputs is None:
        raise ValueError("there must be recorded outputs")
    comparable = np.ones_like(which) if recorded.answered is None else recorded.answered
    unrecorded = int((~comparable & np.isnan(recorded.outputs).all(axis=1)).sum())
    both = which & comparable
    bits_differ = (recorded.outputs.view(np.uint32) != outputs.view(np.uint32)) & both[:, None]
    compared = int(both.sum())
    frames = np.flatnonzero(bits_differ.any(axis=1))
    if not len(frames):
        return ReplayComparison(len(which), compared, unrecorded, 0, 0, None)
    rows = np.searchsorted(recorded.starts, frames, side="right") - 1
    flat, row = int(frames[0]), int(rows[0])
    element = int(np.argmax(bits_differ[flat]))
    first = Difference(
        stream=recorded.names[row],
        frame=flat - int(recorded.starts[row]),
        element=element,
        recorded=float(recorded.outputs[flat, element]),
        now=float(outputs[flat, element]),
    )
    return ReplayComparison(len(which), compared, unrecorded, len(frames), len(np.unique(rows)), first)


async def replay(what: ReplayJob, terminal: Terminal, stop: Stop, clock: Clock) -> Exit:
    """Run the replay and report. With `check`: 0 all equal, 1 a difference, 2 some frame was not compared.

    Raises:
        InstepError: as the client does.
        CommandProblem: when the file cannot be used, does not fit the model, or cannot be compared.
    """
    with show_progress(f"reading {what.file}") as on_progress:
        sequences = read_sequences(what.file, what.choice, on_progress)
    if what.check and sequences.outputs is None:
        raise CommandProblem(f"{what.file} holds no outputs to compare with: it has no columns y0, y1, …")
    if what.save is not None:
        check_output_path(what.save)
    async with connected(what.target, "replay", terminal, stop) as client:
        info = client.info
        _check_fits(what, sequences, info)
        back = ReplayedOutputs(len(sequences.frames), info.outputs)
        plan = make_plan(sequences, what.speed, what.rate_hz, info, what.file)
        run = PlanRun(client, plan, await _free_names(client, sequences.names), back.take, stop, clock)
        if what.speed is None and what.rate_hz is None and sequences.times_ns is not None:
            real_s = np.ptp(sequences.times_ns) / 1e9
            if real_s > LONG_S:
                minutes = counted(round(real_s / 60), "minute")
                terminal.note(f"replaying in real time, which takes {minutes}; --speed max is as fast as possible")
        started = clock.now()
        total = len(sequences.frames)
        with progress(terminal.err, "replaying", total, "frames", lambda: back.answered, run.waits):
            with may_give_up(stop):
                await run.run()
        seconds = clock.now() - started
    is_saved = False
    if what.save is not None:
        replayed = replace(sequences, outputs=back.outputs).keep(back.done)
        try:
            save_sequences(what.save, replayed, info)
            is_saved = True
        except CommandProblem as problem:
            terminal.error(str(problem))
    comparison = compare(sequences, back.outputs, back.done) if what.check else None
    return _report(what, terminal, stop, Replayed(sequences, back, run, seconds, comparison, is_saved, info))


async def _free_names(client: AsyncClient, names: Sequence[str]) -> list[str]:
    """The names in the file, with a suffix if the server has a stream of that name, which is not disturbed."""
    taken = {stream.name for stream in await client.list_streams()}
    suffix = f"~{secrets.token_hex(4)}"
    return [name + suffix if name in taken else name for name in distinct(names)]


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result of a replay."""

    sequences: RecordedSequences
    back: ReplayedOutputs
    run: PlanRun
    seconds: float
    comparison: ReplayComparison | None
    """The comparison of answered frames; None if no comparison was requested."""
    is_saved: bool
    info: ServerInfo

    @property
    def whole(self) -> bool:
        """Whether every frame was answered."""
        return self.back.answered == len(self.sequences.frames)


def _report(what: ReplayJob, terminal: Terminal, stop: Stop, done: Replayed) -> Exit:
    frames, answered, comparison = len(done.sequences.frames), done.back.answered, done.comparison
    for sentence in done.back.refusals:
        terminal.error(sentence)
    if comparison is not None:
        if late := done.sequences.late:
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
    if terminal.as_json:
        terminal.result(
            {
                "streams": len(done.sequences),
                "frames": frames,
                "answered_frames": answered,
                "seconds": done.seconds,
                "exactness": done.info.exactness,
                "saved": str(what.save) if done.is_saved else None,
                "stopped": stop.requested,
                "check": None if comparison is None else asdict(comparison),
            }
        )
    elif comparison is not None and comparison.first is not None:
        terminal.say(comparison.first.sentence())
    rate = answered / done.seconds if done.seconds > 0 else 0.0
    line = f"{counted(answered, 'frame')} of {counted(len(done.sequences), 'stream')} in {done.seconds:.1f} s"
    line += f" ({rate:,.0f} frames/s)"
    if not done.whole:
        line += f"; {_missing(done, stop)}"
    if comparison is not None:
        line += f"; {comparison.sentence(done.info.exactness)}"
    if what.save is not None:
        line += f"; saved in {what.save}" if done.is_saved else f"; {what.save} not written"
    good = done.whole if comparison is None else comparison.complete and not comparison.different
    is_lost = what.save is not None and not done.is_saved
    terminal.summary(line, good=good and not is_lost)
    if good:
        return Exit.OK if not is_lost else Exit.COULD_NOT_RUN
    return Exit.COULD_NOT_RUN if comparison is not None and not comparison.different else Exit.FOUND_PROBLEMS


def _missing(done: Replayed, stop: Stop) -> str:
    sent = done.run.sent_frames
    unsent, unanswered = len(done.sequences.frames) - sent, sent - done.back.answered
    parts = [f"{counted(unanswered, 'frame')} got no answer"] if unanswered else []
    parts += [f"{counted(unsent, 'frame')} {'was' if unsent == 1 else 'were'} not sent"] if unsent else []
    why = "the server ended all streams" if done.run.all_ended else "the server refused them"
    return f"{', '.join(parts)}: {stop.words if stop.requested else why}"


def _check_fits(what: ReplayJob, sequences: RecordedSequences, info: ServerInfo) -> None:
    if what.check and sequences.fingerprint is not None and sequences.fingerprint != info.fingerprint:
        other = "another model" if sequences.model in (None, info.model) else f"{sequences.model!r}, another model"
        raise CommandProblem(
            f"{what.file} was recorded with {other} than {info.model!r}, which the server runs "
            f"(fingerprints {sequences.fingerprint[:12]} and {info.fingerprint[:12]}): there is nothing to compare"
        )
    check_fits(what.file, sequences, info)
    if what.check and sequences.outputs is not None and sequences.outputs.shape[1] != info.outputs:
        raise CommandProblem(
            f"{what.file} has {sequences.outputs.shape[1]} outputs a frame, "
            f"the model {info.model!r} gives {info.outputs}"
        )
