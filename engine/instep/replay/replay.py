"""Steps recorded frames again, for all purposes.

`Replay` keeps the open streams of a recording, each with a slot of a stepper that holds its state. A segment takes two
calls: `plan` cuts each stream's frames into stretches, which begin in a given state or in the state after the previous
stretch, and end where a state was recorded; `step` steps them, many streams at once and each in order.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.models.base import RecurrentModel, StateSpec
from instep.models.network import PortableNetwork
from instep.recording.errors import DamagedRecording
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedEvent, RecordedFrames
from instep.recording.schema import RESET_EVENT, UNKNOWN_SEQ
from instep.recording.segments import Closed, Mark, Opened, Segment

Place: TypeAlias = Literal["final state", "checkpoint", "state"]
LAST: Final = int(np.iinfo(np.int64).max)
"""A position after all others."""


class Stepping(Protocol):
    """Steps the states of streams by slot; the engine's `Stepper` is one implementation."""

    @property
    def state(self) -> StateSpec:
        """The layout of a state."""

    @property
    def max_batch_size(self) -> int:
        """The most streams in one step."""

    def load(self, slots: I64, rows: U8 | None) -> None:
        """Set the states of slots from rows of bytes, or to the initial state."""

    def read(self, slots: I64) -> U8:
        """Copy states."""

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        """Step `slots` with the frames in `rows` of the inputs; outputs go to the same rows."""


class StateTable:
    """A stepper for any number of streams on this processor; its memory grows with the loaded slots."""

    max_batch_size: int = 2**31

    def __init__(self, network: RecurrentModel) -> None:
        assert isinstance(network, PortableNetwork), "only such a network computes on a processor"
        self._network = network
        self.state: StateSpec = network.state
        self._states: U8 = np.zeros((64, self.state.row_bytes), np.uint8)
        self._bound: tuple[object, ...] = ()

    def load(self, slots: I64, rows: U8 | None) -> None:
        """See `Stepping`."""
        needed = int(slots.max()) + 1
        if needed > len(self._states):
            room = np.zeros((max(needed, 2 * len(self._states)), self._states.shape[1]), np.uint8)
            room[: len(self._states)] = self._states
            self._states = room
        self._states[slots] = self.state.initial(len(slots)) if rows is None else rows

    def read(self, slots: I64) -> U8:
        """See `Stepping`."""
        states: U8 = self._states[slots]
        return states

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        """See `Stepping`."""
        tables = (inputs, self._states, outputs)
        if not self._bound or any(table is not bound for table, bound in zip(tables, self._bound, strict=True)):
            self._bound, self._rows = tables, self._network.bind(*tables)
        self._rows.run(slots, rows)


class NoStates:
    """A stepper for plans that are never stepped."""

    max_batch_size: int = 1

    def __init__(self, state: StateSpec) -> None:
        self.state = state

    def load(self, slots: I64, rows: U8 | None) -> None:
        """See `Stepping`."""

    def read(self, slots: I64) -> U8:
        """See `Stepping`."""
        raise NotImplementedError

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        """See `Stepping`."""
        raise NotImplementedError


def differ(one: F32, other: F32) -> Bool:
    """Whether any bit differs, for each row of [N, values]."""
    differs: Bool = (one.view(np.uint32) != other.view(np.uint32)).any(axis=1)
    return differs


class RecordedState(NamedTuple):
    """A state of a stream in a checkpoint."""

    seq: int
    """The seq of the frame that follows the state."""
    position: int
    """The state includes all batches and resets up to this position."""
    state: U8
    has_reset: bool = False
    """Whether the stream is reset before that frame, so the state may be from before or after the reset."""


class Defect(NamedTuple):
    """A row that does not follow from the rows before it."""

    stream: int
    position: int
    seq: int
    """The recorded seq."""
    next_seq: int
    """The expected seq."""
    sentence: str


class End(NamedTuple):
    """The recorded state after a stretch."""

    state: U8
    place: Place


@dataclass(slots=True)
class Stretches:
    """Runs of consecutive frames, each beginning in a known state; those of one stream are in order.

    Columns are int64 [S]; indices are those of `frames`.
    """

    frames: RecordedFrames
    order: I64
    """int64 [N]: indices of frames, stretch by stretch."""
    streams: I64
    """The numbers of their streams."""
    slots: I64
    starts: I64
    """The index in `order` of each stretch's first frame."""
    lengths: I64
    first_seqs: I64
    rounds: I64
    """The number of earlier stretches of the same stream."""
    given: dict[int, U8 | None]
    """By stretch, the recorded state that it begins in, None for the model's initial one. Other stretches continue from
    the one before.
    """
    ends: dict[int, End]
    """By stretch, the recorded state at its end."""
    defects: list[Defect]
    closed: list[int]
    """Numbers of the streams that end here."""

    def __len__(self) -> int:
        return len(self.lengths)

    def offsets(self) -> I64:
        """The index of each frame within its stretch."""
        offsets: I64 = np.arange(self.lengths.sum()) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        return offsets

    def applied(self) -> I64:
        """Indices of the frames of all stretches."""
        applied: I64 = self.order[np.repeat(self.starts, self.lengths) + self.offsets()]
        return applied


