"""Which frames of a block may be applied: decided for all columns at once, before anything is changed.

A column of a block holds T frames of one stream, seq by seq. Leading ones that were applied before are answered again
with the same outputs, provided they hold the same inputs and the ring still has them. The rest is applied as far as it
follows on, is finite, and lies within the window: at most `window` frames from the first unacknowledged one on.
"""

from __future__ import annotations

import numpy as np

from instep.core.rings import Rings
from instep.core.streams import StreamTable
from instep.core.typing import F32, I32, I64, U64, Bool
from instep.core.verdict import Admission
from instep_client.protocol.codes import Code


class RepeatedStream(Exception):
    """A stream stands more than once among handles that must name different ones."""


def resolve_distinct(table: StreamTable, owner: int | I32, handles: U64) -> tuple[I64, I32]:
    """As `StreamTable.resolve`, for handles that must name different streams.

    Raises:
        RepeatedStream: when two of them name one stream of its owner.
    """
    slots, codes = table.resolve(handles, owner)
    if len(slots) == 1:
        return slots, codes
    own = slots if not np.count_nonzero(codes) else slots[codes == 0]
    order = np.arange(len(own), dtype=np.int32)
    table.marks[own] = order
    if np.count_nonzero(table.marks[own] != order):
        raise RepeatedStream
    return slots, codes


def finite_lengths(finite_values: Bool) -> I64:
    """How many leading timesteps of each column hold finite values only: bool [T, N, F] → int64 [N]."""
    finite = np.asarray(finite_values.all(axis=2))
    lengths: I64 = np.where(finite.all(axis=0), len(finite), finite.argmin(axis=0))
    return lengths


def admit(table: StreamTable, rings: Rings, owner: int | I32, handles: U64, seqs: U64, acked: U64, x: F32) -> Admission:
    """Judge a block, or several beside each other; admit what may be applied and move the streams' expected seq on.

    Args:
        table: the streams; `next_seq` is moved on for admitted frames, and `acked`, nothing else.
        rings: what the streams were sent before; not changed.
        owner: who sent the block, or int32 [N], who sent each column.
        handles: uint64 [N].
        seqs: uint64 [N], seq of each column's first timestep.
        acked: uint64 [N], the seq before which the client has every output of the stream.
        x: float32 [T, N, features].

    Raises:
        RepeatedStream: when a stream stands in it more than once; nothing has changed.
    """
    timesteps, columns = x.shape[:2]
    slots, codes = resolve_distinct(table, owner, handles)
    expected = table.next_seq[slots]
    finite_values = np.isfinite(x)
    due = expected.view(np.uint64)  # a seq of 2^63 or more is a gap, not a negative number
    computed = table.step_seq[slots].view(np.uint64)
    good = (seqs == due) & (acked <= computed) & (seqs - acked <= max(0, rings.window - timesteps))
    is_whole = (
        timesteps <= rings.window
        and np.count_nonzero(good) == columns
        and np.count_nonzero(finite_values) == x.size  # found several times faster than frame by frame
        and not np.count_nonzero(codes)
    )
    if is_whole:  # nearly always: nothing to refuse
        rows = rings.rows_of(slots, expected, timesteps)
        following = expected + timesteps
        table.next_seq[slots] = following
        table.acked[slots] = np.maximum(table.acked[slots], acked.view(np.int64))
        lengths: I64 = np.empty(columns, np.int64)
        lengths.fill(timesteps)  # `np.full` takes several times as long
        return Admission(
            slots, rows, np.zeros(columns, np.int64), lengths, codes, following, lengths.copy(), is_whole=True
        )

    ahead = acked > computed
    own = codes == 0
    codes[own & ahead] = Code.ACK_AHEAD
    codes[(codes == 0) & (seqs > due)] = Code.SEQ_GAP
    first = np.where(codes == 0, seqs, 0).astype(np.int64)
    repeats = np.where(codes == 0, np.minimum(expected - first, timesteps), 0)
    too_late = (repeats > 0) & ((table.pending[slots] > 0) | (first < _oldest(table, rings, slots)))
    codes[too_late] = Code.SEQ_REPEATED
    repeats[too_late] = 0
    same = rings.holds_same(slots, first, repeats, x)
    within = np.maximum(acked.astype(np.int64) + rings.window - first, 0)
    lengths = np.minimum(finite_lengths(finite_values), within)
    why = np.where(lengths < within, Code.NOT_FINITE, Code.WINDOW_FULL)
    conflict = same < repeats
    lengths[conflict] = np.minimum(lengths, same)[conflict]
    why[conflict & (lengths == same)] = Code.CONFLICT
    lengths[codes != 0] = 0
    short = (codes == 0) & (lengths < timesteps)
    codes[short] = why[short]

    moved = lengths > repeats
    table.next_seq[slots[moved]] = (first + lengths)[moved]
    known = own & ~ahead
    table.acked[slots[known]] = np.maximum(table.acked[slots[known]], acked[known].astype(np.int64))
    expected[moved] = (first + lengths)[moved]
    expected[~own] = 0
    skipped = np.minimum(repeats, lengths)
    rows = rings.rows_of(slots, first, timesteps)
    return Admission(slots, rows, skipped, lengths, codes, expected, lengths - skipped, is_whole=False)


def _oldest(table: StreamTable, rings: Rings, slots: I64) -> I64:
    """The first seq of each stream whose frame the ring still holds."""
    oldest: I64 = np.maximum(table.acked[slots], table.next_seq[slots] - rings.window)
    return np.maximum(oldest, table.first_seq[slots])
