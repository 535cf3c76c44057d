"""Verification: computes a whole recording again in four ways, and compares the results with the recorded outputs.

1. **Stepped**: every frame by the compiled step, from the recorded initial states, streams side by side. 2.
   **Definition**: by the second program of the same arithmetic, as many frames as it computes in about the time of 1.
   3. **torch**: whole sequences by torch's own module, if the kind of model has one. 4. **float64 reference**: written
   independently, from the original weights; it bounds the true error (see `bound`). That of a graph is the graph in
   float64, which bounds what rounding does, and the report says so. A kind may have none.

1 carries the states of streams from one segment of the recording to the next; 2, 3 and 4 begin each segment in these
states. Where the engine computed in `portable-1`, bits must be equal in 1 and 2, whichever machines recorded and
verify. Other engines promise no bits: 1 must be within twice the bound, since each side may be off by one, and 2 is
left out. In 3, values must always be within twice the bound, and in 4 within the bound. Where frames or states are too
large for the bound to mean anything (see `bound`), or there is no reference, equal bits are enough, and the report
names the first such frame; where bits need not be equal either, the stream counts as not checked.

States of checkpoints and final states are compared in 1, 2 and 4, and the stream continues from there. Every frame of a
stream must be there, once and in order, and so must every state of a checkpoint. Frames whose outputs were not
recorded, because the engine was killed while it computed them, are replayed but not compared.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Event
from typing import Any, Final, TypeAlias

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.models.base import Reference
from instep.models.model import Model
from instep.models.numerics import one_thread, threads_as_here
from instep.recording.database import lost_tail
from instep.recording.inspection import how_it_ends, where_it_begins
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedEvent, select_streams
from instep.recording.schema import CHECKPOINT_EVENT, RESET_EVENT
from instep.recording.segments import Opened, Segment, empty_segment, segments
from instep.replay.bound import F64
from instep.replay.checkers import (
    CHECK_LIMITS,
    MOST_ROWS,
    Block,
    Checkers,
    CheckLimits,
    Comparison,
    Distances,
    check_definition,
    check_reference,
    check_stepped,
    check_torch,
    examine,
    plan_blocks,
)
from instep.replay.recorded_model import recorded_network, why_not_bits
from instep.replay.replay import LAST, RecordedState, Replay, StateTable, Stretches, differ
from instep.replay.report import (
    CannotVerify,
    Checker,
    Coverage,
    NoFrames,
    ReferenceKind,
    Report,
    StreamReport,
)
from instep.runtime.executor import usable_cores

Progress: TypeAlias = Callable[[float], None]
"""Called with the finished share, 0 to 1."""

MOST_THREADS: Final = 4
"""The most threads. More would only compete for caches, even on more cores."""
LEAST_SHARE: Final = 64
"""The smallest block of streams that is worth a thread of its own."""
_ROWS: Final = 16
"""The number of stretches that the definition computes side by side."""


def verify(
    reader: RecordingReader,
    model: Model,
    wanted: Sequence[str],
    on_progress: Progress,
    limits: CheckLimits = CHECK_LIMITS,
) -> Report:
    """Check every stream of a recording, or the streams of some names or numbers.

    Args:
        reader: the newly opened recording.
        model: the recorded model, whose fingerprint the caller has checked.
        wanted: names and numbers; none for all streams.
        on_progress: see `Progress`.
        limits: sizes of the parts that are computed at once.

    Raises:
        CannotVerify: when there is nothing to check.
        RecordingError: when the recording is damaged.
        NoSuchStream: when it has no such stream.
    """
    began, stopped = time.monotonic(), Event()
    with one_thread(), ThreadPoolExecutor(_threads(), "instep-verify", threads_as_here()) as pool:
        try:
            check = _Check(reader, model, wanted, pool, limits, stopped)
            check.run(on_progress)
        finally:
            stopped.set()
    check.require_outputs(wanted)
    return Report(
        file=reader.path,
        model_name=model.name,
        fingerprint=model.fingerprint,
        streams=check.reports,
        ending=how_it_ends(reader),
        finished=reader.finished,
        lost="" if is_being_written(reader.path) else lost_tail(reader.path),
        trimmed=where_it_begins(reader),
        notes=check.checkers.notes,
        seconds=time.monotonic() - began,
        elements=check.elements,
        definition=check.coverage,
        reference=_kind_of(check.checkers.truth),
    )


def make_checkers(
    model: Model, notes: tuple[str, ...], stopped: Event | None = None, limits: CheckLimits = CHECK_LIMITS
) -> Checkers:
    """Build the checkers. `notes` are the reasons why bits need not be equal; empty if they must."""
    network = recorded_network(model)
    references = network.reference(np.float64), network.reference(np.float32)
    truth, rounded = references if None not in references else (None, None)
    return Checkers(network, truth, rounded, notes, stopped or Event(), limits)


def _kind_of(truth: Reference | None) -> ReferenceKind:
    return "none" if truth is None else "independent" if truth.independent else "same graph"


def _threads() -> int:
    return min(usable_cores(), MOST_THREADS)


class CheckpointStates:
    """The tables `checkpoints` and `states` as of one commit, which the reader shows from then on.

    Args:
        reader: a recording from which nothing else has been read.
        wanted: numbers of streams; None for all.

    Attributes:
        position: of the newest checkpoint.
        states: by number of the stream, in order.

    Raises:
        RecordingError: when a row is damaged or missing.
    """

    def __init__(self, reader: RecordingReader, wanted: I64 | None) -> None:
        self._reader = reader
        self._tails: dict[int, list[tuple[int, RecordedState]]] = {}
        self.states: dict[int, list[RecordedState]] = {}
        with reader.at_once():
            self.position, announced, resets = reader.checkpoint().position, 0, set[tuple[int | None, int | None]]()
            for event in reader.events():
                announced = event.seq or 0 if event.kind == CHECKPOINT_EVENT else announced
                if event.kind == RESET_EVENT:
                    resets.add((event.stream, event.seq))
            reader.check_announced(announced)
            for row in reader.states():
                if row.position > reader.trimmed.position and (wanted is None or row.stream in wanted):
                    state = RecordedState(row.seq, row.position, row.state, (row.stream, row.seq) in resets)
                    self.states.setdefault(row.stream, []).append(state)
                    if row.tail_seq < row.seq:
                        self._tails.setdefault(row.stream, []).append((row.tail_seq, state))
        self.newest = {number: states[-1].seq for number, states in self.states.items()}

    def compare_tails(self, stretches: Stretches) -> Iterator[tuple[int, str]]:
        """Compare the frames in checkpoints with the recorded ones; returns stream numbers and sentences.

        Outputs that only a checkpoint has, because the engine was killed, count as recorded from here on.
        """
        frames = stretches.frames
        for at, number in enumerate(stretches.streams.tolist()) if self._tails else ():
            begin = int(stretches.first_seqs[at])
            end = begin + int(stretches.lengths[at])
            for tail_seq, state in self._tails.get(number, ()):
                first, until = max(tail_seq, begin), min(state.seq, end)
                condition = f"position = {state.position} AND stream = ?"
                row = self._reader.newest_row("states", condition, number) if first < until else None
                if row is None:
                    continue  # nothing of it is here, or the writer has replaced it meanwhile
                recorded = self._reader.stream_state(row)
                tail = slice(first - recorded.tail_seq, until - recorded.tail_seq)
                places = stretches.order[stretches.starts[at] + first - begin :][: until - first]
                new = places[~frames.answered[places]]
                frames.y[new], frames.answered[new] = recorded.tail_y[tail][~frames.answered[places]], True
                are_other = differ(frames.x[places], recorded.tail_x[tail])
                are_other |= differ(frames.y[places], recorded.tail_y[tail])
                if are_other.any():
                    seq = first + int(np.argmax(are_other))
                    yield number, f"frame {seq} in a checkpoint differs from the recorded frame"


class _Check:
    """The check of a recording.

    Attributes:
        checkers: the programs that compute.
        reports: one for each opening, in order.
        elements: the count of elements that each checker compared.
        coverage: of the definition.
    """

    def __init__(
        self,
        reader: RecordingReader,
        model: Model,
        wanted: Sequence[str],
        pool: Executor,
        limits: CheckLimits,
        stopped: Event,
    ) -> None:
        self._reader = reader
        self._pool = pool
        self._wanted: I64 | None = None
        if wanted:
            infos = reader.streams()
            self._wanted = np.array([infos[at].stream for at in select_streams(infos, wanted)], np.int64)
        self._stored = CheckpointStates(reader, self._wanted)
        reader.check_positions()
        notes = why_not_bits([engine.header for engine in reader.engines])
        self.checkers = make_checkers(model, notes, stopped, limits)
        trimmed = reader.checkpoints()[0].completed if reader.trimmed.position else 0
        self._replay = Replay(StateTable(self.checkers.network), reader, self._stored.states, ignore_until=trimmed)
        self.reports: list[StreamReport] = []
        self.elements: dict[Checker, int] = {"stepped": 0, "definition": 0, "torch": 0, "float64 reference": 0}
        self._by_number: dict[int, StreamReport] = {}
        self._first_seqs: dict[int, int] = {}
        """First seqs of open streams that were not reset."""
        self._at_checkpoint: dict[int, int] = {}
        """Next seqs of streams that had changed at the newest checkpoint, by number."""
        self._drift: dict[int, float] = {}
        """The relative errors so far by number, if bits are not required; see `ErrorBound`."""
        self._frames = 0
        """The count of recorded frames."""
        self._compared: tuple[set[int], int] = (set(), 0)
        """The streams, and the number of frames, compared with the definition."""
        self._definition_s = self.checkers.limits.definition_s
        """The time that is left for the definition."""
        self._definition_begun: tuple[_SegmentCheck, Future[Any]] | None = None

    def run(self, on_progress: Progress) -> None:
        """Check everything."""
        begun: deque[_SegmentCheck] = deque()
        most = 1 if self.checkers.bits_required else 0
        for segment in self._segments():
            if begun:
                begun[-1].stepped.result()
            while len(begun) > most:
                self._finish(begun.popleft())
            begun.append(self._begin(segment))
            on_progress(min(segment.position / max(self._reader.last_position, 1), 1.0))
        while begun:
            self._finish(begun.popleft())
        self._finish_definition()
        self._check_complete()

    def require_outputs(self, wanted: Sequence[str]) -> None:
        """Raise CannotVerify if the streams that these words name have no frames with outputs."""
        has_problems = any(report.problems for report in self.reports)
        if has_problems or any(report.frames for report in self.reports):
            return
        if not self._frames:
            raise NoFrames(f"{self._reader.path} holds no frames: nothing was recorded, so nothing can be verified")
        of = f" of {', '.join(wanted)}" if wanted else ""
        raise CannotVerify(f"no frame{of} has outputs: there is nothing to verify")

    @property
    def coverage(self) -> Coverage:
        """The coverage of the definition."""
        streams, frames = self._compared
        return Coverage(len(streams), frames)

    def _segments(self) -> Iterator[Segment]:
        reader, newest, wanted = self._reader, self._stored.position, self._wanted
        for info in reader.streams() if reader.trimmed.position else ():
            if info.opened_position <= reader.trimmed.position and (wanted is None or info.stream in wanted):
                self._replay.add(info.stream, info.first_seq, info.initial_state)
                self._open(info.stream, info.name, info.first_seq)
        cuts = [newest] if newest >= reader.first_position else []
        for segment in segments(reader, cuts=cuts, segment_bytes=self.checkers.limits.segment_bytes):
            self._frames += len(segment.frames)
            yield segment if self._wanted is None else segment.only(self._wanted)
        yield empty_segment(reader, LAST)

    def _open(self, number: int, name: str, first_seq: int) -> None:
        report = StreamReport(number, name)
        self.reports.append(report)
        self._by_number[number], self._first_seqs[number] = report, first_seq

    def _begin(self, segment: Segment) -> _SegmentCheck:
        for mark in segment.marks:
            if isinstance(mark, Opened):
                self._open(mark.stream, mark.name, mark.first_seq)
            elif isinstance(mark, RecordedEvent) and mark.kind == RESET_EVENT:
                self._first_seqs.pop(mark.stream or 0, None)
        stretches = self._replay.plan(segment)
        for defect in stretches.defects:
            self._by_number[defect.stream].add_problem(defect.sentence)
        for number, sentence in self._stored.compare_tails(stretches):
            self._by_number[number].add_problem(sentence)
        if segment.position == self._stored.position:
            nexts = self._replay.next_seqs
            self._at_checkpoint = {each: seq for each, seq in nexts.items() if self._first_seqs.get(each) != seq}
        drift: F64 = np.zeros(len(stretches))
        if self._drift:
            numbers = stretches.streams.tolist()
            drift[:] = [0 if at in stretches.given else self._drift.get(each, 0) for at, each in enumerate(numbers)]
        return _SegmentCheck(self.checkers, self._replay, stretches, drift, self._pool)

    def _finish(self, check: _SegmentCheck) -> None:
        check.finish()
        for checker, count in check.elements.items():
            self.elements[checker] += count
        numbers = check.stretches.streams.tolist()
        for row, number in enumerate(numbers):
            check.report(row, self._by_number[number])
        if not self.checkers.bits_required:
            self._drift |= dict(zip(numbers, check.drift.tolist(), strict=True))
        self._finish_definition()
        self._begin_definition(check)

    def _begin_definition(self, check: _SegmentCheck) -> None:
        """Compare some stretches with the definition, for about as long as stepping has taken."""
        _, after, stepped_s = check.stepped.result()
        streams, frames = self._compared
        self._definition_s += stepped_s if frames else max(0.0, stepped_s - self.checkers.limits.definition_s)
        if self.checkers.bits_required and len(check.with_frames) and self._definition_s > 0:
            rows = np.roll(_spread_out(check.with_frames), -len(streams))
            parts = (rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS))
            blocks = (block for part in parts for block in check.blocks(part))
            task = self._pool.submit(_compare_definition, blocks, after, self._definition_s, int(not frames))
            self._definition_begun = check, task

    def _finish_definition(self) -> None:
        if self._definition_begun is None:
            return
        (check, task), self._definition_begun = self._definition_begun, None
        found, seconds = task.result()
        self._definition_s -= seconds
        for rows, findings, frames, values in found:
            numbers = check.stretches.streams[rows]
            self.elements["definition"] += values
            self._compared[0].update(numbers[frames > 0].tolist())
            self._compared = self._compared[0], self._compared[1] + int(frames.sum())
            for row, finding in findings.items():
                if finding.first is not None:
                    self._by_number[int(numbers[row])].add_mismatch(finding.first)

    def _check_complete(self) -> None:
        """Raise if the newest checkpoint lacks a state, or has one from before the checkpoint."""
        reader, position, nexts = self._reader, self._stored.position, self._replay.next_seqs
        for number in self._stored.newest.keys() - self._by_number.keys():
            raise reader.damaged(f"a checkpoint holds a state of stream {number}, which was never opened")
        for number in sorted(self._at_checkpoint.keys() & nexts.keys()):  # it gives up those of closed streams
            seq, newest = self._at_checkpoint[number], self._stored.newest.get(number)
            if newest is None:
                raise reader.damaged(
                    f"the state of stream {number} is missing from the checkpoint of position {position}"
                )
            if newest < seq:
                raise reader.damaged(
                    f"the checkpoint of position {position} holds the state of stream {number} before frame {newest}, "
                    f"but should hold one before frame {seq} or later"
                )


class _SegmentCheck:
    """The check of a segment's stretches. It begins when it is made, and `finish` waits for its end.

    Attributes:
        stretches: the stretches to check.
        stepped: the outputs, the states after the stretches, and the duration of stepping.
        elements: the count of values that each checker compared.
        drift: [S], the relative errors up to the ends.
    """

    def __init__(self, checkers: Checkers, replay: Replay, stretches: Stretches, drift: F64, pool: Executor) -> None:
        self._checkers = checkers
        self._pool = pool
        self.stretches = stretches
        self.drift = drift
        self._before = replay.states_before(stretches)
        self.stepped: Future[tuple[F32, U8, float]] = pool.submit(_step, replay, stretches)
        self.with_frames: I64 = np.flatnonzero(stretches.lengths).astype(np.int64)
        rows = min(MOST_ROWS, max(len(self.with_frames) // _threads(), LEAST_SHARE))
        self._measuring: list[tuple[Checker, I64, Future[Distances]]] = [
            ("float64 reference", block.rows, pool.submit(check_reference, block))
            for block in self.blocks(self.with_frames, rows)
        ]
        self._measuring += [
            ("torch", block.rows, pool.submit(check_torch, block))
            for block in self.blocks(self.with_frames, rows, checkers.call_frames)
        ]
        self.elements: Counter[Checker] = Counter()
        self._distances: dict[Checker, F64] = {
            name: np.zeros(len(stretches)) for name in ("stepped", "torch", "float64 reference")
        }
        self._settled: Bool = np.ones(len(stretches), np.bool_)
        self._findings: dict[int, Sequence[Comparison]] = {}

    def blocks(self, rows: I64, most_rows: int = MOST_ROWS, most_frames: int = LAST) -> Iterator[Block]:
        """Some of the stretches in blocks."""
        for of_block in plan_blocks(self.stretches.lengths, rows, most_rows, most_frames):
            yield Block(self._checkers, self.stretches, of_block, self._before, self.drift)

    def finish(self) -> None:
        """Wait for the end of the check."""
        count, checkers, stretches = len(self.stretches), self._checkers, self.stretches
        y, after, _ = self.stepped.result()
        frames, applied = stretches.frames, stretches.applied()
        of = np.repeat(np.arange(count), stretches.lengths)
        self._answered = np.bincount(of[frames.answered[applied]], minlength=count)
        self._differs: Bool = np.zeros(count, np.bool_)
        self._differs[of[(differ(y, frames.y) & frames.answered)[applied]]] = True
        for row, end in stretches.ends.items():
            self._differs[row] |= end.state.tobytes() != after[row].tobytes()
        for checker, rows, measured in self._measuring:
            self._take(checker, rows, measured.result())
        differing = np.flatnonzero(self._differs)
        if checkers.bits_required:
            self._settled[differing] = False
        else:
            for block in self.blocks(differing):
                self._take("stepped", block.rows, check_stepped(block, y, after[block.rows]))
        values = sum(leaf.elements for leaf in checkers.state.leaves)
        ends = sum(bool(stretches.lengths[row]) for row in stretches.ends)
        self.elements["stepped"] = int(self._answered.sum()) * frames.y.shape[1] + ends * values
        examined = [
            (block.rows, self._pool.submit(examine, block, y, after[block.rows]))
            for block in self.blocks(np.flatnonzero(~self._settled), most_frames=checkers.call_frames)
        ]
        for rows, task in examined:
            findings, self.drift[rows] = task.result()
            for row, of_row in zip(rows.tolist(), findings, strict=True):
                self._findings[row] = of_row
                for finding in of_row:
                    self._distances[finding.checker][row] = finding.largest

    def _take(self, checker: Checker, rows: I64, found: Distances) -> None:
        self._distances[checker][rows] = found.largest
        self._settled[rows] &= found.settled
        self.elements[checker] += found.elements

    def report(self, row: int, report: StreamReport) -> None:
        """Add the findings of a stretch."""
        stepped, torch, reference = (float(each[row]) for each in self._distances.values())
        frames, compared, findings = int(self.stretches.lengths[row]), int(self._answered[row]), self._findings.get(row)
        report.frames += compared
        report.not_compared += frames - compared
        report.max_difference = max(report.max_difference, stepped)
        report.max_distance = max(report.max_distance, torch)
        report.max_error = max(report.max_error, reference)
        undecided = {each.checker: each.undecided for each in findings or () if each.undecided is not None}
        if undecided and report.lossy_from is None:
            report.lossy_from = min(undecided.values())
        for finding in findings or ():
            if finding.first is not None:
                report.add_mismatch(finding.first)
        if self._differs[row]:
            report.worsen("not checked" if undecided.keys() & {"stepped", "torch"} else "within tolerance")
        elif compared or (frames and row in self.stretches.ends):
            report.worsen("exact")


def _step(replay: Replay, stretches: Stretches) -> tuple[F32, U8, float]:
    began = time.monotonic()
    y, after = replay.step(stretches)
    return y, after, time.monotonic() - began


def _compare_definition(
    blocks: Iterator[Block], after: U8, time_s: float, at_least: int
) -> tuple[list[tuple[I64, dict[int, Comparison], I64, int]], float]:
    """Return blocks' rows with the results of `check_definition`, and its duration."""
    began, found = time.monotonic(), []
    for block in blocks:
        if not at_least and time.monotonic() > began + time_s:
            break
        found.append((block.rows, *check_definition(block, after[block.rows], began + time_s, at_least)))
        at_least = 0
    return found, time.monotonic() - began


def _spread_out(rows: I64) -> I64:
    """Order rows so that every prefix is spread over all of them: first, middle, quarters and so on."""
    order = sorted(range(len(rows)), key=lambda at: f"{at:032b}"[::-1])
    spread: I64 = rows[order]
    return spread
