"""The three ways to compute a chunk again, each compared from the first frame to the last.

By itself, the reference is compared with `LeastBound` as the limit, and a replay with twice the floor of it. That
settles it unless something is farther off where bits need not be equal; then it ends at once. `check_with_bound` goes
all three ways side by side, with the bound itself (see `bound`), for which the reference has to run in float32, too. A
limit that decides nothing need not be known: what it finds where everything was settled is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from instep.core.typing import F32
from instep.models.base import Reference
from instep.models.gru.network import GruNetwork
from instep.verify.bound import F64, FLOOR, LEAST_RUNS, ErrorBound, LeastBound
from instep.verify.chunks import Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.conditions import Conditions
from instep.verify.networks import Networks
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.suspects import Suspect

PART_FRAMES: Final = 4096
"""What is computed frame by frame is computed and compared in parts of about so many, whose values stay in a cache."""

Found: TypeAlias = tuple[Comparison, Comparison, Comparison]
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
class Task:
    """A chunk to compute again."""

    ways: Ways
    chunk: Chunk
    suspects: Sequence[Suspect]
    """Its stretches, in its order."""
    is_over: Callable[[], bool]
    """Whether nobody will ask what is found."""

    @property
    def rows(self) -> int:
        """Of the chunk."""
        return len(self.suspects)

    def spans(self) -> Iterator[Span]:
        """The timesteps in order, until it is over."""
        for span in self.chunk.spans():
            if self.is_over():
                return
            yield span

    def parts(self, span: Span) -> Iterator[Span]:
        """Those of a span."""
        return span.parts(max(PART_FRAMES // max(self.rows, LEAST_RUNS), 1))

    def initial_states(self) -> F32:
        """[layers, R, hidden size]."""
        networks = self.ways.networks
        states = np.zeros((networks.state_layers, self.rows, networks.state_size), np.float32)
        for row, suspect in enumerate(self.suspects):
            if suspect.stretch.initial_state is not None:
                states[:, row] = suspect.stretch.initial_state
        return states

    def final_states(self) -> Iterator[tuple[int, int, F32]]:
        """Row, seq and state of the rows whose last state was recorded; none where it is over."""
        if self.is_over():
            return  # not all frames before them were computed
        for row, suspect in enumerate(self.suspects):
            if (state := suspect.final_state) is not None:
                yield row, int(self.chunk.first_seqs[row] + self.chunk.lengths[row]), state


def check_stepped(task: Task) -> Comparison:
    """Frame by frame."""
    stepped, h = _stepped(task), task.initial_states()
    with task.ways.networks.one() as network:
        for span in task.spans():
            for part in task.parts(span):
                y, h = _step(task, network, part, h)
                stepped.add_replay(part.starts, part.y, y, part.answered, _least(part))
                if task.is_over() or not is_settled(stepped):
                    return stepped
    _add_states(task, stepped, h, np.full(task.rows, 2 * FLOOR))
    return stepped


def check_whole(task: Task) -> Comparison:
    """All timesteps in one call, or in several where there are too many."""
    whole, h = _whole(task), task.initial_states()
    with task.ways.networks.one() as network:
        for span in task.spans():
            h = _call(task, network, span, h, whole, map(_least, task.parts(span)))
            if not is_settled(whole):
                break
    return whole


def check_truth(task: Task) -> Comparison:
    """With the reference in float64."""
    truth, h = _truth(task), task.initial_states().astype(np.float64)
    bound = LeastBound(task.rows)
    for span in task.spans():
        for part in task.parts(span):
            y, h = _true(task, part, h)
            truth.add_truth(part.starts, part.y, y, part.answered, bound.of_outputs(y, part.valid))
            if task.is_over() or not is_settled(truth):
                return truth
    _add_true_states(task, truth, h, bound.of_states(h))
    return truth


def is_settled(comparison: Comparison) -> bool:
    """Whether there is nothing to be found out by other means.

    Where bits are required, no limit counts; where the least bound holds, the bound does. What refutes a presumption
    has to be looked at by a certified machine.
    """
    return not comparison.is_refuted and (comparison.bits_required or not comparison.wrong.any())


def check_with_bound(task: Task) -> Found:
    """All ways side by side, since what is a difference in one depends on another."""
    stepped, whole, truth = _stepped(task), _whole(task), _truth(task)
    stepped_h = whole_h = task.initial_states()
    true_h = stepped_h.astype(np.float64)
    bound = ErrorBound(task.ways.rounded, stepped_h)
    with task.ways.networks.one() as network:
        for span in task.spans():
            limits = list[F64]()
            for part in task.parts(span):
                if task.is_over():
                    return stepped, whole, truth
                x, recorded = part.x, part.y
                true_y, true_h = _true(task, part, true_h)
                limit = bound.of_outputs(true_y, bound.run(x, part.active), part.valid)
                truth.add_truth(part.starts, recorded, true_y, part.answered, limit)
                y, stepped_h = _step(task, network, part, stepped_h)
                # Each side may be off by the bound.
                limits.append(2 * limit)
                stepped.add_replay(part.starts, recorded, y, part.answered, limits[-1])
            whole_h = _call(task, network, span, whole_h, whole, iter(limits))
    limit = bound.of_states(true_h)
    _add_true_states(task, truth, true_h, limit)
    _add_states(task, stepped, stepped_h, 2 * limit)
    return stepped, whole, truth


def _stepped(task: Task) -> Comparison:
    conditions = task.ways.conditions
    return Comparison("stepped", task.rows, conditions.step_bits, is_presumed=conditions.is_presumed)


def _whole(task: Task) -> Comparison:
    conditions = task.ways.conditions
    return Comparison("whole sequence", task.rows, conditions.whole_bits, is_presumed=conditions.is_presumed)


def _truth(task: Task) -> Comparison:
    return Comparison("float64 reference", task.rows, bits_required=False)


def _step(task: Task, network: GruNetwork, part: Span, h: F32) -> tuple[F32, F32]:
    return replay_stepped(network, task.ways.conditions.buckets, part.x, h, part.active)


def _true(task: Task, part: Span, h: F64) -> tuple[F64, F64]:
    y, state = task.ways.truth.run(part.x, {"h": h.swapaxes(0, 1)}, part.active)
    return y, state["h"].swapaxes(0, 1)


def _call(task: Task, network: GruNetwork, span: Span, h: F32, whole: Comparison, limits: Iterator[F64]) -> F32:
    """Compute a span in one call; compare it in parts, so that what was recorded need not be put together at once."""
    y, h = replay_whole(network, task.ways.conditions.buckets, span.x, h)
    start = 0
    for part, limit in zip(task.parts(span), limits, strict=True):
        whole.add_replay(part.starts, part.y, y[start : start + len(part)], part.answered, limit)
        start += len(part)
    return h


def _least(part: Span) -> F64:
    """Limits [T, R] of replays that settle what is within them: each side may be off by the bound, at any scale."""
    return np.broadcast_to(2 * FLOOR, part.valid.shape)


def _add_states(task: Task, stepped: Comparison, h: F32, limits: F64) -> None:
    for row, seq, state in task.final_states():
        stepped.add_replayed_state(row, seq, state, h[:, row], float(limits[row]))


def _add_true_states(task: Task, truth: Comparison, h: F64, limits: F64) -> None:
    for row, seq, state in task.final_states():
        truth.add_true_state(row, seq, state, h[:, row], float(limits[row]))
