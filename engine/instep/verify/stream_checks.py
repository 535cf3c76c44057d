"""Reading a recording into streams to check: their frames, and the states before and after them.

A stream is split where a state was recorded: at resets and checkpoints. Each part is replayed from
the state before it, and must come out at the recorded state after it, so the parts together prove what one replay from
the beginning would.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.frames import Sequences
from instep.recording.reader import RecordingReader
from instep.recording.records import StreamInfo, select_streams
from instep.recording.sequences import SequenceIndex
from instep.verify.checkpoints import StoredCheckpoints, StoredState
from instep.verify.report import CannotVerify, NoFrames, Place, StreamReport, Verdict


@dataclass(frozen=True, slots=True)
class StreamCheck:
    """Consecutive frames of one stream, the state before them, and the state that must come out."""

    info: StreamInfo
    stretch: int
    """As an index into `SequenceIndex.stretches`."""
    start: int
    """Where the frames begin in the order of the sequences."""
    first_seq: int
    frames: int
    initial_state: U8
    """uint8 [row_bytes]."""
    final_state: U8 | None
    """The recorded state after the frames; None where none was recorded."""
    place: Place = "final state"
    """Where the final state was recorded."""
    unanswered: int = 0
    """How many of the frames have no recorded outputs."""
    problems: tuple[str, ...] = ()
    """Mismatches found before the replay, as sentences."""

    @property
    def next_seq(self) -> int:
        """The seq after the last frame."""
        return self.first_seq + self.frames

    def split(self, seq: int, state: U8) -> tuple[StreamCheck, StreamCheck]:
        """Two checks; the first must come out at the checkpoint's state before the frame `seq`."""
        before = replace(self, frames=seq - self.first_seq, final_state=state, place="checkpoint", problems=())
        after = replace(
            self,
            start=self.start + before.frames,
            first_seq=seq,
            frames=self.next_seq - seq,
            initial_state=state,
        )
        return before, after

    def with_problem(self, problem: str) -> StreamCheck:
        """The check with one more problem."""
        return replace(self, problems=(*self.problems, problem))

    def report_without_frames(self) -> StreamReport:
        """The result of a check without frames: its final state must be its initial one, bit for bit."""
        problems = list(self.problems)
        if self.final_state is not None and self.final_state.tobytes() != self.initial_state.tobytes():
            problems.append(
                f"{self.place} before frame {self.next_seq}: it differs from the state before, although no frame "
                "comes between them"
            )
        verdict: Verdict = "mismatch" if problems else "empty"
        return StreamReport(self.info.stream, self.info.name, 0, 0, verdict, tuple(problems))


