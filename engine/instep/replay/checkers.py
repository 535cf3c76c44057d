"""The checkers, each of which computes stretches of recorded frames again and compares them with the recording.

Each begins in the states that the compiled step had before the stretches. Torch and the reference first measure the
distances of whole blocks. A stretch within the smallest value that its bound can have is settled; `examine` computes
the others again and compares them value by value with the bound itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, U8, Bool
from instep.models.base import RecurrentModel, Reference, StateSpec
from instep.replay.bound import (
    F64,
    FLOOR,
    RUNS,
    ErrorBound,
    Leaves,
    Limits,
    absolute_error,
    largest_errors,
    leaf_scales,
    scales_of,
)
from instep.replay.replay import End, Stretches
from instep.replay.report import Checker, Divergence, Place


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """Sizes of the parts that are computed at once."""

    segment_bytes: int = 16 * 2**20
    """The size of frames and outputs read at once."""
    part_frames: int = 4096
    """The approximate number of frames computed and compared together, few enough for their values to stay in a cache.
    """
    call_bytes: int = 96 * 2**20
    """The approximate memory for intermediate values of one call over whole sequences, counted as float64 although they
    are float32. Each thread may have a call.
    """
    definition_s: float = 0.5
    """The time for the definition, if stepping takes less."""


CHECK_LIMITS: Final = CheckLimits()
MOST_ROWS: Final = 256
"""The most stretches side by side."""
_FULL_ROWS: Final = 16
"""Larger blocks have a multiple of this many rows, which fill the widest vectors, unless no stretches are left."""
_LEAST_ROWS: Final = 8
"""Fewer rows than this take about as long as this many."""
_LEAST_FILL: Final = 0.75
"""A stretch shorter than this share of the longest one in a block is moved to the next block."""
_DEFINITION_RUNS: Final = 16
"""The cost of a frame in the definition, measured in steps of the compiled code."""


@dataclass(frozen=True, slots=True)
class Checkers:
    """The programs that compute a model, for comparison."""

    network: RecurrentModel
    """The compiled step, which also computes whole sequences with torch."""
    truth: Reference | None
    """The reference in float64; None if the kind of model has no reference."""
    rounded: Reference | None
    """The reference in float32; None in the same case."""
    notes: tuple[str, ...]
    """The reasons why bits need not be equal; empty if they must."""
    stopped: Event = field(default_factory=Event)
    """Set once nobody waits for the result; checkers then end soon, with incomplete comparisons."""
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
        """The number of frames in one call over whole sequences."""
        in_between = 3 * self.state.row_bytes // 4  # more than the gates of recurrent layers
        widest = max(self.network.description.features, self.network.description.outputs, in_between)
        return max(self.limits.call_bytes // (8 * widest), 1)


@dataclass(frozen=True, slots=True)
class Span:
    """Some timesteps of a block."""

    start: int
    """The first timestep."""
    starts: I64
    """[R]: the seqs at the first timestep."""
    at: I64
    """[T, R]: indices of frames; undefined where a row has no frame."""
    valid: Bool
    """[T, R]: whether the row has a frame."""
    answered: Bool
    """[T, R]: whether its outputs were recorded."""
    active: I64
    """[T]: the number of rows, counted from the first, that have a frame."""
    x: F32
    """[T, R, features], zeros where a row has no frame."""
    y: F32
    """[T, R, outputs] as recorded; undefined where no outputs were."""

    def __len__(self) -> int:
        """The number of timesteps, T."""
        return len(self.valid)


class Block:
    """Some stretches side by side, the longest first.

    Args:
        checkers: the programs to compare.
        stretches: all of them.
        rows: indices of the stretches in this block.
        states: the states before all stretches, uint8 [S, row_bytes].
        carried: [S], the relative errors of all stretches, see `ErrorBound`.
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
        """The number of rows, R."""
        return len(self.rows)

    def spans(self, frames: int) -> Iterator[Span]:
        """All timesteps in order, in parts of about this many frames, until the check is stopped."""
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
        """The states by leaf, [R, *shape], with floats in this precision."""
        leaves = self.checkers.state.unpack(self.states)
        return {name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf for name, leaf in leaves.items()}

    def seq_after(self, row: int) -> int:
        """The seq after the last frame of a row."""
        return int(self.first_seqs[row] + self.lengths[row])


