"""One chunk of streams, computed again in three ways, each by itself, and compared.

Each way is computed and compared from the first frame to the last without waiting for another, in a thread of the pool,
with `LeastBound` as the limit. That settles a chunk unless something is farther off. Then it is checked once more, all
ways side by side, with the bound itself (see `bound`), for which the reference has to run in float32, too. A limit that
decides nothing need not be known: the result is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from instep.core.typing import F32
from instep.model.network import Network
from instep.recording.records import StreamInfo
from instep.recording.sequences import Stretch
from instep.verify.bound import F64, FLOOR, LEAST_RUNS, ErrorBound, LeastBound
from instep.verify.chunks import Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.conditions import Conditions
from instep.verify.networks import Networks
from instep.verify.reference import Reference
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.report import Place, StreamReport, Verdict, Way

PART_FRAMES: Final = 4096
"""What is computed frame by frame is computed and compared in parts of about so many, whose values stay in a cache."""

_Found: TypeAlias = tuple[Comparison, Comparison, Comparison]
"""Stepped, whole sequence, float64 reference."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What computes."""

    networks: Networks
    """For stepping and for whole sequences."""
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


class ChunkCheck:
    """Checks the stretches of a chunk, from when it is made; `finish` waits for the end.

    Args:
        ways: what computes.
        chunk: their frames.
        suspects: the stretches, in the order of the chunk.
        pool: where it is done.
        at_least: whether to try `LeastBound` first.
    """

    def __init__(
        self, ways: Ways, chunk: Chunk, suspects: Sequence[Suspect], pool: Executor, *, at_least: bool
    ) -> None:
        self._ways = ways
        self._chunk = chunk
        self._suspects = suspects
        self._pool = pool
        self._part_steps = max(PART_FRAMES // max(len(suspects), LEAST_RUNS), 1)
        self._initial_states = self._stack_initial_states()
        self._lock = threading.Lock()
        self._stopped = False
        self._by_itself: list[Future[Comparison]] = []
        self._with_bound: Future[_Found] | None = None
        if at_least:
            # The longest first, so that the shortest ends the work.
            truth, whole, stepped = map(pool.submit, (self._check_truth, self._check_whole, self._check_stepped))
            self._by_itself = [stepped, whole, truth]
        else:
            self._ask_for_bound()

    def finish(self) -> list[StreamReport]:
        """Wait for all of it, and report in the order of the chunk."""
        found = [way.result() for way in self._by_itself]
        if self._with_bound is not None:
            found = list(self._with_bound.result())
        self.stepped, self.whole, self.truth = found
        return [self._report(row) for row in range(len(self._suspects))]

    @property
    def needed_bound(self) -> bool:
        """Whether `LeastBound` did not settle it."""
        return self._with_bound is not None

    def stop(self) -> None:
        """Have it end soon, wherever it is; nobody will ask what it found."""
        self._stopped = True

    def _check_truth(self) -> Comparison:
        comparison, h = self._comparison("float64 reference"), self._initial_states.astype(np.float64)
        bound = LeastBound(len(self._suspects))
        for part in self._parts():
            y, h = self._ways.truth.run(part.x, h, part.active)
            comparison.add_truth(part.starts, part.y, y, part.answered, bound.of_outputs(y, part.valid))
            self._check_settled(comparison)
        self._add_true_states(comparison, h, bound.of_states(h))
        return self._check_settled(comparison)

    def _check_stepped(self) -> Comparison:
        comparison, h = self._comparison("stepped"), self._initial_states
        with self._ways.networks.one() as network:
            for part in self._parts():
                y, h = self._step(network, part, h)
                comparison.add_replay(part.starts, part.y, y, part.answered, _least(part))
                self._check_settled(comparison)
        self._add_states(comparison, h, np.full(len(self._suspects), 2 * FLOOR))
        return self._check_settled(comparison)

    def _check_whole(self) -> Comparison:
        comparison, h = self._comparison("whole sequence"), self._initial_states
        with self._ways.networks.one() as network:
            for span in self._chunk.spans():
                if self._stopped or self.needed_bound:
                    break
                y, h = replay_whole(network, self._ways.conditions.buckets, span.x, h)
                self._compare_whole(comparison, span, y, map(_least, span.parts(self._part_steps)))
                self._check_settled(comparison)
        return comparison

    def _check_with_bound(self) -> _Found:
        """All ways side by side, since what is a difference in one depends on another."""
        stepped, whole = self._comparison("stepped"), self._comparison("whole sequence")
        truth = self._comparison("float64 reference")
        bound = ErrorBound(self._ways.rounded, self._initial_states)
        true_h, stepped_h = self._initial_states.astype(np.float64), self._initial_states
        whole_h = stepped_h
        with self._ways.networks.one() as network:
            for span in self._chunk.spans():
                limits = list[F64]()
                for part in span.parts(self._part_steps):
                    if self._stopped:
                        return stepped, whole, truth
                    x, recorded = part.x, part.y
                    true_y, true_h = self._ways.truth.run(x, true_h, part.active)
                    limit = bound.of_outputs(true_y, bound.run(x, part.active), part.valid)
                    truth.add_truth(part.starts, recorded, true_y, part.answered, limit)
                    y, stepped_h = self._step(network, part, stepped_h)
                    # Each side may be off by the bound.
                    limits.append(2 * limit)
                    stepped.add_replay(part.starts, recorded, y, part.answered, limits[-1])
                y, whole_h = replay_whole(network, self._ways.conditions.buckets, span.x, whole_h)
                self._compare_whole(whole, span, y, iter(limits))
        limit = bound.of_states(true_h)
        self._add_true_states(truth, true_h, limit)
        self._add_states(stepped, stepped_h, 2 * limit)
        return stepped, whole, truth

    def _ask_for_bound(self) -> None:
        with self._lock:  # one of three threads, once
            if self._with_bound is None:
                self._with_bound = self._pool.submit(self._check_with_bound)

    def _check_settled(self, comparison: Comparison) -> Comparison:
        """Where bits are required, no limit counts; else what is beyond the least one may not be beyond the bound."""
        if comparison.wrong.any() and not comparison.bits_required:
            self._ask_for_bound()
        return comparison

    def _parts(self) -> Iterator[Span]:
        """The timesteps in order, until there is no need to go on."""
        for span in self._chunk.spans():
            for part in span.parts(self._part_steps):
                if self._stopped or self.needed_bound:
                    return
                yield part

    def _step(self, network: Network, part: Span, h: F32) -> tuple[F32, F32]:
        return replay_stepped(network, self._ways.conditions.buckets, part.x, h, part.active)

    def _compare_whole(self, comparison: Comparison, span: Span, y: F32, limits: Iterator[F64]) -> None:
        """In parts, with their limits, so that what was recorded need not be put together at once."""
        start = 0
        for part, limit in zip(span.parts(self._part_steps), limits, strict=True):
            comparison.add_replay(part.starts, part.y, y[start : start + len(part)], part.answered, limit)
            start += len(part)

    def _comparison(self, way: Way) -> Comparison:
        conditions = self._ways.conditions
        required = {"stepped": conditions.step_bits, "whole sequence": conditions.whole_bits}.get(way, False)
        return Comparison(way, len(self._suspects), required)

    def _add_states(self, stepped: Comparison, h: F32, limits: F64) -> None:
        for row, seq, state, place in self._last_states():
            stepped.add_replayed_state(row, seq, state, h[:, row], float(limits[row]), place)

    def _add_true_states(self, truth: Comparison, h: F64, limits: F64) -> None:
        for row, seq, state, place in self._last_states():
            truth.add_true_state(row, seq, state, h[:, row], float(limits[row]), place)

    def _last_states(self) -> Iterator[tuple[int, int, F32, Place]]:
        """Of rows whose last state was recorded: row, seq, state and where that is."""
        for row, suspect in enumerate(self._suspects):
            if (state := suspect.final_state) is not None:
                seq = int(self._chunk.first_seqs[row] + self._chunk.lengths[row])
                yield row, seq, state, suspect.place

    def _stack_initial_states(self) -> F32:
        """[layers, R, hidden size]."""
        network = self._ways.networks
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


def _least(part: Span) -> F64:
    """Limits [T, R] of replays that settle what is within them: each side may be off by the bound, at any scale."""
    return np.broadcast_to(2 * FLOOR, part.valid.shape)
