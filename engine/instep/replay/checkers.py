"""The ways in which stretches of recorded frames are computed again and compared with what was recorded.

Each begins in the states that the compiled step had before the stretches. At first the reference is compared within
`LeastBound` and float32 within twice its floor, which costs no run of the bound. That settles a stretch unless
something is farther off where bits need not be equal; `check_with_bound` checks those again, within the bound itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Final

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.models.base import RecurrentModel, Reference, StateSpec
from instep.replay.bound import F64, FLOOR, ErrorBound, LeafLimits, LeastBound, Leaves, Limits
from instep.replay.comparison import Comparison
from instep.replay.replay import End, Stretches


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """How much is computed at once."""

    portion_bytes: int = 16 * 2**20
    """Of frames and outputs that are read at once."""
    part_frames: int = 4096
    """Frames that are computed and compared together, about: few enough for their values to stay in a cache."""
    call_bytes: int = 96 * 2**20
    """Memory for the intermediate values of one call over whole sequences, about, as if they were float64; they are
    float32. Each thread may be in a call."""
    definition_s: float = 0.5
    """Time for the definition, if stepping takes less."""


CHECK_LIMITS: Final = CheckLimits()
MOST_ROWS: Final = 256
"""Stretches side by side, at most."""
_FULL_ROWS: Final = 16
"""Larger blocks are a multiple of it, where stretches are left for the next: so many rows fill the widest vectors."""
_LEAST_ROWS: Final = 8
"""Fewer rows side by side take about as long."""
_LEAST_FILL: Final = 0.75
"""A stretch shorter than this share of the longest one in a block goes into the next block."""
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
    stopped: Event = field(default_factory=Event)
    """Set when nobody waits for the result any more: checkers then end soon, with incomplete comparisons."""
    limits: CheckLimits = CHECK_LIMITS

    @property
    def bits_required(self) -> bool:
        """Whether bits must be equal."""
        return not self.notes

    @property
    def state(self) -> StateSpec:
        """The specification of the states."""
        return self.network.state

    @property
    def call_frames(self) -> int:
        """Frames in one call over whole sequences."""
        in_between = 3 * self.state.row_bytes // 4  # more than the gates of recurrent layers
        widest = max(self.network.description.features, self.network.description.outputs, in_between)
        return max(self.limits.call_bytes // (8 * widest), 1)


@dataclass(frozen=True, slots=True)
class Span:
    """Some timesteps of a block."""

    start: int
    """The first timestep."""
    starts: I64
    """[R]: the seqs there."""
    at: I64
    """[T, R]: indices of frames; anything where a row has none."""
    valid: Bool
    """[T, R]: whether the row has a frame."""
    answered: Bool
    """[T, R]: whether its outputs were recorded."""
    active: I64
    """[T]: how many rows have a frame; they are the first ones."""
    x: F32
    """[T, R, features], zeros where a row has no frame."""
    y: F32
    """[T, R, outputs] as recorded, meaningless where no outputs were."""

    def __len__(self) -> int:
        """T."""
        return len(self.valid)


class Block:
    """Some stretches side by side, the longest first.

    Args:
        checkers: everything that computes.
        stretches: all of them.
        rows: indices of those of this block.
        states: before all of them, uint8 [S, row_bytes].
        carried: [S], of all of them, see `ErrorBound`.
    """

    def __init__(self, checkers: Checkers, stretches: Stretches, rows: I64, states: U8, carried: F64) -> None:
        self.checkers = checkers
        self.rows = rows
        self.states: U8 = states[rows]
        self.carried: F64 = carried[rows]
        self.first_seqs: I64 = stretches.first_seqs[rows]
        self.lengths: I64 = stretches.lengths[rows]
        self.ends: dict[int, End] = {
            at: stretches.ends[row] for at, row in enumerate(rows.tolist()) if row in stretches.ends
        }
        self._stretches = stretches
        self._starts: I64 = stretches.starts[rows]

    def __len__(self) -> int:
        """R."""
        return len(self.rows)

    def spans(self, frames: int) -> Iterator[Span]:
        """All timesteps in order, in parts of about so many frames, until it is stopped."""
        longest, steps = int(self.lengths[0]), max(frames // len(self), 1)
        for start in range(0, longest, steps):
            if self.checkers.stopped.is_set():
                return
            timesteps = np.arange(start, min(start + steps, longest))[:, None]
            valid: Bool = timesteps < self.lengths
            at: I64 = self._stretches.order.take(np.where(valid, self._starts + timesteps, 0))
            of = self._stretches.frames
            x = of.x.take(at, axis=0)
            x[~valid] = 0
            yield Span(
                start, self.first_seqs + start, at, valid, valid & of.answered[at], valid.sum(axis=1), x, of.y[at]
            )

    def leaves(self, dtype: type[np.floating[Any]]) -> Leaves:
        """The states by leaf, [R, *shape], floats in this precision."""
        leaves = self.checkers.state.unpack(self.states)
        return {name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf for name, leaf in leaves.items()}

    def seq_after(self, row: int) -> int:
        """Of the frame after the last one."""
        return int(self.first_seqs[row] + self.lengths[row])

    def limits(self, distance: float, *, lossy: bool = False) -> Bounds:
        """The same limit for everything."""

        def everywhere(*shape: int) -> Limits:
            same: F64 = np.broadcast_to(distance, shape)
            return Limits(same, np.broadcast_to(np.bool_(lossy), shape))

        floats = [leaf.name for leaf in self.checkers.state.leaves if leaf.dtype.kind == "f"]
        return Bounds(everywhere(int(self.lengths[0]), len(self)), dict.fromkeys(floats, everywhere(len(self))))

    def least(self) -> Bounds:
        """Limits that settle a replay at any scale; without a reference, a distance beyond them proves nothing."""
        return self.limits(2 * FLOOR, lossy=self.checkers.truth is None)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far the recorded values of a block may be from those that a checker computes."""

    outputs: Limits
    """[T, R]."""
    states: LeafLimits
    """Of the states after the last frames."""

    def at(self, span: Span) -> Limits:
        """Those of some timesteps."""
        of = slice(span.start, span.start + len(span))
        return Limits(self.outputs.distance[of], self.outputs.lossy[of])

    def doubled(self) -> Bounds:
        """For a replay, since each side may be off by the bound."""
        return Bounds(self.outputs.doubled(), {name: leaf.doubled() for name, leaf in self.states.items()})


