"""The engine's memory: every array that the hot path works on, allocated once.

Kernels take all of it as one argument. Its structured arrays hold one record for each slot, origin, pending message and
pending column, so that everything a kernel needs of one stream is in one or two cache lines.

A kernel also writes its results into arrays of `Tables`, and returns the count of valid elements: making and returning
an array takes longer than the kernel's work on one frame. The results stay valid until the next call of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I32, I64, float32_zeros

Records: TypeAlias = npt.NDArray[Any]

SCRATCH_SLOT: Final = 0
"""The slot that padding rows read and write; no stream has it."""
NO_OWNER: Final = -1
NOTHING: Final = -1
"""The end of a linked list."""
MOST_STEPS: Final = 8
"""The most steps of a run."""

STREAM: Final = np.dtype(
    [
        ("handle", "<u8"),  # generation << 32 | slot; whoever holds it may use the stream
        ("next_seq", "<i8"),  # the seq that the stream expects next, counting admitted frames
        ("step_seq", "<i8"),  # the seq that the stream's next step applies
        ("acked", "<i8"),  # the seq before which the client has every output
        ("last_active_ns", "<i8"),
        ("stamp", "<i8"),  # the newest message that named the stream: finds streams named twice in one message
        ("owner", "<i4"),  # the origin's number, or NO_OWNER
        ("unanswered", "<i4"),  # frames admitted and not yet answered
        ("next_ready", "<i4"),  # the stream behind this one in its origin's ready queue
        ("first_generation", "<u4"),  # the slot's generation at open; handles from then up to now are fenced
        ("holds", "<u2"),  # operations that work on its state; it does not step meanwhile
        ("running", "u1"),  # it is in a run
        ("queued", "u1"),  # it is in a ready queue
        ("closing", "u1"),
        ("lost", "u1"),  # its state can no longer be trusted; it is closing
        ("reserved", "<u2"),
    ]
)

ORIGIN: Final = np.dtype(
    [
        ("streams", "<i8"),  # how many it owns, closing ones included
        ("unanswered", "<i8"),  # frames admitted and not yet delivered
        ("backlog", "<i8"),  # frames whose replies its transport has not taken yet
        ("arrival", "<i8"),  # the rank of the connection that has the number; 0 for none
        ("messages", "<i4"),  # pending messages
        ("ready_head", "<i4"),  # the ready queue of its streams, oldest first
        ("ready_tail", "<i4"),
        ("next_origin", "<i4"),  # the next origin in the round robin
        ("group", "<i4"),  # scratch: its newest group of replies while replies are assembled
        ("reserved", "<i4"),
    ]
)

MESSAGE: Final = np.dtype(
    [
        ("tag", "<i8"),  # the origin's name for the message, returned with its reply
        ("arrived_ns", "<i8"),
        ("origin", "<i4"),
        ("timesteps", "<i4"),
        ("width", "<i4"),
        ("remaining", "<i4"),  # frames not yet computed
        ("head", "<i4"),  # its first column
        ("frames", "<i4"),  # frames admitted to be computed
        ("repeats", "<i4"),  # the most leading timesteps of a column that were applied before
        ("next_free", "<i4"),
    ]
)

COLUMN: Final = np.dtype(
    [
        ("seq", "<i8"),  # the seq of its first timestep
        ("expected_seq", "<i8"),  # what the stream expects after the admitted frames; 0 where it is not the sender's
        ("slot", "<i4"),
        ("next", "<i4"),  # the next column of its message, or the next free column
        ("skipped", "<i4"),  # leading timesteps that were applied before and are only answered again
        ("length", "<i4"),  # leading timesteps that get outputs; fewer when a step fails
        ("fresh", "<i4"),  # timesteps admitted to be computed
        ("code", "<i4"),  # why timestep `length` is refused; 0 where none is
    ]
)

# Places in `Tables.counts`.
PENDING_FRAMES: Final = 0  # admitted and not yet computed
READY: Final = 1  # streams in ready queues
READY_SINCE_NS: Final = 2  # arrival time of the first frame since no stream was ready
ROUND_TAIL: Final = 3  # the origin whose turn is last; the one behind it is next
FREE_MESSAGE: Final = 4
FREE_MESSAGES: Final = 5
FREE_COLUMN: Final = 6
FREE_COLUMNS: Final = 7
STAMP: Final = 8
WINDOW: Final = 9
STRIDE: Final = 10
MAX_PENDING: Final = 11
CREDIT: Final = 12
RECEIVED_FRAMES: Final = 13  # frames in all messages that were judged
REPEATED_FRAMES: Final = 14  # received frames that had been applied before
CREDIT_STALLS: Final = 15  # messages that left their origin no credit for another one of that size
_COUNTS: Final = 16


# Fields of a group of messages that are answered together: columns of `Tables.groups`.
ORIGIN_OF: Final = 0
TIMESTEPS: Final = 1
WIDTH: Final = 2  # columns of all its messages
MESSAGES: Final = 3
FIRST_MESSAGE: Final = 4
FIRST_COLUMN: Final = 5
FIRST_VALUE: Final = 6  # the place of its outputs in `reply_y`
FAILED: Final = 7  # columns with a code
FRAMES: Final = 8  # frames that were to be computed
ARRIVED_NS: Final = 9  # the arrival of its first message
_FIELDS: Final = 10

Packed: TypeAlias = tuple[Any, ...]
"""`tuple(tables)`: numba takes a plain tuple in half the time of a named one. Kernels begin with `Tables(*packed)`."""


class Tables(NamedTuple):
    """All arrays of the hot path; see the dtypes above for the fields of the records."""

    counts: I64
    streams: Records
    """STREAM [max_streams + 1], by slot."""
    origins: Records
    """ORIGIN [max_origins + 1]; the last one owns the streams whose connection is gone."""
    messages: Records
    """MESSAGE [max_pending_frames]."""
    columns: Records
    """COLUMN [max_pending_frames]."""
    frame_message: I32
    """int32 [window × (max_streams + 1)]: for each row of the frame buffer, the pending message of its frame."""
    x: F32
    """float32 [rows, features]: the inputs of the frame buffer."""
    y: F32
    """float32 [rows, outputs]: the outputs of the frame buffer."""
    outcomes: I32
    """int32, set by `admit`: 0 for an accepted message, otherwise the code of its refusal."""
    complete: I32
    """int32, set by `admit`, `finish_run` and `fail_run`: numbers of messages that are complete now."""
    run_slots: I64
    """int64 [batch], set by `begin_run`: the streams that step."""
    run_rows: I64
    """int64 [steps × batch], set by `begin_run`: the rows of their frames, step by step."""
    groups: I64
    """int64 [groups, fields], set by `assemble`: messages that are answered together."""
    reply_messages: I64
    """int64 [3, messages], set by `assemble`: tags, widths and former numbers of messages, by group."""
    reply_columns: I64
    """int64 [3, columns], set by `assemble`: codes, lengths and expected seqs, by group."""
    reply_y: F32
    """float32 [values], set by `assemble`: [T, N, outputs] of each group, with NaN for frames that were not applied."""


def make_tables(
    max_streams: int,
    max_origins: int,
    window: int,
    features: int,
    outputs: int,
    max_pending_frames: int,
    max_block_frames: int,
    credit_frames: int,
    zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
) -> Tables:
    """Allocate all tables; untouched pages use no memory.

    Args:
        max_streams: slots run from 1 to this.
        max_origins: origins are numbered from 0 to this, exclusive; this number itself owns parked streams.
        window: the frames of one stream in the frame buffer.
        features: width of an input.
        outputs: width of an output.
        max_pending_frames: the most frames admitted and not yet computed, over all streams; also the most pending
            messages and pending columns.
        max_block_frames: the most frames of one message.
        credit_frames: the most unanswered frames of one origin.
        zeros: allocates the arrays of streams, inputs and outputs, like numpy's `zeros` or in memory shared between
            processes.
    """
    rows = window * (max_streams + 1)
    # At least one message fits, as none that is admitted has more frames; what does not fit is answered next.
    reply_frames = max(max_block_frames, min(credit_frames, max_pending_frames))
    counts = np.zeros(_COUNTS, np.int64)
    counts[ROUND_TAIL] = NOTHING
    counts[WINDOW], counts[STRIDE] = window, max_streams + 1
    counts[MAX_PENDING], counts[CREDIT] = max_pending_frames, credit_frames
    counts[FREE_MESSAGES] = counts[FREE_COLUMNS] = max_pending_frames
    streams = zeros(((max_streams + 1) * STREAM.itemsize // 4,)).view(STREAM)
    streams["owner"] = NO_OWNER
    origins = np.zeros(max_origins + 1, ORIGIN)
    origins["ready_head"] = NOTHING
    messages = np.zeros(max_pending_frames, MESSAGE)
    messages["next_free"] = _free_list(max_pending_frames)
    columns = np.zeros(max_pending_frames, COLUMN)
    columns["next"] = _free_list(max_pending_frames)
    return Tables(
        counts,
        streams,
        origins,
        messages,
        columns,
        np.zeros(rows, np.int32),
        zeros((rows, features)),
        zeros((rows, outputs)),
        np.zeros(max_pending_frames, np.int32),
        np.zeros(max_pending_frames, np.int32),
        np.zeros(max_streams, np.int64),
        np.zeros(MOST_STEPS * max_streams, np.int64),
        np.zeros((max_pending_frames, _FIELDS), np.int64),
        np.zeros((3, max_pending_frames), np.int64),
        np.zeros((3, max_pending_frames), np.int64),
        np.zeros(reply_frames * outputs, np.float32),
    )


def _free_list(count: int) -> I32:
    entries = np.arange(1, count + 1, dtype=np.int32)
    entries[-1] = NOTHING
    return entries


def rows_of(tables: Tables, slots: I64, seqs: I64) -> I64:
    """Rows of the frame buffer, int64, for slots and seqs of any shapes that broadcast.

    Rows of equal seqs are adjacent, so streams that advance together are copied as one block.
    """
    rows: I64 = seqs % tables.counts[WINDOW] * tables.counts[STRIDE] + slots
    return rows
