"""The three checkers, each of which computes a chunk of streams again and compares it with the recording.

Alone, the reference is compared within `LeastBound` and a replay within twice the floor of it, which costs no run in
float32. That settles a stream unless something is farther off where bits need not be equal. What is left is checked
again by `check_with_bound`, which runs the three side by side, with the bound itself (see `bound`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Final

import numpy as np

from instep.core.typing import F32, U8
from instep.models.base import RecurrentModel, Reference
from instep.verify.bound import F64, FLOOR, RUNS, ErrorBound, LeastBound, Limits
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

    def initial_states(self) -> F32:
        """[layers, R, hidden size]."""
        spec = self.checkers.network.state
        rows = spec.initial(self.rows)
        for row, check in enumerate(self.checks):
            if check.initial_state is not None:
                rows[row] = check.initial_state
        return np.ascontiguousarray(spec.unpack(rows)["h"].swapaxes(0, 1))


def check_stepped(task: Task) -> Comparison:
    """Replay frame by frame."""
    stepped, h = _stepped(task), task.initial_states()
    for span in task.spans():
        for part in task.parts(span):
            y, h = _step(task, part, h)
            stepped.add_replay(part.starts, part.y, y, part.answered, _least(part.valid.shape))
    _add_states(task, stepped, h, _least((task.rows,)))
    return stepped


def check_whole(task: Task) -> Comparison:
    """Replay all timesteps in one call, or in several where they do not fit into memory."""
    whole, h = _whole(task), task.initial_states()
    for span in task.spans():
        parts = ((part, _least(part.valid.shape)) for part in task.parts(span))
        h = _call(task, span, h, whole, parts)
    return whole


def check_reference(task: Task) -> Comparison:
    """Compute in float64."""
    reference, h = _reference(task), task.initial_states().astype(np.float64)
    bound = LeastBound(task.rows)
    for span in task.spans():
        for part in task.parts(span):
            y, h = _true(task, part, h)
            reference.add_truth(part.starts, part.y, y, part.answered, bound.outputs(y, part.valid))
    _add_true_states(task, reference, h, bound.states(h))
    return reference


def check_with_bound(task: Task) -> tuple[Comparison, Comparison, Comparison]:
    """Stepped, whole sequence and reference side by side, within the bound of each stream."""
    stepped, whole, reference = _stepped(task), _whole(task), _reference(task)
    stepped_h = whole_h = task.initial_states()
    true_h = stepped_h.astype(np.float64)
    bound = ErrorBound(task.checkers.rounded, stepped_h)
    for span in task.spans():
        parts: list[tuple[Span, Limits]] = []
        for part in task.parts(span, RUNS):
            x, recorded = part.x, part.y
            true_y, true_h = _true(task, part, true_h)
            limits = bound.outputs(x, true_y, part.valid, part.active)
            reference.add_truth(part.starts, recorded, true_y, part.answered, limits)
            y, stepped_h = _step(task, part, stepped_h)
            parts.append((part, limits.doubled()))
            stepped.add_replay(part.starts, recorded, y, part.answered, parts[-1][1])
        whole_h = _call(task, span, whole_h, whole, iter(parts))
    limits = bound.states(true_h)
    _add_true_states(task, reference, true_h, limits)
    _add_states(task, stepped, stepped_h, limits.doubled())
    return stepped, whole, reference


def _stepped(task: Task) -> Comparison:
    return Comparison("stepped", task.rows, task.checkers.conditions.step_bits)


def _whole(task: Task) -> Comparison:
    return Comparison("whole sequence", task.rows, task.checkers.conditions.whole_bits)


def _reference(task: Task) -> Comparison:
    return Comparison("float64 reference", task.rows, bits_required=False)


def _step(task: Task, part: Span, h: F32) -> tuple[F32, F32]:
    return replay_stepped(task.checkers.network, task.checkers.conditions.buckets, part.x, h, part.active)


def _true(task: Task, part: Span, h: F64) -> tuple[F64, F64]:
    y, state = task.checkers.truth.run(part.x, {"h": h.swapaxes(0, 1)}, part.active)
    return y, state["h"].swapaxes(0, 1)


def _call(task: Task, span: Span, h: F32, whole: Comparison, parts: Iterator[tuple[Span, Limits]]) -> F32:
    """Compute a span in one call and compare it in parts, so that its recorded outputs need not be gathered at once."""
    y, h = replay_whole(task.checkers.network, task.checkers.conditions.buckets, span.x, h)
    start = 0
    for part, limits in parts:
        whole.add_replay(part.starts, part.y, y[start : start + len(part)], part.answered, limits)
        start += len(part)
    return h


def _least(shape: tuple[int, ...]) -> Limits:
    """Limits that settle a replay at any scale: each side may be off by the floor of the bound."""
    distance: F64 = np.broadcast_to(2 * FLOOR, shape)
    return Limits(distance, np.broadcast_to(np.False_, shape))


def _add_states(task: Task, stepped: Comparison, h: F32, limits: Limits) -> None:
    if not task.checkers.stopped.is_set():  # otherwise not all frames before them were computed
        for row, check in enumerate(task.checks):
            if check.final_state is not None:
                recorded = _floats(task, check.final_state)
                stepped.add_replayed_state(row, check.next_seq, recorded, h[:, row], limits, check.place)


def _add_true_states(task: Task, reference: Comparison, h: F64, limits: Limits) -> None:
    if not task.checkers.stopped.is_set():
        for row, check in enumerate(task.checks):
            if check.final_state is not None:
                recorded = _floats(task, check.final_state)
                reference.add_true_state(row, check.next_seq, recorded, h[:, row], limits, check.place)


def _floats(task: Task, state: U8) -> F32:
    """A recorded state as [layers, hidden size]."""
    h: F32 = task.checkers.network.state.unpack(state[None])["h"][0]
    return h
