"""The client's streams: one table with a row for each stream, and the stream handles of users.

A `Stream` has a stream handle of one row, a `Group` one of many. Calls of one stream handle are sent in the order in
which they were made; there is no order between the calls of different stream handles. The server's handles are the
numbers in the table's column `HANDLE`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from instep_client.arguments import Indices
from instep_client.protocol.errors import StreamEvicted, stream_ended
from instep_client.protocol.wire import CLAIM, U64, Code, GrantArray

if TYPE_CHECKING:
    from asyncio import Future

    from instep_client.frames import StepCall
    from instep_client.requests import TurnCall

ENDING: Final = frozenset(
    {
        Code.IDLE,
        Code.CLIENT_GONE,
        Code.EXPIRED,
        Code.FENCED,
        Code.STATE_LOST,
        Code.UNLOADED,
        Code.UNKNOWN_STREAM,
        Code.FOREIGN_STREAM,
        Code.DATA_LOSS,
        Code.OUTPUTS_GONE,
    }
)
"""Codes after which a stream can never be stepped again."""
SLEEPS_ON: Final = frozenset({Code.TOO_MANY_STREAMS, Code.STEP_FAILED})
"""Codes for a hibernating stream that cannot be woken now."""

HANDLE = 0
SEQ = 1
ACKED = 2


class StreamHandle:
    """One stream or group: its rows, the calls that wait to be sent in order, and their outputs."""

    unanswered = 0
    """The number of frames sent and not finally answered (BUSY is not final)."""
    rewound_at = 0
    """The session's counter at the last rewind of any of its rows."""
    has_ended = False
    """Whether the server ended any of the streams."""
    has_sleepers = False
    """Whether any of the streams is asleep."""
    closing = False
    closed = False
    finished = False
    """Whether the user has declared that nothing more will be sent."""
    unread = 0
    """The number of sent frames in `results`."""
    last_seqs: U64 | None = None
    last_epochs: U64 | None = None
    """The next seqs and epochs at the time when the rows were given back."""
    waiter: Future[None] | None = None
    is_idle = True
    """Whether `SendQueue.go_on` may put it in line to send. False while it is in line, and while a request that was
    asked, or outputs that nobody takes, hold it up."""

    def __init__(self, names: Sequence[str], rows: Indices, single: bool) -> None:
        self.names = tuple(names)
        self.rows = rows
        self.single = single
        self.steps: deque[StepCall] = deque()
        """Calls that were not sent, or not sent completely."""
        self.requests: deque[TurnCall[Any]] = deque()
        """Requests that wait for their turn among `steps`."""
        self.results: deque[StepCall] = deque()
        """Pipelined sends whose outputs were not taken, oldest first."""

    def name_of(self, row: int | np.int64) -> str:
        """The name of the stream in one of its rows, which are in ascending order."""
        return self.names[int(np.searchsorted(self.rows, row))]


