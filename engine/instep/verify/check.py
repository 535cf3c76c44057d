"""One chunk of streams, computed again in three ways and compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import Final

import numpy as np

from instep.core.typing import F32
from instep.model.network import Network
from instep.recording.records import StreamInfo
from instep.recording.sequences import Stretch
from instep.verify.bound import F64, LEAST_RUNS, ErrorBound
from instep.verify.chunks import Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.conditions import Conditions
from instep.verify.reference import Reference
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.report import Place, StreamReport, Verdict

PART_FRAMES: Final = 4096
"""What is computed frame by frame is computed and compared in parts of about so many, whose values stay in a cache."""
AHEAD: Final = 2
"""Parts that are computed or wait for it while an earlier one is compared."""


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
    """A part of a span and what comes out of it: outputs and states, but for the bound, which keeps its states."""

    part: Span
    truth: Future[tuple[F64, F64]]
    rounded: Future[F32]
    stepped: Future[tuple[F32, F32]]


class ChunkCheck:
    """Checks the stretches of a chunk; call `start`, `advance` and `finish`.

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
        self._part_steps = max(PART_FRAMES // max(rows, LEAST_RUNS), 1)
        self._initial_states = self._stack_initial_states()
        self._spans = chunk.spans()
        self._whole: Future[tuple[F32, F32]] | None = None
        """Of the newest span."""
        self._last: _Answers | None = None
        """The newest part."""
        self._waiting: deque[_Answers] = deque()
        """Parts that are not compared yet."""
        self._bound = ErrorBound(ways.rounded, self._initial_states)
        self.stepped = Comparison("stepped", rows, ways.conditions.step_bits)
        self.whole = Comparison("whole sequence", rows, ways.conditions.whole_bits)
        self.truth = Comparison("float64 reference", rows, bits_required=False)

    def start(self) -> None:
        """Begin to compute; once all of an earlier chunk is submitted."""
        self._begin_span(next(self._spans))

    def advance(self) -> None:
        """Have everything computed, and compare all of it but the end."""
        while True:
            for part in self._span.parts(self._part_steps):
                # While a part is computed, the one before it is compared.
                self._last = self._submit(part, self._last)
                self._waiting.append(self._last)
                if len(self._waiting) > AHEAD:
                    self._compare(self._waiting.popleft())
            span = next(self._spans, None)
            if span is None:
                break
            self._end_span()
            self._begin_span(span)
        assert self._whole is not None, "a span was begun"
        wait([self._whole])  # the next chunk's call is of the same network, which is for one thread at a time

    def finish(self) -> list[StreamReport]:
        """Compare the rest and report, in the order of the chunk."""
        self._end_span()
        assert self._last is not None, "a chunk has frames"
        (_, stepped_h), (_, truth_h) = self._last.stepped.result(), self._last.truth.result()
        limits = self._bound.of_states(truth_h).tolist()
        for row, suspect in enumerate(self._suspects):
            if (state := suspect.final_state) is not None:
                seq = int(self._chunk.first_seqs[row] + self._chunk.lengths[row])
                self.stepped.add_replayed_state(row, seq, state, stepped_h[:, row], 2 * limits[row], suspect.place)
                self.truth.add_true_state(row, seq, state, truth_h[:, row], limits[row], suspect.place)
        return [self._report(row) for row in range(len(self._suspects))]

    def _begin_span(self, span: Span) -> None:
        self._span = span
        self._limits = list[F64]()
        self._whole = self._submit_whole(span, self._whole)

    def _end_span(self) -> None:
        while self._waiting:
            self._compare(self._waiting.popleft())
        assert self._whole is not None, "a span was begun"
        span, (whole_y, _) = self._span, self._whole.result()
        self.whole.add_replay(span.starts, span.y, whole_y, span.answered, 2 * np.concatenate(self._limits))

    def _submit_whole(self, span: Span, before: Future[tuple[F32, F32]] | None) -> Future[tuple[F32, F32]]:
        """Have a span computed in one call, as soon as that for the span before is done."""
        network, buckets = self._ways.whole, self._ways.conditions.buckets

        def whole() -> tuple[F32, F32]:
            return replay_whole(
                network, buckets, span.x, self._initial_states if before is None else before.result()[1]
            )

        return self._pool.submit(whole)

    def _submit(self, part: Span, before: _Answers | None) -> _Answers:
        """Have a part of a span computed in the other ways, each as soon as it has done the part before."""
        ways, submit, initial = self._ways, self._pool.submit, self._initial_states

        def truth() -> tuple[F64, F64]:
            return ways.truth.run(part.x, initial if before is None else before.truth.result()[1], part.active)

        def rounded() -> F32:
            if before is not None:
                before.rounded.result()
            return self._bound.run(part.x, part.active)

        def stepped() -> tuple[F32, F32]:
            h = initial if before is None else before.stepped.result()[1]
            return replay_stepped(ways.stepped, ways.conditions.buckets, part.x, h, part.active)

        # The longest first, so that the others fit beside it.
        return _Answers(part, submit(truth), submit(rounded), submit(stepped))

    def _compare(self, answers: _Answers) -> None:
        part, (truth_y, _) = answers.part, answers.truth.result()
        limit = self._bound.of_outputs(truth_y, answers.rounded.result(), part.valid)
        self.truth.add_truth(part.starts, part.y, truth_y, part.answered, limit)
        self.stepped.add_replay(part.starts, part.y, answers.stepped.result()[0], part.answered, 2 * limit)
        self._limits.append(limit)

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
