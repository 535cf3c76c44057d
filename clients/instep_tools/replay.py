"""`instep-client replay`: recorded sequences again, at their own speed or another one, and compared if asked to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from instep_client.protocol.wire import ServerInfo
from instep_tools.compare import ReplayComparison, compare
from instep_tools.connect import connected
from instep_tools.files import read_sequences
from instep_tools.outputs import check_output_path, save_outputs
from instep_tools.pacing import Clock, Stop
from instep_tools.plan import Plan, plan_at_rate, plan_fast, plan_timed
from instep_tools.problems import CommandProblem, Exit
from instep_tools.recordings import is_recording, read_recording
from instep_tools.replay_run import ReplayRun
from instep_tools.sequences import RecordedSequences
from instep_tools.terminal import Terminal
from instep_tools.words import counted


@dataclass(frozen=True, slots=True)
class Replay:
    """What to do."""

    endpoint: str
    file: Path
    speed: float | None = None
    """Times real time; infinite for as fast as possible; None for real time where times are known, else infinite."""
    rate_hz: float | None = None
    """Frames a second for each stream in real time, of a file without times."""
    streams: str = "*"
    """A pattern of names as in a shell: only these."""
    save: Path | None = None
    check: bool = False
    """Compare with the outputs in the file."""


async def replay(what: Replay, terminal: Terminal, stop: Stop, clock: Clock) -> Exit:
    """Run it again and report. With `check`: 0 all equal, 1 something differs, 2 could not check.

    Raises:
        InstepError: as the client does.
        CommandProblem: when the file cannot be used, does not fit the model, or cannot be compared.
    """
    recorded = read_recording(what.file) if is_recording(what.file) else read_sequences(what.file)
    sequences = _chosen(recorded, what.streams)
    speed = _speed(what, sequences)
    if what.check and sequences.outputs is None:
        raise CommandProblem(f"{what.file} holds no outputs to compare with; only a recording or a saved NPZ does")
    if what.save is not None:
        check_output_path(what.save)
    async with connected(what.endpoint, "replay", terminal, stop) as client:
        _check_fits(what, sequences, client.info)
        run = ReplayRun(client, _plan(sequences, speed, what.rate_hz, client.info), stop, clock)
        started = clock.now()
        async with terminal.progress("replaying", len(sequences.frames), "frames", lambda: run.answered):
            await run.run()
        seconds = clock.now() - started
        info = client.info
    replayed = replace(sequences, outputs=run.outputs, answered=None, fingerprint=info.fingerprint).keep(run.done)
    if what.save is not None:
        save_outputs(what.save, replayed)
    comparison = compare(sequences, run.outputs, run.done) if what.check else None
    return _report(what, terminal, stop, Replayed(sequences, run, seconds, comparison, info))


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of it."""

    sequences: RecordedSequences
    run: ReplayRun
    seconds: float
    comparison: ReplayComparison | None
    """Of the frames that were answered; None where nothing was to be compared."""
    info: ServerInfo

    @property
    def whole(self) -> bool:
        """Whether every frame was answered."""
        return self.run.answered == len(self.sequences.frames)


def _report(what: Replay, terminal: Terminal, stop: Stop, done: Replayed) -> Exit:
    frames, answered, comparison = len(done.sequences.frames), done.run.answered, done.comparison
    for sentence in done.run.refusals:
        terminal.error(sentence)
    if terminal.as_json:
        terminal.result(
            {
                "streams": len(done.sequences),
                "frames": frames,
                "answered_frames": answered,
                "seconds": done.seconds,
                "exactness": done.info.exactness,
                "saved": None if what.save is None else str(what.save),
                "stopped": stop.requested,
                "check": None if comparison is None else comparison.as_json(),
            }
        )
    elif comparison is not None and comparison.first is not None:
        terminal.out.print(comparison.first.sentence(), markup=False)
    rate = answered / done.seconds if done.seconds > 0 else 0.0
    line = f"{counted(answered, 'frame')} of {counted(len(done.sequences), 'stream')} in {done.seconds:.1f} s"
    line += f" ({rate:,.0f} frames/s)"
    if not done.whole:
        why = "stopped, all streams closed" if stop.requested else "the server refused them"
        line += f"; {counted(frames - answered, 'frame')} got no answer: {why}"
    if comparison is not None:
        line += f"; {comparison.sentence(done.info.exactness)}"
    if what.save is not None:
        line += f"; saved in {what.save}"
    same = comparison is None or not comparison.different
    terminal.summary(line, good=done.whole and same)
    if what.check and same and not done.whole:
        return Exit.COULD_NOT_RUN
    return Exit.OK if done.whole and same else Exit.FOUND_PROBLEMS


def _chosen(sequences: RecordedSequences, pattern: str) -> RecordedSequences:
    which = [row for row, name in enumerate(sequences.names) if fnmatchcase(name, pattern)]
    if not which:
        raise CommandProblem(f"no stream's name fits {pattern!r}; the first one is called {sequences.names[0]!r}")
    return sequences if len(which) == len(sequences) else sequences.select(which)


def _speed(what: Replay, sequences: RecordedSequences) -> float:
    if what.rate_hz is not None and sequences.times_s is not None:
        raise CommandProblem(f"{what.file} knows when its frames were sent: use --speed; --rate is for others")
    timed = what.rate_hz is not None or sequences.times_s is not None
    if what.speed is None:
        return 1.0 if timed else math.inf
    if math.isfinite(what.speed) and not timed:
        raise CommandProblem(f"{what.file} does not know when its frames were sent: give --rate, or --speed max")
    return what.speed


def _check_fits(what: Replay, sequences: RecordedSequences, info: ServerInfo) -> None:
    if sequences.features != info.features:
        raise CommandProblem(
            f"{what.file} has {sequences.features} numbers a frame, the model {info.model!r} takes {info.features}"
        )
    if not what.check or sequences.outputs is None:
        return
    if sequences.fingerprint is not None and sequences.fingerprint != info.fingerprint:
        raise CommandProblem(
            f"{what.file} was recorded with another model than {info.model!r}, which the server runs "
            f"(fingerprints {sequences.fingerprint[:12]} and {info.fingerprint[:12]}): there is nothing to compare"
        )
    if sequences.outputs.shape[1] != info.outputs:
        raise CommandProblem(
            f"{what.file} has {sequences.outputs.shape[1]} outputs a frame, "
            f"the model {info.model!r} gives {info.outputs}"
        )


def _plan(sequences: RecordedSequences, speed: float, rate_hz: float | None, info: ServerInfo) -> Plan:
    if math.isinf(speed):
        return plan_fast(sequences, info.max_streams, min(info.max_block_frames, info.credit_frames))
    if rate_hz is not None:
        return plan_at_rate(sequences, info.max_streams, rate_hz * speed)
    plan = plan_timed(sequences, speed)
    if plan.at_once > info.max_streams:
        raise CommandProblem(
            f"the recording has {plan.at_once} streams open at once, the server keeps {info.max_streams}: "
            "choose some with --streams, or use --speed max"
        )
    return plan