def plan_blocks(lengths: I64, rows: I64, most_rows: int = MOST_ROWS, most_frames: int = 2**62) -> Iterator[I64]:
    """Split stretches into blocks of similar length; those without frames come last, all together.

    Args:
        lengths: the number of frames in each stretch.
        rows: indices of the stretches to split.
        most_rows: per block.
        most_frames: per block, which a few long rows may exceed.

    Yields:
        Indices, the longest stretch first.
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


class Distances:
    """Distances between a block's recorded values and those of a checker.

    Attributes:
        largest: [R].
        settled: [R]: whether every value is within the smallest value that the bound can have.
        elements: the number of values compared.
    """

    def __init__(self, rows: int) -> None:
        self.largest: F64 = np.zeros(rows)
        self.settled: Bool = np.ones(rows, np.bool_)
        self.elements = 0

    def add_outputs(self, span: Span, computed: npt.NDArray[Any], limits: F64 | float) -> None:
        """Measure outputs [T, R, outputs] against limits [T, R]."""
        error = np.where(span.answered, largest_errors(span.y, computed), 0)
        self.largest = np.maximum(self.largest, error.max(axis=0))
        self.settled &= (error <= limits).all(axis=0)
        self.elements += int(span.answered.sum()) * computed.shape[2]

    def add_state(self, row: int, spec: StateSpec, recorded: U8, computed: Leaves, scales: Mapping[str, float]) -> None:
        """Measure a state [row_bytes] against the floor times a scale, or 0 for leaves without a scale."""
        for name, leaf in spec.unpack(recorded[None]).items():
            error = float(absolute_error(leaf[0], computed[name]).max())
            self.largest[row] = max(self.largest[row], error)
            self.settled[row] &= error <= scales[name] * FLOOR if name in scales else (leaf[0] == computed[name]).all()
            self.elements += leaf.size


def check_stepped(block: Block, y: F32, after: U8) -> Distances:
    """Measure the distance of the compiled step from the recording if bits need not be equal.

    Args:
        block: the stretches.
        y: the computed outputs, [frames, outputs].
        after: the computed states after the block, [R, row_bytes].
    """
    found, spec = Distances(len(block)), block.checkers.state
    for span in block.spans(block.checkers.limits.part_frames):
        found.add_outputs(span, y[span.at], 2 * FLOOR)
    scales = {leaf.name: 2.0 for leaf in spec.leaves if leaf.dtype.kind == "f"}
    for row, end in block.ends.items():
        found.add_state(row, spec, end.state, _row_of(spec.unpack(after), row), scales)
    return found


def check_torch(block: Block) -> Distances:
    """Compute with torch's own module, in one call or, if memory does not suffice, in several.

    Without a reference the distance has no limit. Without such a module nothing is compared.
    """
    checkers, states = block.checkers, block.states
    found, limit = Distances(len(block)), np.inf if checkers.truth is None else 2 * FLOOR
    for span in block.spans(checkers.call_frames):
        whole = checkers.network.sequence(span.x, states)
        if whole is None:
            break
        y, states = whole
        found.add_outputs(span, y, limit)
    return found


def check_reference(block: Block) -> Distances:
    """Compute with the float64 reference. Without one nothing is compared."""
    checkers, leaves = block.checkers, block.leaves(np.float64)
    found, scales = Distances(len(block)), np.ones((1, len(block)))
    if checkers.truth is None:
        return found
    for span in block.spans(checkers.limits.part_frames):
        y, leaves = checkers.truth.run(span.x, leaves, span.active)
        scales = scales_of(y, span.valid, scales[-1])
        found.add_outputs(span, y, scales * FLOOR)
    for row, end in block.ends.items():
        truth = _row_of(leaves, row)
        of_leaves = {
            name: float(leaf_scales(leaf.reshape(1, -1))[0]) for name, leaf in truth.items() if leaf.dtype.kind == "f"
        }
        found.add_state(row, checkers.state, end.state, truth, of_leaves)
    return found


@dataclass(slots=True)
class Comparison:
    """A comparison of one stretch, value by value, with a checker's results."""

    checker: Checker
    largest: float = 0.0
    """The largest distance among values with a limit that is not lossy."""
    first: Divergence | None = None
    """The first wrong value."""
    undecided: int | None = None
    """The seq of the first frame with a value beyond a lossy limit."""

    def compare(
        self,
        seqs: I64,
        recorded: npt.NDArray[Any],
        computed: npt.NDArray[Any],
        limits: Limits,
        *,
        exact: bool,
        place: Place = "output",
        offset: int = 0,
    ) -> None:
        """Compare values.

        Args:
            seqs: [T].
            recorded: [T, values].
            computed: [T, values].
            limits: [T]; a value beyond its limit is wrong, unless the limit is lossy.
            exact: whether every bit must be equal, whatever the limits.
            place: the name of the output or leaf in messages.
            offset: the index of the first value in it.
        """
        error = absolute_error(recorded, computed)
        if exact:
            wrong = differing_bits(recorded, computed.astype(recorded.dtype))
        else:
            beyond, lossy = error > limits.distance[:, None], limits.lossy[:, None]
            if self.undecided is None and (beyond & lossy).any():
                self.undecided = int(seqs[np.argmax((beyond & lossy).any(axis=1))])
            wrong, error = beyond & ~lossy, np.where(lossy, 0, error)
        self.largest = max(self.largest, float(error.max(initial=0)))
        if self.first is None and wrong.any():
            at, element = np.argwhere(wrong)[0].tolist()
            values = float(recorded[at, element]), float(computed[at, element])
            self.first = Divergence(self.checker, place, int(seqs[at]), offset + element, *values)

    def compare_state(
        self, seq: int, spec: StateSpec, end: End, computed: Leaves, limits: Mapping[str, Limits], *, exact: bool
    ) -> None:
        """Compare a state before the frame `seq`; leaves without limits [1] must be equal."""
        recorded, offset, seqs = spec.unpack(end.state[None]), 0, np.array([seq])
        for leaf in spec.leaves:
            both = recorded[leaf.name].reshape(1, -1), computed[leaf.name].reshape(1, -1)
            limit, is_exact = limits.get(leaf.name, _NO_LIMIT), exact or leaf.name not in limits
            self.compare(seqs, *both, limit, exact=is_exact, place=end.place, offset=offset)
            offset += leaf.elements


