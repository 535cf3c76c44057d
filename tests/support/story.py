"""An engine's life as it is written down, and the truth about every moment of it, from the definition."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.tables import Tables, make_tables, rows_of
from instep.core.typing import F32, I64
from instep.models.model import Model
from instep.recording.reader import load_open_streams
from instep.recording.records import StateRows
from instep.recording.schema import Durability, RecordingHeader, owner_detail
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.runtime.stepper import Stepper
from instep.server.recordings import recording_header
from instep.streaming.service import Recovery
from instep.streaming.states import put_into_memory
from tests.support.models import SMALL, whole
from tests.support.rows import close_stream, open_stream, stream_event
from tests.support.running import CPU, config, prepared
from tests.support.states import floats_of
from tests.support.states import rows_of as state_rows


@dataclass(frozen=True)
class EngineParts:
    """Streams, frames and states; all empty at first."""

    tables: Tables
    table: StreamTable
    dirty: DirtyTracker
    stepper: Stepper

    def resume(self, path: Path, header: RecordingHeader) -> tuple[RecordingWriter, Recovery]:
        """Put the open streams of a recording into it, those too that would hibernate."""
        writer, recovery = resume_recording(path, header, self.tables, self.table, self.dirty, self.stepper)
        try:
            streams = load_open_streams(path, recovery.hibernated.values())
        except BaseException:
            writer.abandon()
            raise
        put_into_memory(self.tables, self.table, self.stepper, streams)
        return writer, recovery

    def slot(self, name: str) -> int:
        """The slot of an open stream."""
        slot = int(self.table.find([name])[0])
        assert slot, f"{name} is not open"
        return slot


def new_parts(model: Model, window: int, max_streams: int) -> EngineParts:
    """Room for so many streams of a model, and as many frames of each as the window.

    Those of one model and size share a stepper, which takes long to make: each call clears its states.
    """
    sizes = model.description.features, model.description.outputs
    tables = make_tables(max_streams, 4, window, *sizes, 1000, 1000, 1000)
    table = StreamTable(tables, np.ones(max_streams + 1, np.uint32))
    key = model.fingerprint, max_streams
    if key not in _STEPPERS:
        _STEPPERS[key] = Stepper(prepared(model).network, 256, max_streams, CPU)
    stepper = _STEPPERS[key]
    stepper.load(np.arange(1, max_streams + 1), None)
    return EngineParts(tables, table, DirtyTracker(max_streams), stepper)


_STEPPERS: dict[tuple[str, int], Stepper] = {}


FEATURES, HIDDEN = 5, 8
WINDOW, MOST_STREAMS = 6, 12
MOST_OPENINGS: Final = 64
_NEVER: Final = 2**62
_BEGAN_NS: Final = 1_700_000_000_000_000_000


@dataclass(slots=True)
class _Frame:
    position: int
    x: F32
    failed_at: int = _NEVER


@dataclass(slots=True)
class _Life:
    """One stream, with the positions at which everything of it was written down."""

    name: str
    opened_at: int
    first_seq: int
    initial: F32
    owners: list[tuple[int, int, int, int]]
    """Position, epoch, the epoch held before, the frame the owner went on with."""
    frames: list[_Frame] = field(default_factory=list)
    resets: list[tuple[int, int, F32]] = field(default_factory=list)
    """Position, how many good frames came before, state."""
    closed_at: int = _NEVER
    acked: int = 0


@dataclass(frozen=True, slots=True)
class Truth:
    """One open stream at some moment."""

    epoch: int
    former_epoch: int
    granted_seq: int
    first_seq: int
    seq: int
    state: F32
    """float32 [1, hidden size]."""
    x: F32
    """float32 [seq - first_seq, features]: all its frames."""
    y: F32
    """float32 [seq - first_seq, outputs]."""


@cache
def story_header(durability: Durability = "commit") -> RecordingHeader:
    """The header of a recording of the story's engine."""
    return recording_header(prepared(SMALL), config(recording={"path": "r.db", "durability": durability}))


