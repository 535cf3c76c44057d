"""Which frames of a block may be applied: decided for all columns at once, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instep.core.streams import StreamTable
from instep.core.typing import F32, I32, I64, U64
from instep_client.codes import Code


@dataclass(frozen=True, slots=True)
class Admission:
    """The verdict on a block of T × N frames, one entry a column."""

    slots: I64
    lengths: I64
    """How many leading timesteps of the column are admitted: 0 … T."""
    codes: I32
    """Why timestep `lengths[n]` of the column is refused; 0 where all T are admitted."""
    expected_seq: I64
    """What the column's stream expects after the admitted frames; 0 where the stream is not the sender's."""


class RepeatedStream(Exception):
    """A stream stands more than once among the handles of one message."""


def resolve_distinct(table: StreamTable, owner: int, handles: U64) -> tuple[I64, I32]:
    """As `StreamTable.resolve`, for handles that must name different streams.

    Raises:
        RepeatedStream: when two of them name one stream of `owner`.
    """
    slots, codes = table.resolve(handles, owner)
    own = slots if not codes.any() else slots[codes == 0]
    order = np.arange(len(own))
    table.marks[own] = order
    if (table.marks[own] != order).any():
        raise RepeatedStream
    return slots, codes


def finite_lengths(x: F32) -> I64:
    """How many leading timesteps of each column hold finite values only: float32 [T, N, F] → int64 [N]."""
    timesteps, columns = x.shape[:2]
    finite_values = np.isfinite(x)
    if finite_values.all():  # several times faster than looking at each frame, and nearly always so
        return np.full(columns, timesteps, np.int64)
    finite = np.asarray(finite_values.all(axis=2))
    lengths: I64 = np.where(finite.all(axis=0), timesteps, finite.argmin(axis=0))
    return lengths


def admit(table: StreamTable, owner: int, handles: U64, seqs: U64, x: F32) -> Admission:
    """Judge a block; admit what may be applied and move the streams' expected seq past it.

    Args:
        table: the streams; `next_seq` is moved on for admitted frames, nothing else.
        owner: who sent the block.
        handles: uint64 [N].
        seqs: uint64 [N], seq of each column's first timestep.
        x: float32 [T, N, features].

    Raises:
        RepeatedStream: when a stream stands in it more than once; nothing has changed.
    """
    timesteps = x.shape[0]
    slots, codes = resolve_distinct(table, owner, handles)
    expected = table.next_seq[slots]
    lengths = finite_lengths(x)
    due = expected.view(np.uint64)  # a seq of 2^63 or more is a gap, not a negative number
    if not codes.any() and (seqs == due).all() and lengths.min() == timesteps:  # nearly always: nothing to refuse
        expected += lengths
        table.next_seq[slots] = expected
        return Admission(slots, lengths, codes, expected)
    own = codes == 0
    codes[own & (seqs > due)] = Code.SEQ_GAP
    codes[own & (seqs < due)] = Code.SEQ_REPEATED
    lengths[codes != 0] = 0
    codes[(codes == 0) & (lengths < timesteps)] = Code.NOT_FINITE
    expected += lengths
    expected[~own] = 0
    table.next_seq[slots[own]] = expected[own]
    return Admission(slots, lengths, codes, expected)
