"""The core without an engine: streams, frames and kernels, with a network that adds up.

The output of a frame is the sum of the first values of all frames of its stream so far, and behind it the frame's seq.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from instep.core.admission import SENT_COLUMN, SENT_MESSAGE, admit, resolve_handles
from instep.core.histogram import new_histogram
from instep.core.replies import assemble, repeated_outputs
from instep.core.runs import fail_run, finish_run, hold, release
from instep.core.scheduler import begin_run
from instep.core.streams import StreamTable
from instep.core.tables import (
    FIRST_COLUMN,
    FIRST_MESSAGE,
    FIRST_VALUE,
    FREE_COLUMN,
    FREE_COLUMNS,
    FREE_MESSAGE,
    FREE_MESSAGES,
    MESSAGES,
    NO_OWNER,
    NOTHING,
    ORIGIN_OF,
    PENDING_FRAMES,
    READY,
    ROUND_TAIL,
    TIMESTEPS,
    WIDTH,
    Tables,
    make_tables,
    rows_of,
)
from instep.core.typing import F32, I32, I64, U64
from instep_client.protocol.codes import Code

OWNER = 1
FEATURES = 2
OUTPUTS = 2


def u64(*values: int) -> U64:
    """Handles, epochs, or what a claimant holds."""
    return np.array(values, np.uint64)


def ints(*values: int) -> I64:
    """Slots or seqs."""
    return np.array(values, np.int64)


def frames(*columns: Sequence[float]) -> F32:
    """Frames that begin with these values, one list for each column: float32 [T, N, 2]."""
    x = np.ones((len(columns[0]), len(columns), FEATURES), np.float32)
    x[:, :, 0] = np.array(columns, np.float32).T
    return x


@dataclass(frozen=True)
class Sent:
    """One message: columns of handle, seq and acknowledged seq, and their frames [T, N, 2]."""

    columns: Sequence[tuple[int, int, int]]
    x: F32
    origin: int = OWNER
    tag: int = 0
    arrived_ns: int = 1
    arrival: int = 0


@dataclass(frozen=True)
class Answered:
    """One column of a reply."""

    code: int
    length: int
    expected_seq: int
    outputs: list[float]
    """The sums of the applied timesteps."""


@dataclass(frozen=True)
class Answer:
    """The reply to one message."""

    origin: int
    tag: int
    columns: list[Answered]


@dataclass(frozen=True)
class Batch:
    """A run: slots and the rows of their frames, int64 [steps, B]."""

    slots: I64
    rows: I64


@dataclass
class CoreStreams:
    """A table and its kernels; what the engine does between them, step by step.

    Attributes:
        window: frames of a stream in the frame buffer.
        max_streams: slots.
        max_origins: numbers of origins.
        max_pending: frames that may be pending, of all streams together.
        credit: frames that may be unanswered, of one origin.
        generation: where the generations of all slots begin.
        max_reply_frames: T × N of a reply to several messages.
        max_reply_messages: messages of a reply.
    """

    window: int = 4
    max_streams: int = 8
    max_origins: int = 4
    max_pending: int = 100
    credit: int = 1000
    generation: int = 7
    max_reply_frames: int = 1000
    max_reply_messages: int = 100
    tables: Tables = field(init=False)
    table: StreamTable = field(init=False)
    queue_us: I64 = field(init=False)
    complete: list[int] = field(init=False, default_factory=list)
    """Numbers of messages whose last frame was stepped and which are not answered yet."""
    groups: int = field(init=False, default=0)
    """How many groups the newest answers came in."""
    refusals: list[int] = field(init=False, default_factory=list)
    """For each message of the newest `admit` 0, or why it was refused as a whole."""

    def __post_init__(self) -> None:
        self.tables = make_tables(
            self.max_streams, self.max_origins, self.window, FEATURES, OUTPUTS, self.max_pending, 1, self.credit
        )
        self._packed = tuple(self.tables)
        self.table = StreamTable(self.tables, np.full(self.max_streams + 1, self.generation, np.uint32), 100)
        self.queue_us = new_histogram()
        self._sums = np.zeros(self.max_streams + 1)
        self._answered: list[Answer] = []
        self._repeated: dict[int, tuple[F32, I64]] = {}

    @property
    def pending(self) -> int:
        """Frames admitted and not yet computed."""
        return int(self.tables.counts[PENDING_FRAMES])

    @property
    def ready(self) -> int:
        """Streams in ready queues."""
        return int(self.tables.counts[READY])

    def open(self, *names: str, owner: int = OWNER, first_seqs: Sequence[int] | None = None) -> list[int]:
        """Handles of new streams, of which the first in a new table has slot 1."""
        first = None if first_seqs is None else ints(*first_seqs)
        slots, codes = self.table.open(names, owner, now_ns=0, first_seqs=first)
        assert not codes.any()
        self._sums[slots] = 0
        return self.handles(slots)

    def handles(self, slots: I64) -> list[int]:
        """The present handles of slots."""
        return [int(handle) for handle in self.table.slots.handles(slots)]

    def resolve(self, handles: Sequence[int], origin: int = OWNER) -> list[int]:
        """For each handle 0, or why `origin` may not use it."""
        codes = np.empty(len(handles), np.int32)
        resolve_handles(self._packed, u64(*handles), origin, np.empty(len(handles), np.int64), codes)
        return [int(code) for code in codes]

    def names_one_twice(self, handles: Sequence[int]) -> bool:
        """Whether handles name a stream of `OWNER` twice."""
        slots, codes = np.empty(len(handles), np.int64), np.empty(len(handles), np.int32)
        return bool(resolve_handles(self._packed, u64(*handles), OWNER, slots, codes))

    def admit(self, *messages: Sent) -> list[int]:
        """Admit messages together; the codes of the columns of those that were not refused as a whole.

        Messages of which nothing has to be computed are assembled at once: `answer` returns them.
        """
        heads = np.zeros(len(messages), SENT_MESSAGE)
        columns = np.zeros(sum(len(sent.columns) for sent in messages), SENT_COLUMN)
        place = values = 0
        for head, sent in zip(heads, messages, strict=True):
            timesteps, width, _ = sent.x.shape
            assert width == len(sent.columns)
            for name, value in (("tag", sent.tag), ("origin", sent.origin), ("arrived_ns", sent.arrived_ns)):
                head[name] = value
            head["timesteps"], head["width"], head["arrival"] = timesteps, width, sent.arrival
            head["column_at"], head["value_at"] = place, values
            values += sent.x.size
            for handle, seq, acked in sent.columns:
                columns[place : place + 1].view("<u8")[:] = handle, seq, acked
                place += 1
        x = np.concatenate([sent.x.ravel() for sent in messages]).view(np.uint32)
        taken = _next_free(self.tables)
        complete, partly_repeated, refused, _ = admit(self._packed, heads, columns, x)
        self.refusals = [int(code) for code in self.tables.outcomes[: len(messages)]]
        assert refused == sum(code != 0 for code in self.refusals)
        for number in self.tables.complete[len(messages) - partly_repeated : len(messages)].tolist():
            self._repeated[number] = repeated_outputs(self._packed, number)
        codes = [code for number in taken[: len(messages) - refused] for code in self._codes(number)]
        self._answered += self._assemble(self.tables.complete[:complete].tolist(), 0)
        return codes

    def _codes(self, number: int) -> list[int]:
        return [int(self.tables.columns["code"][column]) for column in columns_of(self.tables, number)]

    def send(self, *columns: tuple[int, int, int], x: F32, origin: int = OWNER) -> list[int]:
        """Admit one message; the codes of its columns."""
        return self.admit(Sent(columns, x, origin))

    def begin(self, max_batch_size: int = 100, max_steps: int = 1) -> Batch:
        """The next batch, whose streams are in a run from now on."""
        size, steps = begin_run(self._packed, max_batch_size, max_steps)
        rows = self.tables.run_rows[: steps * size].reshape(steps, size).copy()
        return Batch(self.tables.run_slots[:size].copy(), rows)

    def compute(self, batch: Batch, steps: int | None = None) -> None:
        """What the network does: `steps` steps of the batch, or all."""
        for rows in batch.rows[:steps]:
            self._sums[batch.slots] += self.tables.x[rows, 0]
            self.tables.y[rows, 0] = self._sums[batch.slots]
            self.tables.y[rows, 1] = rows

    def finish(self, batch: Batch, steps: int | None = None, *, is_over: bool = True, now_ns: int = 5000) -> None:
        """Steps of the batch, all by default, were applied."""
        steps = len(batch.rows) if steps is None else steps
        count = finish_run(self._packed, batch.slots, steps, now_ns, is_over)
        self.complete += self.tables.complete[:count].tolist()

    def fail(self, slots: I64, code: Code = Code.STEP_FAILED) -> None:
        """Nothing that is pending of these streams can be applied."""
        count = fail_run(self._packed, slots, int(code))
        self.complete += self.tables.complete[:count].tolist()

    def step(self, max_batch_size: int = 100, max_steps: int = 1) -> Batch:
        """Step one batch."""
        batch = self.begin(max_batch_size, max_steps)
        self.compute(batch)
        self.finish(batch)
        return batch

    def step_all(self) -> list[Answer]:
        """Step until nothing is ready; all answers."""
        while self.ready:
            self.step()
        return self.answer()

    def hold(self, *slots: int) -> None:
        """Let streams begin no step."""
        hold(self._packed, ints(*slots))

    def release(self, *slots: int, now_ns: int = 0) -> None:
        """Undo one hold of each."""
        release(self._packed, ints(*slots), now_ns)

    def answer(self, began_ns: int = 0) -> list[Answer]:
        """The replies of all messages that are complete."""
        self.groups = 0
        answers = self._answered + self._assemble(self.complete, began_ns)
        self._answered, self.complete = [], []
        return answers

    def _assemble(self, complete: list[int], began_ns: int) -> list[Answer]:
        answers: list[Answer] = []
        while complete:
            numbers: I32 = np.array(complete, np.int32)
            limits = self.max_reply_frames, self.max_reply_messages
            count, taken = assemble(self._packed, numbers, began_ns, *limits, self.queue_us)
            self.groups += count
            complete = complete[taken:]
            for group in self.tables.groups[:count].tolist():
                answers += self._answers(group)
        return answers

    def _answers(self, group: list[int]) -> list[Answer]:
        first, width, timesteps = group[FIRST_VALUE], group[WIDTH], group[TIMESTEPS]
        y = self.tables.reply_y[first : first + timesteps * width * OUTPUTS].reshape(timesteps, width, OUTPUTS)
        column, answers = 0, []
        for place in range(group[FIRST_MESSAGE], group[FIRST_MESSAGE] + group[MESSAGES]):
            tag, columns, number = self.tables.reply_messages[:, place].tolist()
            kept, skipped = self._repeated.pop(number, (np.zeros((0, columns, OUTPUTS), np.float32), np.zeros(columns)))
            answered = []
            for at in range(columns):
                code, length, expected_seq = self.tables.reply_columns[:, group[FIRST_COLUMN] + column].tolist()
                repeated = int(skipped[at])
                own = np.concatenate([kept[:repeated, at], y[repeated:, column]])
                assert np.isnan(own[length:]).all(), "what was not applied has an output"
                answered.append(Answered(code, length, expected_seq, own[:length, 0].tolist()))
                column += 1
            answers.append(Answer(group[ORIGIN_OF], tag, answered))
        assert column == width
        return answers

    def inputs(self, slot: int, *seqs: int) -> list[float]:
        """The first values of frames in the frame buffer."""
        values: list[float] = self.tables.x[rows_of(self.tables, ints(slot), ints(*seqs)), 0].tolist()
        return values


def columns_of(tables: Tables, number: int) -> list[int]:
    """The records of a pending message's columns."""
    found, column = [], int(tables.messages["head"][number])
    for _ in range(int(tables.messages["width"][number])):
        found.append(column)
        column = int(tables.columns["next"][column])
    return found