def new_engine() -> EngineParts:
    """What a restart puts the story's streams into."""
    return new_parts(SMALL, WINDOW, MOST_OPENINGS)


class Story:
    """Writes a random life of an engine, as its server would: steps under way, snapshots beside them, group commits.

    Args:
        writer: of an empty recording.
        seed: of everything that happens.
        snapshots: whether there are any.
        trims: whether the writer is asked after each commit, some times or none, whether it has something to trim.
    """

    def __init__(self, writer: RecordingWriter, seed: int, *, snapshots: bool = True, trims: bool = False) -> None:
        self.writer = writer
        self.durable: list[int] = []
        """The newest position of each commit."""
        self._rng = np.random.default_rng(seed)
        self._snapshots = snapshots
        self._trims = trims
        self._lives: dict[int, _Life] = {}
        self._epoch = 1000
        self._now_ns = _BEGAN_NS
        self._last_inputs = 0
        self._under_way: deque[tuple[int, F32]] = deque()
        """Steps whose outputs are not written down yet: position, y."""
        self._dirty: set[int] = set()
        self._y: dict[int, list[F32]] = {}
        self._cache: dict[int, dict[str, Truth]] = {}
        self._x = np.zeros((MOST_OPENINGS, FEATURES), np.float32)
        self._outputs = np.zeros((MOST_OPENINGS, HIDDEN), np.float32)
        self._stepper = Stepper(prepared(SMALL).network, MOST_OPENINGS, MOST_OPENINGS, CPU)

    # ── What happens ───────────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, rounds: int) -> None:
        """So many rounds of random events, each round in one commit."""
        for _ in range(rounds):
            for _ in range(int(self._rng.integers(1, 6))):
                self._something_happens()
            self.commit()

    @property
    def opened(self) -> dict[int, int]:
        """The position at which each stream opened."""
        return {number: life.opened_at for number, life in self._lives.items()}

    def commit(self) -> None:
        """Make it durable."""
        self.writer.commit()
        self.durable.append(self.writer.position)
        for _ in range(int(self._rng.integers(4)) if self._trims else 0):
            self.writer.trim(self._now_ns)

    def _something_happens(self) -> None:
        open_now = self._open()
        if not open_now:
            self.open()
            return
        stream = int(self._rng.choice(open_now))
        match self._rng.choice(100):
            case roll if roll < 62:
                size = int(self._rng.integers(1, len(open_now) + 1))
                self.step(self._rng.permutation(open_now)[:size].tolist())
            case roll if roll < 74:
                if len(open_now) < MOST_STREAMS and len(self._lives) < MOST_OPENINGS:
                    self.open()
            case roll if roll < 78:
                self.close(stream)
            case roll if roll < 84:
                self.reset(stream)
            case roll if roll < 90:
                self.own(stream)
            case roll if roll < 93:
                self.fail(stream)
            case _ if self._snapshots:
                self.snapshot()

    def open(self, first_seq: int | None = None) -> int:
        """A stream opens; its number."""
        number = len(self._lives) + 1
        has_state = bool(self._rng.random() < 0.5)
        if first_seq is None:
            first_seq = int(self._rng.choice([0, 0, 1000]))
        initial = self._random_state() if has_state else np.zeros((1, HIDDEN), np.float32)
        name, epoch = f"stream-{number}", self._next_epoch()
        open_stream(self.writer, number, name, epoch, first_seq, self._now(), initial if has_state else None)
        at = self.writer.position
        self._lives[number] = _Life(name, at, first_seq, initial, [(at, epoch, 0, first_seq)], acked=first_seq)
        self._y[number] = []
        self._stepper.load(np.array([number]), state_rows(initial[None]))
        return number

    def step(self, streams: list[int]) -> None:
        """A batch is stepped; its outputs follow now or, as a second step may be under way, after the next one's."""
        x = self._inputs(streams)
        slots, rows = np.array(streams, np.int64), np.arange(len(streams))
        self._x[: len(streams)] = x
        self._stepper.step(slots, rows, self._x, self._outputs)
        self._under_way.append((self._last_inputs, self._outputs[: len(streams)].copy()))
        self._dirty.update(streams)
        for at, stream in enumerate(streams):
            self._lives[stream].frames.append(_Frame(self._last_inputs, x[at]))
            self._y[stream].append(self._outputs[at].copy())
        if len(self._under_way) > 1 or self._rng.random() < 0.5:
            self._answer(len(self._under_way) - int(self._rng.integers(2)))

    def fail(self, stream: int) -> None:
        """A step fails: its frame was not applied."""
        self._answer()
        x = self._inputs([stream])
        self.writer.fail_batch(self._now(), self._last_inputs, "step_failed: out of luck")
        self._lives[stream].frames.append(_Frame(self._last_inputs, x[0], self.writer.position))

    def reset(self, stream: int) -> None:
        """A stream gets another state."""
        self._answer()
        is_zero = bool(self._rng.random() < 0.5)
        state = np.zeros((1, HIDDEN), np.float32) if is_zero else self._random_state()
        stream_event(self.writer, self._now(), "reset", stream, self._seq(stream), "", None if is_zero else state)
        self._lives[stream].resets.append((self.writer.position, len(self._y[stream]), state))
        self._stepper.load(np.array([stream]), state_rows(state[None]))
        self._dirty.add(stream)

    def own(self, stream: int) -> None:
        """A stream gets another owner."""
        self._answer()
        life, epoch, seq = self._lives[stream], self._next_epoch(), self._seq(stream)
        former = life.owners[-1][1] if self._rng.random() < 0.5 else 0
        stream_event(self.writer, self._now(), "owner", stream, epoch, owner_detail(former, seq))
        life.owners.append((self.writer.position, epoch, former, seq))

    def close(self, stream: int) -> None:
        """A stream ends."""
        self._answer()
        (state,) = floats_of(self._stepper.read(np.array([stream])), 1, HIDDEN)
        close_stream(self.writer, stream, self._now(), "closed by its client", self._seq(stream), state)
        self._lives[stream].closed_at = self.writer.position
        self._dirty.discard(stream)

    def snapshot(self) -> None:
        """States of what has changed; a step more may have been made since it was decided."""
        through, streams = self._last_inputs, sorted(self._dirty)
        self._dirty.clear()
        if not streams or not through:
            return
        if self._rng.random() < 0.5:
            self.step(self._open())
        self._answer()
        cut = int(self._rng.integers(len(streams))) if self._rng.random() < 0.5 else 0
        if cut:  # in two transactions
            self.writer.add_states(self._now(), through, self._states(streams[:cut]))
            self.commit()
            self.step(self._open())
            self._answer()
            if self._rng.random() < 0.3:
                self._dirty.update(streams[cut:])  # or never finished
                return
        self.writer.checkpoint(self._now(), through, self._states(streams[cut:]))

    def _states(self, streams: list[int]) -> StateRows:
        """With the frames that their clients may not have."""
        seqs = np.array([self._seq(stream) for stream in streams], np.int64)
        first = []
        for stream, seq in zip(streams, seqs.tolist(), strict=True):
            life = self._lives[stream]
            life.acked = int(self._rng.integers(max(life.acked, seq - WINDOW), seq + 1))
            first.append(life.acked)
        tails = [
            (self._good(stream), self._y[stream], slice(begin - life.first_seq, seq - life.first_seq))
            for stream, begin, seq in zip(streams, first, seqs.tolist(), strict=True)
            for life in [self._lives[stream]]
        ]
        x = np.array([frame.x for good, _, tail in tails for frame in good[tail]], np.float32)
        y = np.array([row for _, rows, tail in tails for row in rows[tail]], np.float32)
        return StateRows(
            np.array(streams, np.int64),
            seqs,
            self._stepper.read(np.array(streams, np.int64)),
            np.array(first, np.int64),
            x.reshape(-1, FEATURES),
            y.reshape(-1, HIDDEN),
        )

    def _inputs(self, streams: list[int]) -> F32:
        x = self._rng.standard_normal((len(streams), FEATURES)).astype(np.float32)
        seqs = np.array([self._seq(stream) for stream in streams], np.uint64)
        self._last_inputs = self.writer.add_inputs(self._now(), np.array(streams, np.uint32), seqs, x)
        return x

    def _answer(self, count: int | None = None) -> None:
        for _ in range(len(self._under_way) if count is None else count):
            position, y = self._under_way.popleft()
            self.writer.add_outputs(self._now(), position, y)

    def _open(self) -> list[int]:
        return [number for number, life in self._lives.items() if life.closed_at == _NEVER]

    def _seq(self, stream: int) -> int:
        return self._lives[stream].first_seq + len(self._y[stream])

    def _good(self, stream: int) -> list[_Frame]:
        return [frame for frame in self._lives[stream].frames if frame.failed_at == _NEVER]

    def _random_state(self) -> F32:
        return self._rng.uniform(-1, 1, (1, HIDDEN)).astype(np.float32)

    def _next_epoch(self) -> int:
        self._epoch += int(self._rng.integers(1, 5))
        return self._epoch

    def _now(self) -> int:
        self._now_ns += 1000
        return self._now_ns

    # ── What is true ───────────────────────────────────────────────────────────────────────────────────────────────

    def truth(self, position: int) -> dict[str, Truth]:
        """The streams that are open when everything up to a position counts and nothing after it, by name."""
        if position not in self._cache:
            self._cache[position] = {
                life.name: self._truth(life, position)
                for life in self._lives.values()
                if life.opened_at <= position < life.closed_at
            }
        return self._cache[position]

    def _truth(self, life: _Life, position: int) -> Truth:
        frames = [frame for frame in life.frames if frame.position <= position < frame.failed_at]
        x = np.array([frame.x for frame in frames], np.float32).reshape(-1, FEATURES)
        stretches = [(0, life.initial), *((count, state) for at, count, state in life.resets if at <= position)]
        ends = [*(count for count, _ in stretches[1:]), len(x)]
        y, state = [np.zeros((0, HIDDEN), np.float32)], life.initial
        for (begin, initial), end in zip(stretches, ends, strict=True):
            state = initial
            if end > begin:
                outputs, state = whole(SMALL, x[begin:end], initial)
                y.append(outputs)
        _, epoch, former, granted = [owner for owner in life.owners if owner[0] <= position][-1]
        return Truth(epoch, former, granted, life.first_seq, life.first_seq + len(x), state, x, np.concatenate(y))


