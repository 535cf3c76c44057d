"""Reads the STEPs that have arrived in compiled code: from the socket into the arrays that admission takes."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from instep.core.admission import SENT_COLUMN, SENT_MESSAGE
from instep.core.compiled import inlined, kernel
from instep.core.tables import Records
from instep.core.typing import I64, U8, U32, Int
from instep.frontends.zmq.native import (
    DONTWAIT,
    copy_memory,
    has_more,
    message_data,
    message_size,
    receive_part,
)
from instep.frontends.zmq.table import NOBODY, PeerTable, number_of
from instep.streaming.api import Frames
from instep_client.protocol.wire import COLUMN_BYTES, DTYPE_F32, MAX_BLOCK_STREAMS, STEP, STEP_HEADER

MOST_MESSAGES: Final = 256
"""The most messages that are read in one turn."""
_MOST_COLUMNS, _MOST_VALUES = 2**16, 2**20
"""The columns and the float32 inputs after which no more messages are read in one turn."""
_MOST: Final = np.array([MOST_MESSAGES, _MOST_COLUMNS, _MOST_VALUES])
_HEADER_BYTES: Final = STEP_HEADER.size
_FIRST_WORD: Final = STEP | DTYPE_F32 << 8
"""Kind, dtype and reserved bytes of a good header."""
_NO_SUCH_ROW: Final = -1


class Arrays(NamedTuple):
    """What the kernels read and write."""

    counts: I64
    """int64 [3]: messages, columns and values taken."""
    messages: Records
    columns: Records
    x: U32
    header: U32
    """uint32 [6]: scratch."""
    models: Records
    peers: Records
    """PEER, by row."""
    routing_ids: U32
    """uint32 [N], in order."""
    rows_of_ids: I64
    """int64 [N]: the peers' rows."""


@inlined
def _row_of(arrays: Arrays, routing_id: Int) -> Int:
    ids = arrays.routing_ids
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < routing_id:
            low = middle + 1
        else:
            high = middle
    if low < len(ids) and ids[low] == routing_id:
        return np.int64(arrays.rows_of_ids[low])
    return _NO_SUCH_ROW


@inlined
def _take(arrays: Arrays, row: Int, header: Int, header_bytes: Int, x: Int, x_bytes: Int, now_ns: int) -> bool:
    """Take a message of two parts, given by address and size, if it is a STEP whose sizes are right."""
    if header_bytes < _HEADER_BYTES:
        return False
    fields, counts, messages, sender = arrays.header, arrays.counts, arrays.messages, arrays.peers[row]
    copy_memory(fields.ctypes.data, header, _HEADER_BYTES)
    timesteps, width, features = np.int64(fields[1]), np.int64(fields[2]), np.int64(fields[3])
    model = arrays.models[sender["model"]]
    is_good = (
        fields[0] == _FIRST_WORD
        and fields[5] < 2**31  # the upper half of the request
        and timesteps > 0
        and 0 < width <= MAX_BLOCK_STREAMS
        and timesteps * width <= model["max_block_frames"]
        and features == model["features"]
        and header_bytes == _HEADER_BYTES + COLUMN_BYTES * width
        and x_bytes == 4 * timesteps * width * features
        and model["accepts"]
    )
    if not is_good:
        return False
    message, column, value = counts[0], counts[1], counts[2]
    copy_memory(arrays.columns.ctypes.data + COLUMN_BYTES * column, header + _HEADER_BYTES, COLUMN_BYTES * width)
    copy_memory(arrays.x.ctypes.data + 4 * value, x, x_bytes)
    messages["tag"][message] = np.int64(fields[4]) | np.int64(fields[5]) << 32
    messages["origin"][message], messages["arrival"][message] = sender["origin"], sender["arrival"]
    messages["timesteps"][message], messages["width"][message] = timesteps, width
    messages["column_at"][message], messages["value_at"][message] = column, value
    messages["arrived_ns"][message], messages["model"][message] = now_ns, sender["model"]
    counts[0] += 1
    counts[1] += width
    counts[2] += x_bytes // 4
    return True


