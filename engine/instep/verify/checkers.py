"""The three checkers, each of which computes a chunk of streams again and compares it with the recording.

Alone, the reference is compared within `LeastBound` and a replay within twice the floor of it, which costs no run in
float32. That settles a stream unless something is farther off where bits need not be equal. What is left is checked
again by `check_with_bound`, which runs the three side by side, with the bound itself (see `bound`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import numpy as np

from instep.core.typing import F32, U8
from instep.models.base import RecurrentModel, Reference, StateSpec
from instep.verify.bound import F64, FLOOR, RUNS, ErrorBound, LeafLimits, LeastBound, Leaves, Limits
from instep.verify.chunks import LEAST_ROWS, Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.conditions import Conditions
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.stream_checks import StreamCheck

PART_FRAMES: Final = 4096
"""Frames computed and compared at once, about: few enough for their values to stay in a cache."""


@dataclass(frozen=True, slots=True)
class Checkers:
    """Everything that computes."""

    network: RecurrentModel
    """Steps, and computes whole sequences."""
    truth: Reference
    """In float64."""
    rounded: Reference
    """In float32."""
    conditions: Conditions
    stopped: Event
    """Set when nobody waits for the result any more: whatever runs then ends soon, with its comparison incomplete."""


@dataclass(frozen=True, slots=True)
class Task:
    """A chunk to compute again."""

    checkers: Checkers
    chunk: Chunk
    checks: Sequence[StreamCheck]
    """In the order of the chunk's rows."""

    @property
    def rows(self) -> int:
        """Streams side by side."""
        return len(self.checks)

    def spans(self) -> Iterator[Span]:
        """The timesteps in order, until it is stopped."""
        for span in self.chunk.spans():
            if self.checkers.stopped.is_set():
                return
            yield span

    def parts(self, span: Span, runs: int = 1) -> Iterator[Span]:
        """A span in parts of about `PART_FRAMES` over all runs, until it is stopped."""
        for part in span.parts(max(PART_FRAMES // max(self.rows * runs, LEAST_ROWS), 1)):
            if self.checkers.stopped.is_set():
                return
            yield part

    @property
    def state(self) -> StateSpec:
        """The specification of the states."""
        return self.checkers.network.state

    @property
    def float_leaves(self) -> list[str]:
        """The leaves that hold floats, which may be off where bits need not be equal."""
        return [leaf.name for leaf in self.state.leaves if leaf.dtype.kind == "f"]

    def initial_states(self) -> U8:
        """Rows of bytes [R, row_bytes]."""
        rows = self.state.initial(self.rows)
        for row, check in enumerate(self.checks):
            if check.initial_state is not None:
                rows[row] = check.initial_state
        return rows

    def initial_leaves(self, dtype: type[np.floating[Any]]) -> Leaves:
        """The same by leaf, [R, *shape], floats in this precision."""
        leaves = self.state.unpack(self.initial_states())
        return {name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf for name, leaf in leaves.items()}


def check_stepped(task: Task) -> Comparison:
    """Replay frame by frame."""
    stepped, states = _stepped(task), task.initial_states()
    for span in task.spans():
        for part in task.parts(span):
            y, states = _step(task, part, states)
            stepped.add_replay(part.starts, part.y, y, part.answered, _least(part.valid.shape))
    _add_states(task, stepped, states, dict.fromkeys(task.float_leaves, _least((task.rows,))))
    return stepped


def check_whole(task: Task) -> Comparison:
    """Replay all timesteps in one call, or in several where they do not fit into memory."""
    whole, states = _whole(task), task.initial_states()
    for span in task.spans():
        parts = ((part, _least(part.valid.shape)) for part in task.parts(span))
        states = _call(task, span, states, whole, parts)
    return whole


def check_reference(task: Task) -> Comparison:
    """Compute in float64."""
    reference, leaves = _reference(task), task.initial_leaves(np.float64)
    bound = LeastBound(task.rows)
    for span in task.spans():
        for part in task.parts(span):
            y, leaves = _true(task, part, leaves)
            reference.add_truth(part.starts, part.y, y, part.answered, bound.outputs(y, part.valid))
    _add_true_states(task, reference, leaves, bound.states(leaves))
    return reference


def check_with_bound(task: Task) -> tuple[Comparison, Comparison, Comparison]:
    """Stepped, whole sequence and reference side by side, within the bound of each stream."""
    stepped, whole, reference = _stepped(task), _whole(task), _reference(task)
    stepped_states = whole_states = task.initial_states()
    true_leaves = task.initial_leaves(np.float64)
    bound = ErrorBound(task.checkers.rounded, task.initial_leaves(np.float32))
    for span in task.spans():
        parts: list[tuple[Span, Limits]] = []
        for part in task.parts(span, RUNS):
            x, recorded = part.x, part.y
            true_y, true_leaves = _true(task, part, true_leaves)
            limits = bound.outputs(x, true_y, part.valid, part.active)
            reference.add_truth(part.starts, recorded, true_y, part.answered, limits)
            y, stepped_states = _step(task, part, stepped_states)
            parts.append((part, limits.doubled()))
            stepped.add_replay(part.starts, recorded, y, part.answered, parts[-1][1])
        whole_states = _call(task, span, whole_states, whole, iter(parts))
    state_limits = bound.states(true_leaves)
    _add_true_states(task, reference, true_leaves, state_limits)
    _add_states(task, stepped, stepped_states, {name: leaf.doubled() for name, leaf in state_limits.items()})
    return stepped, whole, reference


def _stepped(task: Task) -> Comparison:
    return Comparison("stepped", task.rows, task.checkers.conditions.step_bits)


def _whole(task: Task) -> Comparison:
    return Comparison("whole sequence", task.rows, task.checkers.conditions.whole_bits)


def _reference(task: Task) -> Comparison:
    return Comparison("float64 reference", task.rows, bits_required=False)


def _step(task: Task, part: Span, states: U8) -> tuple[F32, U8]:
    return replay_stepped(task.checkers.network, task.checkers.conditions.buckets, part.x, states, part.active)


def _true(task: Task, part: Span, leaves: Leaves) -> tuple[F64, Leaves]:
    return task.checkers.truth.run(part.x, leaves, part.active)


def _call(task: Task, span: Span, states: U8, whole: Comparison, parts: Iterator[tuple[Span, Limits]]) -> U8:
    """Compute a span in one call and compare it in parts, so that its recorded outputs need not be gathered at once."""
    y, states = replay_whole(task.checkers.network, task.checkers.conditions.buckets, span.x, states)
    start = 0
    for part, limits in parts:
        whole.add_replay(part.starts, part.y, y[start : start + len(part)], part.answered, limits)
        start += len(part)
    return states


def _least(shape: tuple[int, ...]) -> Limits:
    """Limits that settle a replay at any scale: each side may be off by the floor of the bound."""
    distance: F64 = np.broadcast_to(2 * FLOOR, shape)
    return Limits(distance, np.broadcast_to(np.False_, shape))


def _add_states(task: Task, stepped: Comparison, states: U8, limits: LeafLimits) -> None:
    if not task.checkers.stopped.is_set():  # otherwise not all frames before them were computed
        for row, check in enumerate(task.checks):
            if check.final_state is not None:
                both = (check.final_state, states[row])
                stepped.add_replayed_state(row, check.next_seq, task.state, *both, limits, check.place)


def _add_true_states(task: Task, reference: Comparison, leaves: Leaves, limits: LeafLimits) -> None:
    if not task.checkers.stopped.is_set():
        for row, check in enumerate(task.checks):
            if check.final_state is not None:
                truth = {name: leaf[row] for name, leaf in leaves.items()}
                both = (check.final_state, truth)
                reference.add_true_state(row, check.next_seq, task.state, *both, limits, check.place)