def assert_restored(engine: EngineParts, truth: dict[str, Truth]) -> None:
    """The engine holds exactly the streams of that moment: owners, seqs, states, and frames that may be repeated."""
    table, tables = engine.table, engine.tables
    names = {table.name(slot) for slot in np.flatnonzero(table.owner == table.parked).tolist()}
    assert names == truth.keys()
    assert table.open_count == len(truth)
    for name, expected in truth.items():
        slot = engine.slot(name)
        owner = (table.epoch[slot], table.former_epoch[slot], table.granted_seq[slot])
        assert owner == (expected.epoch, expected.former_epoch, expected.granted_seq), name
        assert table.first_seq[slot] == expected.first_seq, name
        assert table.next_seq[slot] == table.step_seq[slot] == expected.seq, name
        state = engine.stepper.read(np.array([slot]))[0]
        assert state.tobytes() == expected.state.tobytes(), name
        first = max(int(table.acked[slot]), expected.seq - WINDOW)
        assert expected.first_seq <= table.acked[slot] <= expected.seq, name
        seqs: I64 = np.arange(first, expected.seq)
        rows, of = rows_of(tables, np.full(len(seqs), slot), seqs), seqs - expected.first_seq
        assert tables.x[rows].tobytes() == expected.x[of].tobytes(), name
        assert tables.y[rows].tobytes() == expected.y[of].tobytes(), name