@dataclass(slots=True)
class _Stream:
    slot: int
    next_seq: int
    skip_below: int = 0
    """Frames below this seq are part of the state that the stream was added with, and are skipped."""
    is_broken: bool = False
    """Whether it has a defect; the rest of it is skipped."""


@dataclass(slots=True)
class _Plan:
    columns: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    """Stream, slot, start, length, first seq, round."""
    given: dict[int, U8 | None] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)
    defects: list[Defect] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    """Streams with a reset at a seq other than the expected one."""


class Replay:
    """The open streams of a recording, in the states that result from its frames.

    Args:
        stepper: holds the states.
        reader: names the recording in errors.
        recorded: by stream number and in order, states of checkpoints that must be reproduced; each is removed once
            compared.
        ignore_until: up to this position, frames may belong to unknown streams.
    """

    def __init__(
        self,
        stepper: Stepping,
        reader: RecordingReader,
        recorded: MutableMapping[int, list[RecordedState]] | None = None,
        ignore_until: int = 0,
    ) -> None:
        self.stepper = stepper
        self.reader = reader
        self._recorded = {} if recorded is None else recorded
        self._ignore_until = ignore_until
        self._streams: dict[int, _Stream] = {}
        self._free: list[int] = []
        self._slots = 0
        self._initial: U8 = stepper.state.initial(1)[0]

    def __contains__(self, number: int) -> bool:
        return number in self._streams

    @property
    def next_seqs(self) -> dict[int, int]:
        """The next seqs of open streams without a defect, by number."""
        return {number: stream.next_seq for number, stream in self._streams.items() if not stream.is_broken}

    def state(self, number: int) -> U8:
        """The state of an open stream, [row_bytes]."""
        state: U8 = self.stepper.read(np.array([self._streams[number].slot]))[0]
        return state

    def add(self, number: int, seq: int, state: U8 | None) -> None:
        """Continue a stream from the state before a frame; earlier frames and resets are skipped."""
        slot = self._take_slot()
        self.stepper.load(np.array([slot]), None if state is None else state[None])
        self.add_loaded(number, seq, slot)

    def add_loaded(self, number: int, seq: int, slot: int) -> None:
        """Like `add`, for a state that the stepper already has in a slot."""
        self._streams[number] = _Stream(slot, seq, skip_below=seq)

    def drop(self, number: int) -> None:
        """Forget a stream."""
        self._free.append(self._streams.pop(number).slot)

    def meet(self, numbers: Sequence[int]) -> None:
        """A hook for streams with frames or resets that are not open here; it may `add` them."""

    def plan(self, segment: Segment) -> Stretches:
        """Cut the frames of the next segment into stretches; step these before the next call.

        A segment at `LAST` also compares the states of checkpoints that no frame follows.

        Raises:
            DamagedRecording: when a frame belongs to a stream that is not open.
        """
        frames, plan = segment.frames, _Plan()
        marks: dict[int, list[Mark]] = {number: [] for number in (self._recorded if segment.position == LAST else ())}
        for mark in segment.marks:
            if mark.stream is not None and (not isinstance(mark, RecordedEvent) or mark.kind == RESET_EVENT):
                marks.setdefault(mark.stream, []).append(mark)
        numbers, of = np.unique(frames.streams, return_inverse=True)
        self._open_streams(marks, numbers)
        present = [self._streams.get(number) for number in numbers.tolist()]
        self._check_known(frames, np.array([stream is None for stream in present], np.bool_)[of])
        is_left_out = [stream is None or stream.is_broken for stream in present]
        skip_below: I64 = np.array([0 if stream is None else stream.skip_below for stream in present], np.int64)
        counts: Bool = ~np.array(is_left_out, np.bool_)[of] & (frames.seqs >= skip_below[of])
        order: I64 = np.flatnonzero(counts).astype(np.int64)
        order = order[np.argsort(of[order], kind="stable")]
        ends = np.cumsum(np.bincount(of[order], minlength=len(numbers))).tolist()
        for number, stream, start, end in zip(numbers.tolist(), present, [0, *ends], ends, strict=False):
            if stream is None:
                continue
            if number in marks or number in self._recorded:
                positions = frames.positions[order[start:end]]
                self._cut(plan, number, start, positions, marks.pop(number, []), segment.position)
            elif start < end:
                plan.columns.append((number, stream.slot, start, end - start, stream.next_seq, 0))
                stream.next_seq += end - start
        for number, of_stream in marks.items():
            if number in self._streams:
                self._cut(plan, number, 0, np.empty(0, np.int64), of_stream, segment.position)
            elif of_stream and of_stream[0].position > self._ignore_until:
                raise self._not_open(of_stream[0].position, number)
        streams, slots, starts, lengths, seqs, rounds = np.array(plan.columns, np.int64).reshape(-1, 6).T.copy()
        columns = (streams, slots, starts, lengths, seqs, rounds)
        stretches = Stretches(frames, order, *columns, plan.given, plan.ends, plan.defects, plan.closed)
        self._find_defects(stretches, plan.broken)
        return stretches

    def states_before(self, stretches: Stretches) -> U8:
        """The states before all stretches, uint8 [S, row_bytes]. Call this before `step`."""
        states: U8 = np.empty((len(stretches), len(self._initial)), np.uint8)
        carried = [at for at in range(len(stretches)) if at not in stretches.given]
        states[carried] = self.stepper.read(stretches.slots[carried])
        for at, state in stretches.given.items():
            states[at] = self._initial if state is None else state
        return states

    def step(
        self, stretches: Stretches, on_frames: Callable[[I64, I64], None] = lambda slots, rows: None
    ) -> tuple[F32, U8]:
        """Step the frames of all stretches.

        Args:
            stretches: the result of the last `plan`.
            on_frames: called after each step with its slots and the indices of its frames.

        Returns:
            Outputs, float32 [frames, outputs], with zeros for frames outside of stretches, and the states after the
            stretches, uint8 [S, row_bytes].
        """
        x = stretches.frames.x
        y: F32 = np.zeros(stretches.frames.y.shape, np.float32)
        after: U8 = np.empty((len(stretches), len(self._initial)), np.uint8)
        for number in range(int(stretches.rounds.max(initial=-1)) + 1):
            rows = np.flatnonzero(stretches.rounds == number)
            rows = rows[np.argsort(-stretches.lengths[rows], kind="stable")]
            self._load_given(stretches, rows)
            slots, starts, lengths = stretches.slots[rows], stretches.starts[rows], stretches.lengths[rows]
            for at in range(int(lengths[0])):
                count = int(np.searchsorted(-lengths, -at))
                of_frames = stretches.order[starts[:count] + at]
                for first in range(0, count, self.stepper.max_batch_size):
                    part = slice(first, min(first + self.stepper.max_batch_size, count))
                    self.stepper.step(slots[part], of_frames[part], x, y)
                    on_frames(slots[part], of_frames[part])
            after[rows] = self.stepper.read(slots)
        self.release(stretches)
        return y, after

    def release(self, stretches: Stretches) -> None:
        """Forget the streams that end in these stretches; `step` calls this."""
        for number in stretches.closed:
            self.drop(number)

    def _load_given(self, stretches: Stretches, rows: I64) -> None:
        given = [row for row in rows.tolist() if row in stretches.given]
        initial = [row for row in given if stretches.given[row] is None]
        states = [(row, state) for row in given if (state := stretches.given[row]) is not None]
        if initial:
            self.stepper.load(stretches.slots[initial], None)
        if states:
            self.stepper.load(stretches.slots[[row for row, _ in states]], np.stack([state for _, state in states]))

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._slots += 1  # the engine's begin at 1
        return self._slots

    def _open_streams(self, marks: dict[int, list[Mark]], numbers: I64) -> None:
        unknown = dict.fromkeys(number for number in (*marks, *numbers.tolist()) if number not in self._streams)
        for number, of_stream in marks.items():
            if of_stream and isinstance(opened := of_stream[0], Opened):
                if number not in unknown:
                    raise self.reader.damaged(f"stream {number} opens again at position {opened.position}")
                del unknown[number]
                self._streams[number] = _Stream(self._take_slot(), opened.first_seq)
        if unknown:
            self.meet(list(unknown))

    def _check_known(self, frames: RecordedFrames, is_unknown: Bool) -> None:
        for at in np.flatnonzero(is_unknown & (frames.positions > self._ignore_until))[:1].tolist():
            raise self._not_open(int(frames.positions[at]), int(frames.streams[at]))

    def _not_open(self, position: int, number: int) -> DamagedRecording:
        return self.reader.damaged(f"the row at position {position} is of stream {number}, which is not open there")

    def _cut(self, plan: _Plan, number: int, first: int, positions: I64, marks: list[Mark], until: int) -> None:
        """Cut a stream's frames at marks and recorded states.

        Args:
            plan: receives the stretches.
            number: of the stream.
            first: the index of its first frame in the order.
            positions: of its frames.
            marks: of the stream.
            until: the position of the segment.
        """
        stream, recorded = self._streams[number], self._recorded.get(number, [])
        start, seq, rounds = first, stream.next_seq, 0
        given: tuple[U8 | None] | None = None

        def emit(end: int, state: End | None = None) -> None:
            nonlocal start, seq, given, rounds
            if start == end and given is None and state is None:
                return
            if given is not None:
                plan.given[len(plan.columns)] = given[0]
            if state is not None:
                plan.ends[len(plan.columns)] = state
            plan.columns.append((number, stream.slot, start, end - start, seq, rounds))
            start, seq, given, rounds = end, seq + end - start, None, rounds + 1

        def defect(position: int, sentence: str) -> None:
            plan.defects.append(Defect(number, position, seq, seq, sentence))

        for mark in () if stream.is_broken else (*marks, None):
            end = first + (len(positions) if mark is None else int(np.searchsorted(positions, mark.position)))
            while recorded and recorded[0].seq <= seq + end - start:
                state = recorded[0]
                if state.seq == seq + end - start and self._is_met_later(state, mark, until):
                    break
                recorded.pop(0)
                if state.seq < seq:
                    defect(
                        state.position,
                        f"a checkpoint holds its state before frame {state.seq}, where no frames were recorded",
                    )
                    continue
                emit(start + state.seq - seq, End(state.state, "checkpoint"))
                given = (state.state,)
            if mark is None:
                emit(end)
            elif isinstance(mark, Opened):
                if start < end:
                    raise self._not_open(int(positions[0]), number)
                given = (mark.state,)
            elif isinstance(mark, Closed):
                fits = mark.next_seq in (seq + end - start, UNKNOWN_SEQ)
                emit(end, End(mark.state, "final state") if fits and mark.state is not None else None)
                if not fits:
                    defect(
                        mark.position,
                        f"the stream was closed before frame {mark.next_seq}, but its recorded frames end before frame "
                        f"{seq}",
                    )
                if end < first + len(positions):
                    raise self._not_open(int(positions[end - first]), number)
                break
            elif (mark.seq or 0) >= stream.skip_below:
                emit(end)
                if mark.seq != seq:
                    defect(mark.position, f"its state was reset before frame {mark.seq}, where frame {seq} belongs")
                    plan.broken.add(number)
                    break
                given = (mark.state,)
        stream.next_seq = seq
        has_closed = any(isinstance(mark, Closed) for mark in marks)
        plan.closed += [number] * has_closed
        if has_closed or until == LAST or stream.is_broken:
            for state in [] if stream.is_broken else recorded:
                defect(
                    state.position,
                    f"a checkpoint holds its state before frame {state.seq}, where no frames were recorded",
                )
            recorded.clear()
        if not recorded:
            self._recorded.pop(number, None)

    def _find_defects(self, stretches: Stretches, broken: set[int]) -> None:
        """Shorten stretches to frames with consecutive seqs."""
        offsets, applied = stretches.offsets(), stretches.applied()
        seqs, positions = stretches.frames.seqs[applied], stretches.frames.positions[applied]
        expected = np.repeat(stretches.first_seqs, stretches.lengths) + offsets
        is_twice = (offsets > 0) & (positions == np.roll(positions, 1))
        wrong = np.flatnonzero((seqs != expected) | is_twice).tolist()
        of = np.repeat(np.arange(len(stretches)), stretches.lengths)[wrong].tolist() if wrong else []
        for at, row in zip(wrong, of, strict=True):
            number, seq, wanted = int(stretches.streams[row]), int(seqs[at]), int(expected[at])
            if self._streams[number].is_broken:
                continue
            self._streams[number].is_broken = True
            position = int(positions[at])
            stretches.defects[:] = [
                each for each in stretches.defects if each.stream != number or each.position < position
            ]
            if seq > wanted:
                sentence = f"frame {wanted} is missing: frame {seq} was recorded in its place"
            elif seq < wanted:
                sentence = f"frame {seq} was recorded again where frame {wanted} belongs"
            else:
                sentence = f"two frames were recorded in one step, at frame {seq}"
            stretches.defects.append(Defect(number, position, seq, wanted, sentence))
            stretches.lengths[row] = offsets[at]
            for later in np.flatnonzero(stretches.streams == number).tolist():
                if later >= row:
                    stretches.ends.pop(later, None)
                    stretches.lengths[later] *= later == row
        for number in broken:
            self._streams[number].is_broken = True

    def _is_met_later(self, state: RecordedState, mark: Mark | None, until: int) -> bool:
        """Whether a state at the frame of a mark was recorded after the mark took effect."""
        if mark is None:
            return state.has_reset and until < LAST
        if isinstance(mark, Opened):
            return True
        if not isinstance(mark, RecordedEvent) or mark.seq != state.seq:
            return False
        after = self._initial if mark.state is None else mark.state
        return state.position >= mark.position or after.tobytes() == state.state.tobytes()