def plan_blocks(lengths: I64, rows: I64, most_rows: int = MOST_ROWS, most_frames: int = 2**62) -> Iterator[I64]:
    """Split stretches into blocks of similar length; those without frames come last, all together.

    Args:
        lengths: frames of each.
        rows: indices of those that are meant.
        most_rows: per block.
        most_frames: per block, unless a few rows have more.

    Yields:
        Indices, the longest first.
    """
    order: I64 = rows[np.argsort(-lengths[rows], kind="stable")]
    empty = order[lengths[order] == 0]
    order = order[: len(order) - len(empty)]
    while len(order):
        longest = int(lengths[order[0]])
        similar = int((lengths[order[:most_rows]] >= _LEAST_FILL * longest).sum())
        count = max(min(similar, most_frames // longest), min(_LEAST_ROWS, most_rows))
        if _FULL_ROWS < count < len(order):
            count = count // _FULL_ROWS * _FULL_ROWS
        yield order[:count]
        order = order[count:]
    if len(empty):
        yield empty


def check_stepped(block: Block, y: F32, after: U8, bounds: Bounds | None = None) -> Comparison:
    """Compare with the compiled step.

    Args:
        block: the stretches.
        y: outputs that were computed, [frames, outputs].
        after: the states after the stretches of the block, [R, row_bytes].
        bounds: None for those that settle a replay at any scale.
    """
    bounds = bounds or block.least()
    found = Comparison("stepped", len(block), block.checkers.bits_required)
    for span in block.spans(block.checkers.limits.part_frames):
        found.add_replay(span.starts, span.y, y[span.at], span.answered, bounds.at(span))
    for row, end in block.ends.items():
        both = (end.state, after[row])
        found.add_replayed_state(row, block.seq_after(row), block.checkers.state, *both, bounds.states, end.place)
    return found


def check_torch(block: Block, bounds: Bounds | None = None) -> Comparison:
    """Compute with torch's own module, in one call or in several where memory does not suffice.

    Without a reference nothing says how far it may be off. Compares nothing where there is no such module.
    """
    checkers, states = block.checkers, block.states
    bounds = bounds or (block.limits(np.inf) if checkers.truth is None else block.least())
    found = Comparison("torch", len(block), bits_required=False)
    for span in block.spans(checkers.call_frames):
        whole = checkers.network.sequence(span.x, states)
        if whole is None:
            break
        y, states = whole
        found.add_distance(span.starts, span.y, y, span.answered, bounds.at(span))
    return found


def check_definition(block: Block, after: U8, ends_s: float, at_least: int) -> tuple[Comparison, I64]:
    """Compute with the definition of the arithmetic, bit for bit, up to a time.

    Args:
        block: the stretches.
        after: the states after the stretches of the block by the compiled step, [R, row_bytes].
        ends_s: no part begins later, in seconds of the monotonic clock.
        at_least: but so many parts do.

    Returns:
        The comparison, and the number of frames of each row that were compared, [R].
    """
    checkers = block.checkers
    found, frames, done = Comparison("definition", len(block), bits_required=True), np.zeros(len(block), np.int64), 0
    definition, leaves, exact = checkers.network.definition(), checkers.state.unpack(block.states), block.limits(0.0)
    for at, span in enumerate(block.spans(checkers.limits.part_frames // _DEFINITION_RUNS)):
        if definition is None or (at >= at_least and time.monotonic() > ends_s):
            break
        y, leaves = definition.run(span.x, leaves, span.active)
        found.add_replay(span.starts, span.y, y, span.answered, exact.at(span))
        frames += span.answered.sum(axis=0)
        done = span.start + len(span)
    states = checkers.state.pack(leaves)
    for row in np.flatnonzero(block.lengths <= done).tolist():
        end = block.ends.get(row, End(after[row], "state"))
        both = (end.state, states[row])
        found.add_replayed_state(row, block.seq_after(row), checkers.state, *both, exact.states, end.place)
    return found, frames


def check_reference(block: Block, bound: LeastBound | ErrorBound | None = None) -> tuple[Comparison, Bounds]:
    """Compute in float64; by default within the smallest bound. The bounds are good for the replays, too.

    Compares nothing where the network has no reference.
    """
    checkers = block.checkers
    bound, leaves = bound or LeastBound(len(block)), block.leaves(np.float64)
    found = Comparison("float64 reference", len(block), bits_required=False)
    if checkers.truth is None:
        return found, block.least()
    limits = [Limits(np.zeros((0, len(block))), np.zeros((0, len(block)), np.bool_))]
    for span in block.spans(checkers.limits.part_frames // bound.runs):
        y, leaves = checkers.truth.run(span.x, leaves, span.active)
        limits.append(bound.outputs(span.x, y, span.valid, span.active))
        found.add_distance(span.starts, span.y, y, span.answered, limits[-1])
    states = bound.states(leaves)
    for row, end in () if checkers.stopped.is_set() else block.ends.items():
        truth = {name: leaf[row] for name, leaf in leaves.items()}
        found.add_true_state(row, block.seq_after(row), checkers.state, end.state, truth, states, end.place)
    distance, lossy = (np.concatenate(each) for each in zip(*limits, strict=True))
    return found, Bounds(Limits(distance, lossy), states)


def check_with_bound(block: Block, y: F32, after: U8) -> tuple[Sequence[Comparison], F64]:
    """Stepped, torch and reference, each within the bound of each stretch; and the relative errors so far."""
    assert block.checkers.rounded is not None, "without a reference, nothing is wrong unless bits are required"
    bound = ErrorBound(block.checkers.rounded, block.leaves(np.float32), block.carried)
    reference, bounds = check_reference(block, bound)
    bounds = bounds.doubled()
    return (check_stepped(block, y, after, bounds), check_torch(block, bounds), reference), bound.relative_error
