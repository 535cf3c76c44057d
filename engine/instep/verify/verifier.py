"""Verification: compute a whole recording again in four ways, and compare with what was served.

1. **Stepped**: every frame by the compiled step, from the recorded initial state, streams side by side.
2. **Definition**: by the second program of the same arithmetic, as many frames as it computes in about the time of 1.
3. **torch**: whole sequences by torch's own module, if the kind of model has one. (A sequence too long for memory goes
   in several calls, the state carried.)
4. **float64 reference**: written independently, from the original weights; it bounds the true error (see `bound`). That
   of a graph is the graph in float64, which bounds what rounding does, and the report says so. A kind may have none.

Where the engine computed in `portable-1`, bits must be equal in 1 and 2, whichever machines recorded and verify. Other
engines promise no bits: 1 must be within twice the bound, since each side may be off by one, and 2 is left out. In 3,
values must always be within twice the bound, and in 4 within the bound. Where frames or states are too large for the
bound to mean anything (see `bound`), or there is no reference, equal bits are enough, and the report names the first
such frame; where bits need not be equal either, the stream counts as not checked.

Final states and those of checkpoints are compared in 1, 2 and 4. Every frame of a stream must be there, once and
in order, and so must every state of a checkpoint. A stream is checked anew from every reset of its state. Frames
whose outputs were not recorded, because the engine was killed while it computed them, are replayed but not compared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count, groupby, islice
from operator import attrgetter
from threading import Event
from typing import Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import I64
from instep.models.base import Reference
from instep.models.model import Model
from instep.models.numerics import one_thread, threads_as_here
from instep.recording.inspection import how_it_ends, where_it_begins
from instep.recording.reader import RecordingReader
from instep.runtime.executor import usable_cores
from instep.verify.checkers import CHECK_LIMITS, Checkers, CheckLimits, Task, check_definition
from instep.verify.checkpoints import StoredCheckpoints
from instep.verify.chunk_check import ChunkCheck
from instep.verify.chunks import MOST_ROWS, WHOLE_ROWS, Chunk, plan_chunks
from instep.verify.comparison import Comparison
from instep.verify.recorded_model import recorded_network, why_not_bits
from instep.verify.report import (
    Checker,
    Coverage,
    Divergence,
    ReferenceKind,
    Report,
    StreamReport,
    join_reports,
)
from instep.verify.stream_checks import StreamChecks

Stage: TypeAlias = Literal["reading", "replaying", "definition"]
STAGES: Final[tuple[Stage, ...]] = ("reading", "replaying", "definition")
Progress: TypeAlias = Callable[[Stage, float], None]
"""Called with the stage and the share (0 to 1) of it that is done."""

MOST_THREADS: Final = 4
"""More threads, even on more cores, would only take their caches from each other."""
AHEAD: Final = 2
"""Chunks that are computed or queued while the one before them is finished."""
LEAST_SHARE: Final = 64
"""Streams are shared out among threads, but a chunk of fewer than this would cost more than it gains."""


def verify(
    reader: RecordingReader,
    model: Model,
    wanted: Sequence[str],
    on_progress: Progress,
    limits: CheckLimits = CHECK_LIMITS,
) -> Report:
    """Check every stream of a recording, or those of some names or numbers.

    Args:
        reader: the recording, just opened.
        model: the recorded model; the caller compares it with the one that the header names.
        wanted: names and numbers; none for all streams.
        on_progress: see `Progress`.
        limits: of what is computed at once.

    Raises:
        CannotVerify: when there is nothing to check.
        RecordingError: when the recording is damaged.
        NoSuchStream: when it has no such stream.
    """
    began = time.monotonic()
    stopped = Event()
    with one_thread(), ThreadPoolExecutor(_threads(), "instep-verify", threads_as_here()) as pool:
        try:
            checkpoints = StoredCheckpoints(reader)
            reader.check_positions()
            notes = why_not_bits([engine.header for engine in reader.engines])
            made = pool.submit(make_checkers, model, notes, stopped, limits)  # while it is read
            initial = model.state.initial(1)[0]
            streams = StreamChecks(reader, wanted, checkpoints, initial, lambda share: on_progress("reading", share))
            streams.require_outputs(wanted)
            check = _Check(made.result(), streams, pool)
            stepped_s = check.replay(lambda share: on_progress("replaying", share))
            definition = check.compare_definition(stepped_s, lambda share: on_progress("definition", share))
        finally:
            stopped.set()
    return Report(
        file=reader.path,
        model_name=model.name,
        fingerprint=model.fingerprint,
        streams=tuple(
            join_reports(list(of_stream)) for _, of_stream in groupby(check.reports, key=attrgetter("stream"))
        ),
        ending=how_it_ends(reader),
        finished=reader.finished,
        trimmed=where_it_begins(reader),
        notes=check.checkers.notes,
        seconds=time.monotonic() - began,
        elements=check.elements,
        definition=definition,
        reference=_kind_of(check.checkers.truth),
    )


def make_checkers(model: Model, notes: tuple[str, ...], stopped: Event, limits: CheckLimits = CHECK_LIMITS) -> Checkers:
    """Build the network, to compare within the bound where `notes` say why bits need not be equal."""
    network = recorded_network(model)
    references = network.reference(np.float64), network.reference(np.float32)
    truth, rounded = references if None not in references else (None, None)
    return Checkers(network, truth, rounded, notes, stopped, limits)


def _kind_of(truth: Reference | None) -> ReferenceKind:
    return "none" if truth is None else "independent" if truth.independent else "same graph"


class _Check:
    """All checks of a recording.

    Attributes:
        reports: one for each of `streams.checks`, in order.
        elements: how many elements each checker compared.
    """

    def __init__(self, checkers: Checkers, streams: StreamChecks, pool: Executor) -> None:
        self.checkers = checkers
        self._checks, self._sequences = streams.checks, streams.sequences
        self._pool = pool
        self._first_seqs: I64 = np.array([check.first_seq for check in streams.checks], np.int64)
        self.reports: list[StreamReport] = [check.report_without_frames() for check in streams.checks]
        self.elements: dict[Checker, int] = {"stepped": 0, "definition": 0, "torch": 0, "float64 reference": 0}

    def replay(self, on_progress: Callable[[float], None]) -> float:
        """Check everything in all ways but by the definition; how long stepping took, in seconds."""
        share = max(len(self._checks) // _threads(), LEAST_SHARE)
        lengths: I64 = np.array([check.frames for check in self._checks], np.int64)
        chunks = map(self._chunk, plan_chunks(lengths, min(MOST_ROWS, share)))
        total, done, stepped_s = int(lengths.sum()), 0, 0.0
        begun: deque[tuple[Chunk, ChunkCheck]] = deque()
        while True:
            for chunk in islice(chunks, AHEAD + 1 - len(begun)):
                checks = [self._checks[row] for row in chunk.rows.tolist()]
                begun.append((chunk, ChunkCheck(self.checkers, chunk, checks, self._pool)))
            if not begun:
                return stepped_s
            chunk, check = begun.popleft()
            for row, report in zip(chunk.rows.tolist(), check.finish(), strict=True):
                self.reports[row] = report
            for comparison in (check.stepped, check.torch, check.reference):
                self.elements[comparison.checker] += comparison.elements
            stepped_s += check.stepped_s
            done += int(chunk.lengths.sum())
            on_progress(done / total)

    def compare_definition(self, stepped_s: float, on_progress: Callable[[float], None]) -> Coverage:
        """Compare with the definition for about as long as stepping took, whatever is next in `_spread_out`."""
        if not self.checkers.bits_required:
            return Coverage()
        rows = _spread_out([at for at, check in enumerate(self._checks) if check.frames])
        parts = (rows[first : first + WHOLE_ROWS] for first in range(0, len(rows), WHOLE_ROWS))
        chunks = [sorted(part, key=lambda at: -self._checks[at].frames) for part in parts]
        began, time_s = time.monotonic(), max(stepped_s / _threads(), self.checkers.limits.definition_s)
        check = partial(self._check_definition, ends_s=began + time_s)
        streams, total = set[int](), 0
        for done, (chunk, (found, frames)) in enumerate(
            zip(chunks, self._pool.map(check, chunks, count()), strict=True), 1
        ):
            for row, divergence in found.first.items():
                self._add_mismatch(chunk[row], divergence)
            self.elements["definition"] += found.elements
            streams.update(self._checks[chunk[row]].info.stream for row in np.flatnonzero(frames).tolist())
            total += int(frames.sum())
            on_progress(min(1.0, max(done / len(chunks), (time.monotonic() - began) / time_s)))
        return Coverage(len(streams), total)

    def _check_definition(self, rows: list[int], number: int, ends_s: float) -> tuple[Comparison, I64]:
        task = Task(self.checkers, self._chunk(np.array(rows)), [self._checks[at] for at in rows])
        return check_definition(task, ends_s, at_least=int(not number))

    def _add_mismatch(self, at: int, divergence: Divergence) -> None:
        report = self.reports[at]
        problems = (*report.problems, divergence.sentence())
        self.reports[at] = replace(
            report, verdict="mismatch", problems=problems, divergence=report.divergence or divergence
        )

    def _chunk(self, rows: I64) -> Chunk:
        """Frames of some checks, in bounded pieces."""
        assert self._sequences is not None, "checks without frames are in no chunk"
        in_between = 3 * self.checkers.network.state.row_bytes // 4  # more than the gates of recurrent layers
        widest = max(self._sequences.x.shape[1], self._sequences.y.shape[1], in_between)
        most_frames = max(self.checkers.limits.call_bytes // (8 * widest), 1)
        return Chunk(self._sequences, self._first_seqs, rows, most_frames)


def _spread_out(rows: list[int]) -> list[int]:
    """The first, the middle, the quarters and so on: every beginning of this order is spread over all of them."""
    order = sorted(range(len(rows)), key=lambda at: f"{at:032b}"[::-1])
    return [rows[at] for at in order]


def _threads() -> int:
    return min(usable_cores(), MOST_THREADS)