class OpenStreams:
    """All open streams, one per row; rows are reused after `remove`."""

    def __init__(self) -> None:
        self.columns: U64 = np.zeros((0, 3), np.uint64)
        """(handle, next seq, seq before which every output has come) of each row, laid out as `wire.COLUMN`; handle 0
        marks a free row."""
        self.numbers, self.seqs, self.acked = self.columns.T
        """Views of its columns; `numbers` are the server's handles."""
        self._words = memoryview(bytearray())
        """A view of `columns` as plain numbers, row by row, which is faster where it is about one row."""
        self.epoch: U64 = np.zeros(0, np.uint64)
        """The epoch of each stream."""
        self.server_has: U64 = np.zeros(0, np.uint64)
        """The seq that the server expected, for streams that it refused to resume."""
        self._early: dict[int, list[tuple[int, int]]] = {}
        """Outputs that came out of order, by row: the first seq, and the seq after the last, of each run of them."""
        self.rewound_at: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """The session's counter at the last rewind of the next seq."""
        self.held: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether frames of the stream were refused for the time being, and wait to be sent again."""
        self.ended: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """The code with which the server ended the stream, 0 while it is open."""
        self.asleep: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the stream hibernates or is `settling`, so that nothing of it is sent."""
        self.settling: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the server has woken the stream, or could not, and frames that were sent before are unanswered."""
        self.sentences: dict[int, str] = {}
        """The server's sentence for each code in `ended`."""
        self.moved_at: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """The seq from which another version of the model computes the stream; -1 if it never moved."""
        self.handles: list[StreamHandle | None] = []
        self._free: list[int] = []
        self._clock = 0

    def stamp(self) -> int:
        """The next number of the counter by which calls and rewinds are ordered."""
        self._clock += 1
        return self._clock

    def add(self, names: Sequence[str], grants: GrantArray, single: bool) -> StreamHandle:
        """Add rows for newly opened streams, and return their handle.

        Rewinds of a row's former stream are older than any call of the new one, and need no clearing.
        """
        if len(self._free) < len(grants):
            self._grow(len(grants) - len(self._free))
        rows = np.array(sorted(self._free[-len(grants) :]), np.int64)
        del self._free[-len(grants) :]
        handle = StreamHandle(names, rows, single)
        self.numbers[rows] = grants["handle"]
        self.seqs[rows] = grants["next_seq"]
        self.acked[rows] = grants["next_seq"]
        self.epoch[rows] = grants["epoch"]
        self.ended[rows] = 0
        self.asleep[rows] = self.settling[rows] = False
        self.moved_at[rows] = -1
        for row in rows.tolist():
            self.handles[row] = handle
        return handle

    def remove(self, handle: StreamHandle) -> None:
        """Free the rows of a handle, for which nothing may be waiting or unanswered."""
        assert handle.unanswered == 0
        handle.last_seqs, handle.last_epochs = self.next_seqs(handle), self.epochs(handle)
        handle.closed = True
        self.numbers[handle.rows] = 0
        for row in handle.rows.tolist():
            self.handles[row] = None
            self._early.pop(row, None)
        self._free.extend(reversed(handle.rows.tolist()))

    def take_columns(self, rows: Indices, timesteps: int) -> U64:
        """A copy of the rows' columns for a STEP; advances the next seqs."""
        columns: U64 = self.columns.take(rows, axis=0)
        if len(rows) == 1:
            self._words[3 * rows.item() + SEQ] += timesteps
        else:
            self.seqs[rows] = columns[:, SEQ] + np.uint64(timesteps)
        return columns

    def came_next(self, rows: Indices, columns: U64, timesteps: int) -> bool:
        """Note outputs of one row if they are its next ones, as is usual; return whether they were."""
        place, first = 3 * rows.item() + ACKED, columns.item(SEQ)
        if self._early or self._words[place] != first:
            return False
        self._words[place] = first + timesteps
        return True

    def came(self, rows: Indices, first: U64, end: U64) -> None:
        """Note outputs of these rows with the seqs from `first` to `end`, uint64 [N] each."""
        acked = self.acked[rows]
        if not self._early and first.tobytes() == acked.tobytes():  # as nearly always
            self.acked[rows] = end
            return
        due = first <= acked
        self.acked[rows] = np.where(due, np.maximum(acked, end), acked)
        if not due.all():
            for index in np.flatnonzero(~due & (end > first)).tolist():
                self._early.setdefault(int(rows[index]), []).append((int(first[index]), int(end[index])))
        if self._early:
            for row in self._early.keys() & set(rows.tolist()):
                self._catch_up(row)

    def _catch_up(self, row: int) -> None:
        acked = int(self.acked[row])
        waiting: list[tuple[int, int]] = []
        for first, end in sorted(self._early.pop(row)):
            if first <= acked:
                acked = max(acked, end)
            else:
                waiting.append((first, end))
        self.acked[row] = acked
        if waiting:
            self._early[row] = waiting

    def rewind(self, row: int, expected: int, outputs_are_gone: bool) -> None:
        """Continue a stream at a seq. Earlier outputs have arrived or, if they are gone, never will."""
        acked = int(self.acked[row])
        self.seqs[row] = expected
        self.acked[row] = expected if outputs_are_gone else min(acked, expected)

    def given(self, row: int) -> int:
        """The seq below which the server has computed every frame, as its outputs show."""
        return max([int(self.acked[row]), *(end for _, end in self._early.get(row, ()))])

    def in_window(self, rows: Indices, timesteps: int, window: int) -> bool:
        """Whether each of the rows may send this many more frames."""
        return int((self.seqs[rows] - self.acked[rows]).max()) <= window - timesteps

    def next_seqs(self, handle: StreamHandle) -> U64:
        """The seq that each of a handle's streams sends next, as a copy."""
        return self.seqs[handle.rows] if handle.last_seqs is None else handle.last_seqs.copy()

    def epochs(self, handle: StreamHandle) -> U64:
        """The present epoch of each of a handle's streams, as a copy."""
        return self.epoch[handle.rows] if handle.last_epochs is None else handle.last_epochs.copy()

    def moved(self, handles: U64, seqs: U64) -> None:
        """Note that another version of the model computes these streams from these seqs on."""
        rows, index = self._find(handles)
        self.moved_at[rows] = seqs[index]

    def woke(self, former: U64, handles: U64) -> Indices:
        """Give streams that have woken their new handles; return their rows."""
        rows, index = self._find(former)
        self.numbers[rows] = handles[index]
        return rows

    def sleep(self, rows: Indices, asleep: bool = True) -> None:
        """Send nothing of these streams, or continue them. Streams that have ended are skipped."""
        self.asleep[rows] = asleep & (self.ended[rows] == 0)
        self.settling[rows] = False
        for handle in self.handles_of(rows):
            handle.has_sleepers = bool(self.asleep[handle.rows].any())

    def claims(self, rows: Indices) -> bytes:
        """The claims on the streams of these rows, as a RESUME carries them."""
        claims = np.zeros(len(rows), CLAIM)
        claims["have"], claims["epoch"] = self.acked[rows], self.epoch[rows]
        return claims.tobytes()

    def resumed(self, rows: Indices, grants: GrantArray) -> None:
        """Give streams new handles and epochs; next seqs stay as they were."""
        self.numbers[rows] = grants["handle"]
        self.epoch[rows] = grants["epoch"]
        self.sleep(rows, False)

    def end(self, rows: Indices, code: Code, sentence: str) -> None:
        """Note that the server ended these streams. Streams that had ended before keep their first reason."""
        rows = rows[self.ended[rows] == 0]
        self.ended[rows] = code
        self.sleep(rows, False)
        self.sentences[int(code)] = sentence

    def why_ended(self, row: int) -> StreamEvicted:
        """A new exception with the reason why the stream of a row has ended."""
        handle, code = self.handles[row], Code(int(self.ended[row]))
        assert handle is not None
        return stream_ended(code, self.sentences[code], handle.name_of(row), self.given(row), int(self.server_has[row]))

    def why_any_ended(self, rows: Indices) -> StreamEvicted | None:
        """The exception for the first of these streams that has ended; None while all are open."""
        ended = rows[self.ended[rows] != 0]
        return self.why_ended(int(ended[0])) if len(ended) else None

    def check_not_ended(self, rows: Indices) -> None:
        """Raise StreamEvicted if the server has ended one of these streams."""
        error = self.why_any_ended(rows)
        if error is not None:
            raise error

    @property
    def is_empty(self) -> bool:
        """Whether there is no stream, open or ended."""
        return len(self._free) == len(self.handles)

    def rows_of(self, handles: U64) -> Indices:
        """The rows of those server handles that are open here."""
        return self._find(handles)[0]

    def _find(self, handles: U64) -> tuple[Indices, Indices]:
        """The rows of those server handles that are open here, and the index of each in `handles`."""
        rows = np.flatnonzero(np.isin(self.numbers, handles))
        order = np.argsort(handles, kind="stable")
        return rows, order[np.searchsorted(handles, self.numbers[rows], sorter=order)]

    def live_rows(self) -> Indices:
        """The rows of open streams."""
        return np.flatnonzero((self.numbers != 0) & (self.ended == 0))

    def names(self, rows: Indices) -> list[str]:
        """The names of the streams in these rows."""
        handles = [self.handles[row] for row in rows.tolist()]
        return [handle.name_of(row) for handle, row in zip(handles, rows, strict=True) if handle is not None]

    def rows_named(self, names: Sequence[str]) -> Indices:
        """The rows of open streams that have one of these names."""
        wanted, live = set(names), self.live_rows()
        return live[[name in wanted for name in self.names(live)]]

    def handles_of(self, rows: Indices) -> list[StreamHandle]:
        """The stream handles of these rows, each once."""
        handles = (self.handles[row] for row in rows.tolist())
        return list(dict.fromkeys(handle for handle in handles if handle is not None))

    def live_handles(self) -> list[StreamHandle]:
        """Every stream handle that has rows."""
        return self.handles_of(np.arange(len(self.handles)))

    def _grow(self, at_least: int) -> None:
        old = len(self.handles)
        more = max(at_least, old, 16)
        self.columns = np.concatenate([self.columns, np.zeros((more, 3), np.uint64)])
        self.numbers, self.seqs, self.acked = self.columns.T
        self._words = self.columns.data.cast("B").cast("Q")
        for name in ("epoch", "server_has", "rewound_at", "held", "ended", "moved_at", "asleep", "settling"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros(more, column.dtype)]))
        self.handles.extend([None] * more)
        self._free = [*range(old + more - 1, old - 1, -1), *self._free]