@kernel
def take(packed: Any, routing_id: int, header: int, header_bytes: int, x: int, x_bytes: int, now_ns: int) -> bool:
    """Take a message that is already in memory; see `Inbox.take`."""
    arrays = Arrays(*packed)
    row = _row_of(arrays, routing_id)
    if row < 0:
        return False
    arrays.peers["last_heard_ns"][row] = now_ns
    return _take(arrays, row, header, header_bytes, x, x_bytes, now_ns)


@kernel
def receive(packed: Any, socket: int, parts: U8, now_ns: int) -> int:
    """Take STEPs until there are no more, the arrays are full, or another message comes.

    Args:
        packed: `Inbox.packed`.
        socket: the address of a ROUTER.
        parts: uint8 [3, 64], message parts: routing id, and the first two of the other message.
        now_ns: the time of arrival.

    Returns:
        The number of parts received of the other message, routing id included; 0 if there is none.
    """
    arrays = Arrays(*packed)
    counts, routing_id = arrays.counts, arrays.header
    first, header, x = parts[0].ctypes.data, parts[1].ctypes.data, parts[2].ctypes.data
    while counts[0] < MOST_MESSAGES and counts[1] < _MOST_COLUMNS and counts[2] < _MOST_VALUES:
        if receive_part(first, socket, DONTWAIT) < 0:
            return 0
        receive_part(header, socket, DONTWAIT)
        if not has_more(header):
            return 2
        receive_part(x, socket, DONTWAIT)
        if has_more(x) or message_size(first) != 5:
            return 3
        copy_memory(routing_id.ctypes.data, message_data(first) + 1, 4)
        row = _row_of(arrays, routing_id[0])
        if row < 0:
            return 3
        arrays.peers["last_heard_ns"][row] = now_ns
        if not _take(
            arrays,
            row,
            message_data(header),
            message_size(header),
            message_data(x),
            message_size(x),
            now_ns,
        ):
            return 3
    return 0


class Inbox:
    """The STEPs of one turn."""

    def __init__(self, table: PeerTable) -> None:
        self.messages = np.zeros(MOST_MESSAGES, SENT_MESSAGE)
        """Those taken come first."""
        self._table = table
        self._counts: I64 = np.zeros(3, np.int64)
        self._header: U32 = np.zeros(_HEADER_BYTES // 4, np.uint32)
        self.reserve()

    def reserve(self) -> None:
        """Have memory for one block of any model more than a turn takes at most; untouched pages use none."""
        models = self._table.models
        most_frames = models["max_block_frames"].max(initial=0)
        most_values = (models["max_block_frames"] * models["features"]).max(initial=0)
        self._columns = np.zeros(_MOST_COLUMNS + most_frames, SENT_COLUMN)
        self._x: U32 = np.zeros(_MOST_VALUES + most_values, np.uint32)

    @property
    def packed(self) -> tuple[Any, ...]:
        """`Arrays`, for kernels."""
        arrays, table = (self._counts, self.messages, self._columns, self._x, self._header), self._table
        return (*arrays, table.models, table.peers, table.routing_ids, table.rows_of_ids)

    def __len__(self) -> int:
        """How many messages were taken."""
        return int(self._counts[0])

    @property
    def is_full(self) -> bool:
        """Whether no more may be taken in this turn."""
        return bool((self._counts >= _MOST).any())

    def frames(self, model: int) -> Frames:
        """The messages to a model."""
        messages = self.messages[: len(self)]
        if not (of_model := messages["model"] == model).all():
            messages = messages[of_model]
        return Frames(messages, self._columns, self._x)

    def leave_out(self, place: int) -> None:
        """Ignore a message that was taken: it is refused."""
        self.messages["arrival"][place] = NOBODY

    def clear(self) -> None:
        """Begin a turn."""
        self._counts[:] = 0

    def take(self, routing_id: bytes, parts: list[bytes], now_ns: int) -> bool:
        """Take a message that came another way than through a socket; whether it is a STEP whose sizes are right."""
        if len(parts) != 2:
            return False
        memory = [np.frombuffer(part or b"\0", np.uint8) for part in parts]
        (header, header_bytes), (x, x_bytes) = (
            (array.ctypes.data, len(part)) for array, part in zip(memory, parts, strict=True)
        )
        return take(self.packed, number_of(routing_id), header, header_bytes, x, x_bytes, now_ns)