def _next_free(tables: Tables) -> list[int]:
    numbers, number = [], int(tables.counts[FREE_MESSAGE])
    for _ in range(int(tables.counts[FREE_MESSAGES])):
        numbers.append(number)
        number = int(tables.messages["next_free"][number])
    assert number == NOTHING
    return numbers


def check_invariants(core: CoreStreams) -> None:
    """What holds between any two kernels; nothing is in two lists, and every count is right."""
    tables, counts = core.tables, core.tables.counts
    streams, origins, messages = tables.streams, tables.origins, tables.messages
    # Messages and columns are free or pending, each once.
    free = _next_free(tables)
    free_columns, column = [], int(counts[FREE_COLUMN])
    for _ in range(int(counts[FREE_COLUMNS])):
        free_columns.append(column)
        column = int(tables.columns["next"][column])
    assert column == NOTHING
    pending = sorted(set(range(len(messages))) - set(free))
    used = [column for number in pending for column in columns_of(tables, number)]
    assert len(set(free)) == len(free)
    assert sorted(used + free_columns) == list(range(len(tables.columns)))
    # Counts of streams, origins and messages agree with their columns.
    is_open = streams["owner"] != NO_OWNER
    unstepped = np.where(is_open, streams["next_seq"] - streams["step_seq"], 0)
    assert (unstepped >= 0).all()
    assert (unstepped <= core.window).all()
    assert counts[PENDING_FRAMES] == unstepped.sum() == messages["remaining"][pending].sum()
    assert counts[PENDING_FRAMES] <= core.max_pending
    by_slot = np.zeros(len(streams), np.int64)
    for record in tables.columns[used]:
        by_slot[record["slot"]] += record["fresh"]
    assert (streams["unanswered"] == by_slot).all()
    assert set(core.complete) <= {number for number in pending if messages["remaining"][number] == 0}
    for number, origin in enumerate(origins):
        own = [each for each in pending if messages["origin"][each] == number]
        assert origin["messages"] == len(own)
        assert origin["unanswered"] == messages["frames"][own].sum() <= core.credit
        assert origin["streams"] == (streams["owner"] == number).sum()
    # Every ready queue and the round hold each stream and origin once; who may step is in a queue.
    queued, round_of = _queued(tables)
    assert len(set(queued)) == len(queued) == counts[READY]
    assert sorted(queued) == np.flatnonzero(streams["queued"]).tolist()
    assert sorted(round_of) == np.flatnonzero(origins["ready_head"] != NOTHING).tolist()
    may_step = is_open & (unstepped > 0) & (streams["running"] == 0) & (streams["holds"] == 0)
    assert set(np.flatnonzero(may_step).tolist()) <= set(queued)
    assert not (streams["running"] & streams["queued"]).any()


def _queued(tables: Tables) -> tuple[list[int], list[int]]:
    """Streams in ready queues, and origins in the round."""
    queued: list[int] = []
    round_of: list[int] = []
    tail = int(tables.counts[ROUND_TAIL])
    origin = tail
    while origin != NOTHING and (not round_of or origin != tail):
        round_of.append(origin)
        slot = int(tables.origins["ready_head"][origin])
        while slot != NOTHING:
            queued.append(slot)
            assert len(queued) <= len(tables.streams)
            last, slot = slot, int(tables.streams["next_ready"][slot])
        assert last == tables.origins["ready_tail"][origin]
        origin = int(tables.origins["next_origin"][origin])
        assert len(round_of) <= len(tables.origins)
    return queued, round_of
