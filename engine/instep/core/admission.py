"""Admission decides for each column of a message which of its frames may be applied, before anything is changed.

A column has T frames of one stream, in the order of their seqs. Leading frames that were applied before are answered
again with the same outputs, provided they have the same bytes and are still in the frame buffer. The others are
admitted if they are the next ones, within the window (`window` frames from the first unacknowledged one) and finite.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.compiled import inlined, kernel
from instep.core.scheduler import push_ready
from instep.core.tables import (
    CREDIT,
    CREDIT_STALLS,
    FREE_COLUMN,
    FREE_COLUMNS,
    FREE_MESSAGE,
    FREE_MESSAGES,
    MAX_PENDING,
    NO_OWNER,
    PENDING_FRAMES,
    RECEIVED_FRAMES,
    REPEATED_FRAMES,
    STAMP,
    STRIDE,
    WINDOW,
    Packed,
    Records,
    Tables,
)
from instep.core.typing import I32, I64, U32, U64, Int
from instep_client.protocol.codes import Code

SENT_COLUMN: Final = np.dtype([("handle", "<u8"), ("seq", "<i8"), ("acked", "<i8")])
"""One column as a producer sends it. Seqs are unsigned on the wire; read as signed numbers, seqs from 2^63 on are
negative, and every rule refuses them.
"""
SENT_MESSAGE: Final = np.dtype(
    [
        ("tag", "<i8"),  # the origin's identifier for the message, returned with the reply
        ("origin", "<i8"),  # its number
        ("arrival", "<i8"),  # its rank among all connections, since another one may have its number by now
        ("timesteps", "<i8"),  # T
        ("width", "<i8"),  # N
        ("column_at", "<i8"),  # the place of its SENT_COLUMN [N]
        ("value_at", "<i8"),  # the place of its inputs, float32 [T, N, features]
        ("arrived_ns", "<i8"),  # on the monotonic clock
        ("model", "<i8"),  # the front end's number of the model
    ]
)
"""One message as a front end submits it: T and N are at least 1, and its columns and inputs have matching sizes."""

# Plain numbers, so that kernels hold constants.
_ACK_AHEAD: Final = int(Code.ACK_AHEAD)
_BUSY: Final = int(Code.BUSY)
_CONFLICT: Final = int(Code.CONFLICT)
_FENCED: Final = int(Code.FENCED)
_FOREIGN_STREAM: Final = int(Code.FOREIGN_STREAM)
_NOT_FINITE: Final = int(Code.NOT_FINITE)
_REPEATED_STREAM: Final = int(Code.REPEATED_STREAM)
_SEQ_GAP: Final = int(Code.SEQ_GAP)
_SEQ_REPEATED: Final = int(Code.SEQ_REPEATED)
_UNKNOWN_STREAM: Final = int(Code.UNKNOWN_STREAM)
_WINDOW_FULL: Final = int(Code.WINDOW_FULL)
_SLOT_MASK: Final = np.uint64(0xFFFF_FFFF)
_SLOT_BITS: Final = np.uint64(32)
_GENERATIONS: Final = 2**32 - 1
_EXPONENT: Final = np.uint32(0x7F80_0000)  # all ones in NaN and infinity


@inlined
def resolve_handle(tables: Tables, handle: np.uint64, origin: Int) -> tuple[Int, int]:
    """Return the slot of a handle, and 0 if `origin` may use it or otherwise the code of the refusal."""
    streams = tables.streams
    slot = np.int64(handle & _SLOT_MASK)
    if slot == 0 or slot >= len(streams) or streams["owner"][slot] == NO_OWNER or streams["closing"][slot]:
        return np.int64(0), _UNKNOWN_STREAM
    if streams["handle"][slot] == handle:
        return slot, (0 if streams["owner"][slot] == origin else _FOREIGN_STREAM)
    # An older handle of the stream that is in the slot now? Generations wrap, so ages are compared modulo 2^32.
    first = np.int64(streams["first_generation"][slot])
    age = (np.int64(handle >> _SLOT_BITS) - first) & _GENERATIONS
    age_now = (np.int64(streams["handle"][slot] >> _SLOT_BITS) - first) & _GENERATIONS
    return slot, (_FENCED if age < age_now else _UNKNOWN_STREAM)


@inlined
def _names_a_stream_twice(tables: Tables, sent: Records, first: int, width: int, origin: int) -> bool:
    tables.counts[STAMP] += 1
    stamp = tables.counts[STAMP]
    for column in range(first, first + width):
        slot, code = resolve_handle(tables, sent["handle"][column], origin)
        if code == 0:
            if tables.streams["stamp"][slot] == stamp:
                return True
            tables.streams["stamp"][slot] = stamp
    return False


@inlined
def _is_finite(frame: U32) -> bool:
    largest = np.uint32(0)
    for value in range(len(frame)):
        largest = max(largest, frame[value] & _EXPONENT)
    return bool(largest != _EXPONENT)


@inlined
def _admit_column(
    tables: Tables, sent: Records, at: int, column: Int, message: Int, x: U32, first: int, width: int, timesteps: int
) -> Int:
    """Judge one column, apply its good frames, and return the number of frames to compute.

    Args:
        tables: all tables.
        sent: SENT_COLUMN.
        at: the column's index in `sent`.
        column: its record in `tables.columns`.
        message: the record of its message.
        x: uint32, the bits of float32 inputs.
        first: the position in `x` of the column's first frame.
        width: the number of columns of the message; timesteps are width × features values apart.
        timesteps: T.
    """
    counts, streams, columns = tables.counts, tables.streams, tables.columns
    window, held_bits = counts[WINDOW], tables.x.view(np.uint32)
    features = held_bits.shape[1]
    origin = tables.messages["origin"][message]
    slot, code = resolve_handle(tables, sent["handle"][at], origin)
    seq, acked = sent["seq"][at], sent["acked"][at]
    columns["slot"][column] = slot
    columns["seq"][column] = seq
    columns["skipped"][column] = columns["length"][column] = columns["fresh"][column] = 0
    columns["code"][column], columns["expected_seq"][column] = code, 0
    if code:
        return np.int64(0)
    next_seq = streams["next_seq"][slot]
    columns["expected_seq"][column] = next_seq
    if acked < 0 or acked > streams["step_seq"][slot]:
        columns["code"][column] = _ACK_AHEAD
        return np.int64(0)
    # The rows of older frames hold newer ones by now, or are about to: their outputs cannot be sent again.
    oldest = max(streams["acked"][slot], next_seq - window)
    streams["acked"][slot] = max(streams["acked"][slot], acked)
    if seq < 0 or seq > next_seq:
        columns["code"][column] = _SEQ_GAP
        return np.int64(0)
    repeats = min(next_seq - seq, timesteps)
    # A repeat is answered at once from the frame buffer, whose outputs are complete only when nothing is unanswered.
    if repeats > 0 and (streams["unanswered"][slot] > 0 or seq < oldest):
        columns["code"][column] = _SEQ_REPEATED
        return np.int64(0)
    length = timesteps
    for step in range(timesteps):
        at_value = first + step * width * features
        frame = x[at_value : at_value + features]
        if step < repeats:
            held = held_bits[(seq + step) % window * counts[STRIDE] + slot]
            for value in range(features):
                if held[value] != frame[value]:
                    code = _CONFLICT
        elif not _is_finite(frame):
            code = _NOT_FINITE
        elif seq + step >= acked + window:
            code = _WINDOW_FULL
        if code:
            length = step
            break
    for step in range(repeats, length):
        row = (seq + step) % window * counts[STRIDE] + slot
        at_value = first + step * width * features
        frame, place = x[at_value : at_value + features], held_bits[row]
        for value in range(features):
            place[value] = frame[value]
        tables.frame_message[row] = message
    fresh: Int = max(length - repeats, 0)
    columns["skipped"][column] = min(repeats, length)
    columns["length"][column], columns["fresh"][column], columns["code"][column] = length, fresh, code
    if fresh:
        columns["expected_seq"][column] = streams["next_seq"][slot] = seq + length
        streams["unanswered"][slot] += fresh
        arrived_ns = tables.messages["arrived_ns"][message]
        streams["last_active_ns"][slot] = max(streams["last_active_ns"][slot], arrived_ns)
        push_ready(tables, slot, arrived_ns)
    return fresh


@kernel
def admit(packed: Packed, messages: Records, sent: Records, x: U32) -> tuple[int, int, int, int]:
    """Admit the good frames of messages, one message after another.

    Args:
        packed: all tables; a message that is refused as a whole changes nothing.
        messages: SENT_MESSAGE [M].
        sent: SENT_COLUMN, the columns of the messages.
        x: uint32, the bits of their inputs, because -0.0 == 0.0 as floats.

    Returns:
        complete: the count of messages that are complete already, because none of their frames has to be computed;
            `complete` begins with their numbers.
        partly_repeated: the count of messages that have both frames to compute and frames to answer again; their
            numbers end the first M entries of `complete`.
        refused: the count of messages that are refused as a whole; `outcomes` [M] is BUSY or REPEATED_STREAM for them,
            else 0. A message of an origin that has left is ignored.
        unknown: the count of columns that fail with UNKNOWN_STREAM.
    """
    tables = Tables(*packed)
    outcomes, numbers = tables.outcomes, tables.complete
    counts, features = tables.counts, tables.x.shape[1]
    complete = partly_repeated = refused = unknown = 0
    for place in range(len(messages)):
        origin, timesteps, width = messages["origin"][place], messages["timesteps"][place], messages["width"][place]
        frames, column_at, value_at = timesteps * width, messages["column_at"][place], messages["value_at"][place]
        outcomes[place] = 0
        if messages["arrival"][place] != tables.origins["arrival"][origin]:
            continue
        counts[RECEIVED_FRAMES] += frames
        used = tables.origins["unanswered"][origin] + tables.origins["backlog"][origin] + frames
        if (
            used > counts[CREDIT]
            or counts[PENDING_FRAMES] + frames > counts[MAX_PENDING]
            or counts[FREE_MESSAGES] == 0
            or counts[FREE_COLUMNS] < width
        ):
            outcomes[place] = _BUSY
            counts[CREDIT_STALLS] += used > counts[CREDIT]
            refused += 1
            continue
        if width > 1 and _names_a_stream_twice(tables, sent, column_at, width, origin):
            outcomes[place] = _REPEATED_STREAM
            refused += 1
            continue
        number = counts[FREE_MESSAGE]
        counts[FREE_MESSAGE] = tables.messages["next_free"][number]
        counts[FREE_MESSAGES] -= 1
        tables.messages["tag"][number] = messages["tag"][place]
        tables.messages["arrived_ns"][number] = messages["arrived_ns"][place]
        tables.messages["origin"][number] = origin
        tables.messages["timesteps"][number], tables.messages["width"][number] = timesteps, width
        fresh: Int = 0
        repeats, column = 0, counts[FREE_COLUMN]
        tables.messages["head"][number] = column
        for place_in_message in range(width):
            first = value_at + place_in_message * features
            fresh += _admit_column(
                tables, sent, column_at + place_in_message, column, number, x, first, width, timesteps
            )
            repeats = max(repeats, tables.columns["skipped"][column])
            counts[REPEATED_FRAMES] += tables.columns["skipped"][column]
            unknown += tables.columns["code"][column] == _UNKNOWN_STREAM
            column = tables.columns["next"][column]  # free columns are a list already
        counts[FREE_COLUMN] = column
        counts[FREE_COLUMNS] -= width
        counts[PENDING_FRAMES] += fresh
        tables.messages["remaining"][number] = tables.messages["frames"][number] = fresh
        tables.messages["repeats"][number] = repeats
        tables.origins["unanswered"][origin] += fresh
        counts[CREDIT_STALLS] += used + fresh > counts[CREDIT]
        tables.origins["messages"][origin] += 1
        if fresh == 0:
            numbers[complete] = number
            complete += 1
        elif repeats:
            partly_repeated += 1
            numbers[len(messages) - partly_repeated] = number
    return complete, partly_repeated, refused, unknown


@kernel
def resolve_handles(packed: Packed, handles: U64, origin: int, slots: I64, codes: I32) -> bool:
    """Resolve the handles of an operation: uint64 [N] → slots int64 [N] and codes int32 [N].

    Returns:
        Whether a stream of the origin occurs twice.
    """
    tables = Tables(*packed)
    tables.counts[STAMP] += 1
    stamp = tables.counts[STAMP]
    has_repeated = False
    for place in range(len(handles)):
        slots[place], codes[place] = resolve_handle(tables, handles[place], origin)
        if codes[place] == 0:
            has_repeated |= tables.streams["stamp"][slots[place]] == stamp
            tables.streams["stamp"][slots[place]] = stamp
    return has_repeated