class StreamChecks:
    """Reads a whole recording once, and splits its streams into checks.

    Args:
        reader: the recording.
        wanted: names and numbers of the streams to check; none for all.
        checkpoints: of the same recording.
        initial: the model's initial state, uint8 [row_bytes].
        on_progress: called with the share (0 to 1) of the recording that was read.

    Attributes:
        checks: those of one stream one after another, in order.
        sequences: the frames of `checks[i]` are its sequence `i`; None where no stream has any.

    Raises:
        RecordingError: when the recording is damaged.
        NoSuchStream: when there is no such stream.
    """

    def __init__(
        self,
        reader: RecordingReader,
        wanted: Sequence[str],
        checkpoints: StoredCheckpoints,
        initial: U8,
        on_progress: Callable[[float], None],
    ) -> None:
        index = SequenceIndex(
            reader, on_progress, lambda streams: select_streams(streams, wanted), checkpoints=checkpoints.positions
        )
        checkpoints.check_complete(index)
        self._path = reader.path
        self._index = index
        self._checkpoints = checkpoints
        self._initial = initial
        self.checks: list[StreamCheck] = []
        by_stream: dict[int, list[int]] = {row: [] for row in index.kept.tolist()}
        for at, stretch in enumerate(index.stretches):
            if stretch.row in by_stream:
                by_stream[stretch.row].append(at)
        stretches: I64 = np.array([at for of_stream in by_stream.values() for at in of_stream], np.int64)
        self.sequences = index.sequences(stretches) if index.frames[stretches].any() else None
        starts = np.zeros(len(stretches), np.int64) if self.sequences is None else self.sequences.starts
        start_of = dict(zip(stretches.tolist(), starts.tolist(), strict=True))
        for row, of_stream in by_stream.items():
            self.checks += self._checks_of(row, [(at, start_of[at]) for at in of_stream])
        if self.sequences is not None:
            self._count_unanswered(self.sequences)
            lengths: I64 = np.array([check.frames for check in self.checks], np.int64)
            first: I64 = np.array([check.start for check in self.checks], np.int64)
            numbers = np.arange(len(lengths))
            self.sequences = replace(self.sequences, rows=numbers, starts=first, lengths=lengths)

    def require_outputs(self, wanted: Sequence[str]) -> None:
        """Raise CannotVerify where the streams, wanted by these words, have no frames with outputs."""
        if not self._index.frames_present:
            kind = CannotVerify if any(check.problems for check in self.checks) else NoFrames
            raise kind(f"{self._path} holds no frames: nothing was recorded, so nothing can be verified")
        if not any(check.frames > check.unanswered or check.problems for check in self.checks):
            whose = "the recording has no"
            if wanted:
                whose = f"stream {wanted[0]!r} has no" if len(wanted) == 1 else f"none of the {len(wanted)} streams has"
            raise CannotVerify(f"{whose} frames with outputs: there is nothing to verify")

    def _checks_of(self, row: int, stretches: list[tuple[int, int]]) -> list[StreamCheck]:
        """The checks of one stream, given its stretches and where their frames begin: each split at checkpoints."""
        index = self._index
        info, defect = index.streams[row], index.defects.get(row)
        checks = []
        for at, start in stretches:
            stretch, frames = index.stretches[at], int(index.frames[at])
            initial = self._initial if stretch.initial_state is None else stretch.initial_state
            checks.append(StreamCheck(info, at, start, stretch.first_seq, frames, initial, stretch.final_state))
        if defect is not None:  # the state after it is not that of the frames before
            checks[-1] = replace(checks[-1], final_state=None, problems=(defect,))
        earliest = 0
        for stored in self._checkpoints.states.get(info.stream, []):
            if (problem := self._compare_tail(checks, stored)) is not None:
                checks[-1] = checks[-1].with_problem(problem)
            stretch_there = self._stretch_at(row, stored.position)
            while checks[earliest].stretch < stretch_there:
                earliest += 1
            found = _where(checks, earliest, stored)
            if found is not None:
                checks[found : found + 1] = checks[found].split(stored.seq, stored.state)
                earliest = found + 1
            elif defect is None:
                checks[-1] = checks[-1].with_problem(
                    f"a checkpoint holds its state before frame {stored.seq}, where no frames were recorded"
                )
        return checks

    def _stretch_at(self, row: int, position: int) -> int:
        """The stretch of a stream that a state at a position belongs to, or an earlier one."""
        before = bisect_right(self._checkpoints.positions, position)
        return int(self._index.checkpoint_stretches[before - 1][row]) if before else row

    def _compare_tail(self, checks: list[StreamCheck], stored: StoredState) -> str | None:
        """Compare the frames that a checkpoint holds with the recorded ones; say where they differ.

        Outputs that only the checkpoint holds, because the engine was killed, count as recorded ones from here on.
        """
        if self.sequences is None:
            return None
        x, y, answered = self.sequences.x, self.sequences.y, self.sequences.answered
        for check in checks:
            first, end = max(stored.tail_seq, check.first_seq), min(stored.seq, check.next_seq)
            if first >= end:
                continue
            places = self.sequences.order[check.start + first - check.first_seq :][: end - first]
            tail = slice(stored.tail_at + first - stored.tail_seq, stored.tail_at + end - stored.tail_seq)
            tail_x, tail_y = self._checkpoints.tail_x[tail], self._checkpoints.tail_y[tail]
            are_new = ~answered[places]
            y[places[are_new]], answered[places[are_new]] = tail_y[are_new], True
            differ = _bits_differ(x[places], tail_x) | _bits_differ(y[places], tail_y)
            if differ.any():
                return f"frame {first + int(np.argmax(differ))} in a checkpoint differs from the recorded frame"
        return None

    def _count_unanswered(self, sequences: Sequences) -> None:
        if sequences.answered.all():
            return
        for at, check in enumerate(self.checks):
            places = sequences.order[check.start : check.start + check.frames]
            self.checks[at] = replace(check, unanswered=int((~sequences.answered[places]).sum()))


def _where(checks: list[StreamCheck], earliest: int, stored: StoredState) -> int | None:
    """The check that the state in the checkpoint belongs to, at or after the earliest; None where there is none.

    Where the stream was reset before the frame `stored.seq`, the state may be the one before that or the one after.
    """
    found = [at for at in range(earliest, len(checks)) if checks[at].first_seq <= stored.seq <= checks[at].next_seq]
    for at in found:
        if checks[at].first_seq == stored.seq and checks[at].initial_state.tobytes() == stored.state.tobytes():
            return at
    return found[0] if found else None


def _bits_differ(one: F32, other: F32) -> Bool:
    """By row of [N, values]."""
    differ: Bool = (one.view(np.uint32) != other.view(np.uint32)).any(axis=1)
    return differ