_NO_LIMIT: Final = Limits(np.zeros(1), np.zeros(1, np.bool_))


def examine(block: Block, y: F32, after: U8) -> tuple[list[Sequence[Comparison]], F64]:
    """Compare each stretch with the compiled step, torch and the reference, within its bound.

    Args:
        block: the stretches.
        y: outputs of the compiled step, [frames, outputs].
        after: its states after the stretches of the block, [R, row_bytes].

    Returns:
        The finding for each stretch, which without a reference depends on the compiled step alone, and the relative
        errors [R] at the ends.
    """
    checkers, spec, exact = block.checkers, block.checkers.state, block.checkers.bits_required
    leaves, states, bound, truth = block.leaves(np.float64), block.states, None, checkers.truth
    names: tuple[Checker, ...] = ("stepped",)
    if checkers.rounded is not None:
        bound = ErrorBound(checkers.rounded, block.leaves(np.float32), block.carried)
        names = ("stepped", "torch", "float64 reference")
    found = [[Comparison(name) for name in names] for _ in range(len(block))]
    for span in block.spans(checkers.limits.part_frames // RUNS):
        computed: list[npt.NDArray[Any] | None] = [y[span.at]]
        limits = Limits(np.full(span.valid.shape, FLOOR), np.ones(span.valid.shape, np.bool_))
        if bound is not None and truth is not None:
            whole = checkers.network.sequence(span.x, states)
            true_y, leaves = truth.run(span.x, leaves, span.active)
            limits = bound.outputs(span.x, true_y, span.valid, span.active)
            states = states if whole is None else whole[1]
            computed += [None if whole is None else whole[0], true_y]
        for row, findings in enumerate(found):
            of = span.answered[:, row]
            seqs = span.starts[row] + np.flatnonzero(of)
            for finding, other in zip(findings, computed, strict=True):
                if other is not None:
                    factor = 1 if finding.checker == "float64 reference" else 2  # each of two may be off by the bound
                    limit = Limits(factor * limits.distance[of, row], limits.lossy[of, row])
                    is_exact = exact and finding.checker == "stepped"
                    finding.compare(seqs, span.y[of, row], other[of, row], limit, exact=is_exact)
    least = Limits(np.full(len(block), FLOOR), np.ones(len(block), np.bool_))
    floats = {leaf.name: least for leaf in spec.leaves if leaf.dtype.kind == "f"}
    of_states = floats if bound is None else bound.states(leaves)
    for row, end in block.ends.items():
        seq, stepped = block.seq_after(row), _row_of(spec.unpack(after), row)
        single = {name: Limits(each.distance[[row]], each.lossy[[row]]) for name, each in of_states.items()}
        doubled = {name: Limits(2 * each.distance, each.lossy) for name, each in single.items()}
        found[row][0].compare_state(seq, spec, end, stepped, doubled, exact=exact)
        if bound is not None:
            found[row][2].compare_state(seq, spec, end, _row_of(leaves, row), single, exact=False)
    return [*found], np.zeros(len(block)) if bound is None else bound.relative_error


def check_definition(block: Block, after: U8, ends_s: float, at_least: int) -> tuple[dict[int, Comparison], I64, int]:
    """Compute with the definition of the arithmetic and compare bits, up to a time.

    Args:
        block: the stretches.
        after: the states after the stretches of the block by the compiled step, [R, row_bytes].
        ends_s: the time after which no part begins, in seconds of the monotonic clock.
        at_least: the number of parts that are computed even then.

    Returns:
        The differences by row, the numbers of compared frames [R], and the number of values.
    """
    checkers, spec = block.checkers, block.checkers.state
    found, frames, values, done = dict[int, Comparison](), np.zeros(len(block), np.int64), 0, 0
    definition, leaves = checkers.network.definition(), spec.unpack(block.states)
    for at, span in enumerate(block.spans(checkers.limits.part_frames // _DEFINITION_RUNS)):
        if definition is None or (at >= at_least and time.monotonic() > ends_s):
            break
        y, leaves = definition.run(span.x, leaves, span.active)
        differs = differing_bits(span.y, y).any(axis=2) & span.answered
        for row in np.flatnonzero(differs.any(axis=0)).tolist():
            of = differs[:, row]
            seqs = span.starts[row] + np.flatnonzero(of)
            finding = found.setdefault(row, Comparison("definition"))
            finding.compare(seqs, span.y[of, row], y[of, row], _NO_LIMIT, exact=True)
        frames += span.answered.sum(axis=0)
        values += int(span.answered.sum()) * y.shape[2]
        done = span.start + len(span)
    for row in np.flatnonzero(block.lengths <= done).tolist():
        end, computed = block.ends.get(row, End(after[row], "state")), _row_of(leaves, row)
        values += sum(leaf.elements for leaf in spec.leaves)
        if spec.pack({name: leaf[None] for name, leaf in computed.items()}).tobytes() != end.state.tobytes():
            finding = found.setdefault(row, Comparison("definition"))
            finding.compare_state(block.seq_after(row), spec, end, computed, {}, exact=True)
    return found, frames, values


def differing_bits(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Bool:
    """Whether elements of two arrays of one shape and dtype differ in any bit."""
    bits = f"u{one.itemsize}"
    differ: Bool = one.view(bits) != other.view(bits)
    return differ


def _row_of(leaves: Leaves, row: int) -> Leaves:
    return {name: leaf[row] for name, leaf in leaves.items()}
