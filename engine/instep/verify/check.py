"""One chunk of streams, computed again in three ways and compared."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from instep.core.typing import F32
from instep.model.network import Network
from instep.recording.records import StreamInfo
from instep.recording.sequences import Stretch
from instep.verify.bound import F64, ErrorBound
from instep.verify.chunks import Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.conditions import Conditions
from instep.verify.reference import Reference
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.report import Place, StreamReport, Verdict


@dataclass(frozen=True, slots=True)
class Ways:
    """What computes. The two networks are one model twice, so that two threads can use them."""

    stepped: Network
    whole: Network
    truth: Reference
    """In float64."""
    rounded: Reference
    """In float32."""
    conditions: Conditions


@dataclass(frozen=True, slots=True)
class Suspect:
    """A stretch of a stream to check and what the index found wrong with it, if anything."""

    info: StreamInfo
    stretch: Stretch
    unanswered: int
    """How many of its frames have no recorded outputs."""
    defect: str | None
    carried_state: F32 | None = None
    """The state with which it goes on in the next file; None where it does not."""

    @property
    def final_state(self) -> F32 | None:
        """The recorded last state; None also after a defect, where it is not that of the frames before."""
        if self.defect is not None:
            return None
        return self.stretch.final_state if self.carried_state is None else self.carried_state

    @property
    def place(self) -> Place:
        """Where that was recorded."""
        return "final state" if self.carried_state is None else "state in the next file"


@dataclass(frozen=True, slots=True)
class _Answers:
    """A span and what comes out of it: outputs and the states after it, but for the bound, which keeps its states."""

    span: Span
    truth: Future[tuple[F64, F64]]
    rounded: Future[F32]
    stepped: Future[tuple[F32, F32]]
    whole: Future[tuple[F32, F32]]


class ChunkCheck:
    """Checks the stretches of a chunk.

    Args:
        ways: what computes.
        chunk: their frames.
        suspects: the stretches, in the order of the chunk.
        pool: computes the ways beside each other; it begins what it is given in that order.
    """

    def __init__(self, ways: Ways, chunk: Chunk, suspects: Sequence[Suspect], pool: Executor) -> None:
        rows = len(suspects)
        self._ways = ways
        self._chunk = chunk
        self._suspects = suspects
        self._pool = pool
        self._initial_states = self._stack_initial_states()
        self._bound = ErrorBound(ways.rounded, self._initial_states)
        self.stepped = Comparison("stepped", rows, ways.conditions.step_bits)
        self.whole = Comparison("whole sequence", rows, ways.conditions.whole_bits)
        self.truth = Comparison("float64 reference", rows, bits_required=False)

    def run(self) -> list[StreamReport]:
        """Check and report, in the order of the chunk."""
        pending: _Answers | None = None
        for span in self._chunk.spans():
            # While this span is computed, the one before it is compared.
            following = self._submit(span, pending)
            if pending is not None:
                self._compare(pending)
            pending = following
        assert pending is not None, "a chunk has frames"
        self._compare(pending)
        (_, stepped_h), (_, truth_h) = pending.stepped.result(), pending.truth.result()
        limits = self._bound.of_states(truth_h).tolist()
        for row, suspect in enumerate(self._suspects):
            if (state := suspect.final_state) is not None:
                seq = int(self._chunk.first_seqs[row] + self._chunk.lengths[row])
                self.stepped.add_replayed_state(row, seq, state, stepped_h[:, row], 2 * limits[row], suspect.place)
                self.truth.add_true_state(row, seq, state, truth_h[:, row], limits[row], suspect.place)
        return [self._report(row) for row in range(len(self._suspects))]

    def _submit(self, span: Span, before: _Answers | None) -> _Answers:
        """Have a span computed in every way, each as soon as it has done the span before."""
        ways, buckets, submit = self._ways, self._ways.conditions.buckets, self._pool.submit
        initial = self._initial_states

        def truth() -> tuple[F64, F64]:
            h = initial if before is None else before.truth.result()[1]
            return ways.truth.run(span.x, h, span.active)

        def rounded() -> F32:
            if before is not None:
                before.rounded.result()
            return self._bound.run(span.x, span.active)

        def stepped() -> tuple[F32, F32]:
            h = initial if before is None else before.stepped.result()[1]
            return replay_stepped(ways.stepped, buckets, span.x, h, span.active)

        def whole() -> tuple[F32, F32]:
            h = initial if before is None else before.whole.result()[1]
            return replay_whole(ways.whole, buckets, span.x, h)

        # The longest first, so that the others fit beside it.
        return _Answers(span, submit(truth), submit(rounded), submit(stepped), submit(whole))

    def _compare(self, answers: _Answers) -> None:
        span = answers.span
        truth_y, _ = answers.truth.result()
        limit = self._bound.of_outputs(truth_y, answers.rounded.result(), span.valid)
        self.truth.add_truth(span.starts, span.y, truth_y, span.answered, limit)
        self.stepped.add_replay(span.starts, span.y, answers.stepped.result()[0], span.answered, 2 * limit)
        self.whole.add_replay(span.starts, span.y, answers.whole.result()[0], span.answered, 2 * limit)

    def _stack_initial_states(self) -> F32:
        """[layers, R, hidden size]."""
        network = self._ways.stepped
        states = np.zeros((network.state_layers, len(self._suspects), network.state_size), np.float32)
        for row, suspect in enumerate(self._suspects):
            if suspect.stretch.initial_state is not None:
                states[:, row] = suspect.stretch.initial_state
        return states

    def _report(self, row: int) -> StreamReport:
        suspect = self._suspects[row]
        comparisons = (self.stepped, self.whole, self.truth)
        problems = [] if suspect.defect is None else [suspect.defect]
        problems += [comparison.first[row].sentence() for comparison in comparisons if comparison.wrong[row]]
        compared = int(self._chunk.lengths[row]) - suspect.unanswered
        verdict: Verdict = "exact" if compared or suspect.final_state is not None else "empty"
        if problems:
            verdict = "mismatch"
        elif self.stepped.differs[row] or self.whole.differs[row]:
            verdict = "within tolerance"
        wrong_first = sorted((item for item in comparisons if row in item.first), key=lambda item: not item.wrong[row])
        return StreamReport(
            stream=suspect.info.stream,
            name=suspect.info.name,
            frames=compared,
            not_compared=suspect.unanswered,
            verdict=verdict,
            problems=tuple(problems),
            divergence=wrong_first[0].first[row] if wrong_first else None,
            max_ulp=int(max(self.stepped.max_ulp[row], self.whole.max_ulp[row])),
            max_error=float(self.truth.max_error[row]),
        )


def check_without_frames(suspect: Suspect) -> StreamReport:
    """A stretch without frames: its final state must be its initial one."""
    problems = [] if suspect.defect is None else [suspect.defect]
    final = suspect.final_state
    if final is not None:
        initial = np.zeros_like(final) if suspect.stretch.initial_state is None else suspect.stretch.initial_state
        if final.tobytes() != initial.tobytes():
            problems.append(f"it has no frames, but its {suspect.place} is not its initial state")
    return StreamReport(
        stream=suspect.info.stream,
        name=suspect.info.name,
        frames=0,
        not_compared=0,
        verdict="mismatch" if problems else "empty",
        problems=tuple(problems),
        divergence=None,
        max_ulp=0,
        max_error=0.0,
    )
