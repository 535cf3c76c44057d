"""The checkers, each of which computes a chunk of streams again and compares it with the recording.

At first the reference is compared within `LeastBound` and float32 within twice its floor, which costs no run of the
bound. That settles a stream unless something is farther off where bits need not be equal. `check_with_bound` checks the
others again, within the bound itself (see `bound`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

import numpy as np

from instep.core.typing import I64, U8
from instep.models.base import RecurrentModel, Reference, StateSpec
from instep.verify.bound import F64, FLOOR, ErrorBound, LeafLimits, LeastBound, Leaves, Limits
from instep.verify.chunks import Chunk, Span
from instep.verify.comparison import Comparison
from instep.verify.replay import replay_stepped
from instep.verify.stream_checks import StreamCheck


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """How much is computed at once."""

    part_frames: int = 4096
    """Frames that are computed and compared together, about: few enough for their values to stay in a cache."""
    call_bytes: int = 96 * 2**20
    """Memory for the intermediate values of one call over whole sequences, about, as if they were float64; they are
    float32. Each thread may be in a call."""
    definition_s: float = 0.5
    """Time for the definition, if stepping takes less."""


CHECK_LIMITS: Final = CheckLimits()
_DEFINITION_RUNS: Final = 16
"""A frame takes the definition about as long as so many."""


@dataclass(frozen=True, slots=True)
class Checkers:
    """Everything that computes."""

    network: RecurrentModel
    """Steps, and computes whole sequences with torch."""
    truth: Reference | None
    """In float64; None where the kind of model has no reference."""
    rounded: Reference | None
    """In float32; None likewise."""
    notes: tuple[str, ...]
    """Why bits need not be equal; empty where they must."""
    stopped: Event
    """Set when nobody waits for the result any more: checkers then end soon, with incomplete comparisons."""
    limits: CheckLimits = CHECK_LIMITS

    @property
    def bits_required(self) -> bool:
        """Whether bits must be equal."""
        return not self.notes


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
        most = self.checkers.limits.part_frames // (self.rows * runs)
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
        """The leaves that hold floats, which may be off where bits need not be equal."""
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
    found, states = Comparison("stepped", task.rows, task.checkers.bits_required), task.initial_states()
    for part in task.parts():
        y, states = replay_stepped(task.checkers.network, part.x, states, part.active)
        found.add_replay(part.starts, part.y, y, part.answered, bounds.at(part))
    for row, check, recorded in task.final_states():
        both = (recorded, states[row])
        found.add_replayed_state(row, check.next_seq, task.state, *both, bounds.states, check.place)
    return found, states


def check_torch(task: Task, bounds: Bounds | None = None) -> Comparison:
    """Compute with torch's own module, in one call or in several where memory does not suffice; limits as above.

    Without a reference nothing says how far it may be off. Compares nothing where there is no such module.
    """
    bounds = bounds or (_limits(task, np.inf) if task.checkers.truth is None else _least(task))
    found, states = Comparison("torch", task.rows, bits_required=False), task.initial_states()
    for span in task.spans():
        whole = task.checkers.network.sequence(span.x, states)
        if whole is None:
            break
        y, states = whole
        for part in task.parts([span]):  # so that its recorded outputs need not be gathered at once
            of_part = y[part.start - span.start :][: len(part)]
            found.add_distance(part.starts, part.y, of_part, part.answered, bounds.at(part))
    return found


def check_definition(task: Task, ends_s: float, at_least: int) -> tuple[Comparison, I64]:
    """Compute with the definition of the arithmetic, bit for bit, up to a time.

    Args:
        task: the chunk.
        ends_s: no part begins later, in seconds of the monotonic clock.
        at_least: but so many parts do.

    Returns:
        The comparison, and the number of frames of each row that were compared, [R].
    """
    found, frames, done = Comparison("definition", task.rows, bits_required=True), np.zeros(task.rows, np.int64), 0
    if not at_least and time.monotonic() > ends_s:
        return found, frames
    definition, leaves = task.checkers.network.definition(), task.state.unpack(task.initial_states())
    exact = _limits(task, 0.0)
    for at, part in enumerate(task.parts(runs=_DEFINITION_RUNS)):
        if definition is None or (at >= at_least and time.monotonic() > ends_s):
            break
        y, leaves = definition.run(part.x, leaves, part.active)
        found.add_replay(part.starts, part.y, y, part.answered, exact.at(part))
        frames += part.answered.sum(axis=0)
        done = part.start + len(part)
    states = task.state.pack(leaves)
    for row, check, recorded in task.final_states():
        if check.frames <= done:
            both = (recorded, states[row])
            found.add_replayed_state(row, check.next_seq, task.state, *both, exact.states, check.place)
    return found, frames


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
        found.add_distance(part.starts, part.y, y, part.answered, limits[-1])
    states = bound.states(leaves)
    for row, check, recorded in task.final_states():
        truth = {name: leaf[row] for name, leaf in leaves.items()}
        found.add_true_state(row, check.next_seq, task.state, recorded, truth, states, check.place)
    distance, lossy = (np.concatenate(each) for each in zip(*limits, strict=True))
    return found, Bounds(Limits(distance, lossy), states)


def check_with_bound(task: Task) -> tuple[Comparison, Comparison, Comparison]:
    """Stepped, torch and reference, each within the bound of each stream."""
    reference, bounds = _with_bound(task)
    return check_stepped(task, bounds), check_torch(task, bounds), reference


def step_with_bound(task: Task) -> Comparison:
    """Stepped, within the bound of each stream."""
    return check_stepped(task, _with_bound(task)[1])


def _with_bound(task: Task) -> tuple[Comparison, Bounds]:
    """The reference's comparison, and the bounds for float32."""
    assert task.checkers.rounded is not None, "without a reference, nothing is wrong unless bits are required"
    reference, bounds = check_reference(task, ErrorBound(task.checkers.rounded, task.initial_leaves(np.float32)))
    return reference, bounds.doubled()


def _least(task: Task) -> Bounds:
    """Without a reference, a distance beyond these limits proves nothing."""
    return _limits(task, 2 * FLOOR, lossy=task.checkers.truth is None)


def _limits(task: Task, distance: float, *, lossy: bool = False) -> Bounds:
    """The same limit for everything."""

    def limits(*shape: int) -> Limits:
        everywhere: F64 = np.broadcast_to(distance, shape)
        return Limits(everywhere, np.broadcast_to(np.bool_(lossy), shape))

    longest = int(task.chunk.lengths[0])
    return Bounds(limits(longest, task.rows), dict.fromkeys(task.float_leaves, limits(task.rows)))
