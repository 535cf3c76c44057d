"""The three checkers, each of which computes a chunk of streams again and compares it with the recording.

At first the reference is compared within `LeastBound` and a replay within twice its floor, which costs no run in
float32. That settles a stream unless something is farther off where bits need not be equal. `check_with_bound` checks
the others again, within the bound itself (see `bound`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import numpy as np

from instep.core.typing import U8
from instep.models.base import RecurrentModel, Reference, StateSpec
from instep.verify.bound import F64, FLOOR, ErrorBound, LeafLimits, LeastBound, Leaves, Limits
from instep.verify.chunks import LEAST_ROWS, Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.conditions import Conditions
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.stream_checks import StreamCheck


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """How much is computed at once."""

    part_frames: int = 4096
    """Frames that are computed and compared together, about: few enough for their values to stay in a cache."""
    call_bytes: int = 96 * 2**20
    """Memory for the intermediate values of one whole-sequence call, about, as if they were float64; they are float32.
    Each thread may be in a call."""


CHECK_LIMITS: Final = CheckLimits()


@dataclass(frozen=True, slots=True)
class Checkers:
    """Everything that computes."""

    network: RecurrentModel
    """Steps, and computes whole sequences."""
    truth: Reference | None
    """In float64; None where the kind of model has no reference."""
    rounded: Reference | None
    """In float32; None likewise."""
    conditions: Conditions
    stopped: Event
    """Set when nobody waits for the result any more: checkers then end soon, with incomplete comparisons."""
    limits: CheckLimits = CHECK_LIMITS


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

    def parts(self, spans: Iterable[Span] | None = None, runs: int = 1) -> Iterator[Span]:
        """All or some timesteps in parts of about `part_frames` over all runs, until it is stopped."""
        most = self.checkers.limits.part_frames // max(self.rows * runs, LEAST_ROWS)
        for span in self.spans() if spans is None else spans:
            for part in span.parts(max(most, 1)):
                if self.checkers.stopped.is_set():
                    return
                yield part

    def final_states(self) -> Iterator[tuple[int, StreamCheck, U8]]:
        """Rows whose final state was recorded, with it; none when it was stopped before all frames were computed."""
        for row, check in enumerate(self.checks):
            if check.final_state is not None and not self.checkers.stopped.is_set():
                yield row, check, check.final_state

    @property
    def state(self) -> StateSpec:
        """The specification of the states."""
        return self.checkers.network.state

    @property
    def float_leaves(self) -> list[str]:
        """The leaves that hold floats: these may be off where bits need not be equal."""
        return [leaf.name for leaf in self.state.leaves if leaf.dtype.kind == "f"]

    def initial_states(self) -> U8:
        """Rows of bytes [R, row_bytes]."""
        return np.stack([check.initial_state for check in self.checks])

    def initial_leaves(self, dtype: type[np.floating[Any]]) -> Leaves:
        """The same by leaf, [R, *shape], floats in this precision."""
        leaves = self.state.unpack(self.initial_states())
        return {name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf for name, leaf in leaves.items()}


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far the recorded values of a chunk may be from those that a checker computes."""

    outputs: Limits
    """[T, R]."""
    states: LeafLimits
    """Of the states after the last frames."""

    def at(self, part: Span) -> Limits:
        """Those of some timesteps."""
        of = slice(part.start, part.start + len(part))
        return Limits(self.outputs.distance[of], self.outputs.lossy[of])

    def doubled(self) -> Bounds:
        """For a replay, since each side may be off by the bound."""
        return Bounds(self.outputs.doubled(), {name: leaf.doubled() for name, leaf in self.states.items()})


def check_stepped(task: Task, bounds: Bounds | None = None) -> Comparison:
    """Replay frame by frame; by default within limits that settle a replay at any scale."""
    return step_again(task, bounds)[0]


def step_again(task: Task, bounds: Bounds | None = None) -> tuple[Comparison, U8]:
    """As `check_stepped`; also the states after the last frames, [R, row_bytes]."""
    bounds = bounds or _least(task)
    found, states = Comparison("stepped", task.rows, task.checkers.conditions.step_bits), task.initial_states()
    for part in task.parts():
        y, states = replay_stepped(task.checkers.network, task.checkers.conditions.buckets, part.x, states, part.active)
        found.add_replay(part.starts, part.y, y, part.answered, bounds.at(part))
    for row, check, recorded in task.final_states():
        both = (recorded, states[row])
        found.add_replayed_state(row, check.next_seq, task.state, *both, bounds.states, check.place)
    return found, states


def check_whole(task: Task, bounds: Bounds | None = None) -> Comparison:
    """Replay all timesteps in one call, or in several where they do not fit into memory; limits as above.

    Compares nothing where the network has no such call.
    """
    bounds = bounds or _least(task)
    found, states = Comparison("whole sequence", task.rows, task.checkers.conditions.whole_bits), task.initial_states()
    for span in task.spans() if task.checkers.conditions.has_whole else ():
        y, states = replay_whole(task.checkers.network, task.checkers.conditions.buckets, span.x, states)
        for part in task.parts([span]):  # so that its recorded outputs need not be gathered at once
            of_part = y[part.start - span.start :][: len(part)]
            found.add_replay(part.starts, part.y, of_part, part.answered, bounds.at(part))
    return found


def check_reference(task: Task, bound: LeastBound | ErrorBound | None = None) -> tuple[Comparison, Bounds]:
    """Compute in float64; by default within the smallest bound. The bounds are good for the replays, too.

    Compares nothing where the network has no reference.
    """
    bound, leaves = bound or LeastBound(task.rows), task.initial_leaves(np.float64)
    found = Comparison("float64 reference", task.rows, bits_required=False)
    if task.checkers.truth is None:
        return found, _least(task)
    limits = [Limits(np.zeros((0, task.rows)), np.zeros((0, task.rows), np.bool_))]
    for part in task.parts(runs=bound.runs):
        y, leaves = task.checkers.truth.run(part.x, leaves, part.active)
        limits.append(bound.outputs(part.x, y, part.valid, part.active))
        found.add_truth(part.starts, part.y, y, part.answered, limits[-1])
    states = bound.states(leaves)
    for row, check, recorded in task.final_states():
        truth = {name: leaf[row] for name, leaf in leaves.items()}
        found.add_true_state(row, check.next_seq, task.state, recorded, truth, states, check.place)
    distance, lossy = (np.concatenate(each) for each in zip(*limits, strict=True))
    return found, Bounds(Limits(distance, lossy), states)


def check_with_bound(task: Task) -> tuple[Comparison, Comparison, Comparison]:
    """Stepped, whole sequence and reference, each within the bound of each stream."""
    assert task.checkers.rounded is not None, "without a reference, nothing is wrong unless bits are required"
    bound = ErrorBound(task.checkers.rounded, task.initial_leaves(np.float32))
    reference, bounds = check_reference(task, bound)
    bounds = bounds.doubled()
    return check_stepped(task, bounds), check_whole(task, bounds), reference


def _least(task: Task) -> Bounds:
    """Without a reference, a distance beyond these limits proves nothing."""

    def limits(*shape: int) -> Limits:
        distance: F64 = np.broadcast_to(2 * FLOOR, shape)
        return Limits(distance, np.broadcast_to(np.bool_(task.checkers.truth is None), shape))

    longest = int(task.chunk.lengths[0])
    return Bounds(limits(longest, task.rows), dict.fromkeys(task.float_leaves, limits(task.rows)))
