"""Who may resume a stream, and from where: decided by epoch and by what the claimant holds."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.slots import SCRATCH_SLOT
from instep.core.streams import StreamTable
from instep.core.typing import I32, I64, U64
from instep_client.protocol.codes import HAVE_ALL, Code


@dataclass(frozen=True, slots=True)
class Claims:
    """The verdict on streams that somebody wants to resume, one entry a name."""

    slots: I64
    """The scratch slot where refused."""
    codes: I32
    have: I64
    """Outputs that the claimant holds: those of seqs below it."""
    former_epochs: U64
    """The epoch that the claimant holds; 0 where it takes a stream from somebody."""
    expected_seq: I64
    """What the stream expects next; 0 where there is none."""


def judge_claims(
    table: StreamTable,
    window: int,
    expired: Container[str],
    names: Sequence[str],
    have: U64,
    epochs: U64,
    take_over: bool,
    arrival: int,
) -> Claims:
    """Judge claims to streams; nothing is changed.

    Whoever holds the present epoch is the owner, though the server may still take its former connection for alive.
    So is who gave the former epoch for it, until a frame was sent under the present one: the answer may have been
    lost on its way. But who lost it asks on a connection that is no older: what an older one says was late. An
    epoch beyond the present one was given by a server that lost what it had not made durable. It may have lost more
    than that: the end of this stream, and another of the same name. So that is data loss.

    Args:
        table: the streams.
        window: frames that the rings hold.
        expired: names of streams that were parked for too long.
        names: which streams, distinct.
        have: uint64 [N], outputs that the claimant holds (seqs below it), `HAVE_ALL` for as many as were computed.
        epochs: uint64 [N], under which the claimant had the streams; 0 for never.
        take_over: whether to take streams from whoever owns them, and to go on from where they are.
        arrival: of the claimant's connection, see `StreamTable.hand_over`.
    """
    slots = table.find_all(names)
    is_there = (slots != SCRATCH_SLOT) & ~table.closing[slots]
    next_seq = table.next_seq[slots]
    due = next_seq.view(np.uint64)
    claimed = np.where(have == np.uint64(HAVE_ALL), due, have)
    former = table.former_epoch[slots]
    unanswered = (epochs == former) & (former != 0) & (next_seq <= table.granted_seq[slots])
    unanswered &= table.granted_to[slots] <= arrival
    is_owner = (epochs >= table.epoch[slots]) | unanswered
    holds_more = (claimed > due) | (epochs > table.epoch[slots])
    oldest = np.maximum(table.acked[slots], next_seq - window).view(np.uint64)
    codes = np.zeros(len(slots), np.int32)
    codes[claimed < oldest] = Code.OUTPUTS_GONE
    if not take_over:
        codes[holds_more] = Code.DATA_LOSS
        codes[~is_owner] = np.where(table.renumbered[slots], Code.NUMERICS_CHANGED, Code.FENCED)[~is_owner]
    for index in np.flatnonzero(~is_there).tolist():
        codes[index] = Code.EXPIRED if names[index] in expired else Code.UNKNOWN_STREAM
    good = codes == 0
    return Claims(
        np.where(good, slots, SCRATCH_SLOT),
        codes,
        np.where(good, np.minimum(claimed, due), 0).astype(np.int64),
        np.where(good & is_owner, epochs, 0).astype(np.uint64),
        np.where(is_there, next_seq, 0),
    )
