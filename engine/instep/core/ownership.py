"""Decides by epochs and by the claimant's outputs whether, and from which seq, a stream may be resumed."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.streams import StreamTable
from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import I32, I64, U64
from instep_client.protocol.codes import HAVE_ALL, Code


@dataclass(frozen=True, slots=True)
class ResumeDecision:
    """The decision on a request to resume streams, one entry for each name."""

    slots: I64
    """The streams' slots; the scratch slot if refused."""
    codes: I32
    have: I64
    """The claimant has the outputs of all seqs below this one."""
    former_epochs: U64
    """The epoch under which the claimant had the stream; 0 where it takes a stream over."""
    expected_seq: I64
    """The seq that the stream expects next; 0 if there is no stream."""


def check_resume(
    table: StreamTable,
    window: int,
    expired: Container[str],
    names: Sequence[str],
    have: U64,
    epochs: U64,
    take_over: bool,
    arrival: int,
) -> ResumeDecision:
    """Decide on a request to resume streams; nothing is changed.

    The holder of the present epoch is the owner, even if the server still considers its former connection alive. The
    previous epoch is also accepted until a frame has been sent under the current one, because the RESUMED reply may
    have been lost. It must come on a connection at least as new as the current owner's; otherwise it is a delayed
    duplicate. An epoch above the present one was granted by a server that then lost records which were not durable. It
    may also have lost the end of this stream and another one of the same name, so the answer is DATA_LOSS.

    Args:
        table: the streams.
        window: frames of one stream in the frame buffer.
        expired: names of streams that were parked for too long.
        names: the streams, distinct.
        have: uint64 [N], the seqs below which the claimant has all outputs; `HAVE_ALL` for everything computed.
        epochs: uint64 [N], under which the claimant had the streams; 0 for never.
        take_over: whether to take streams from whichever client owns them, and to continue from where they are.
        arrival: the arrival number of the claimant's connection, see `StreamTable.hand_over`.
    """
    slots = table.find(names)
    is_there = (slots != SCRATCH_SLOT) & ~table.closing[slots]
    next_seq = table.next_seq[slots]
    due = next_seq.astype(np.uint64)
    claimed = np.where(have == np.uint64(HAVE_ALL), due, have)
    former = table.former_epoch[slots]
    unanswered = (epochs == former) & (former != 0) & (next_seq <= table.granted_seq[slots])
    unanswered &= table.granted_to[slots] <= arrival
    is_owner = (epochs >= table.epoch[slots]) | unanswered
    holds_more = (claimed > due) | (epochs > table.epoch[slots])
    oldest = np.maximum(table.acked[slots], next_seq - window).astype(np.uint64)
    codes = np.zeros(len(slots), np.int32)
    codes[claimed < oldest] = Code.OUTPUTS_GONE
    if not take_over:
        codes[holds_more] = Code.DATA_LOSS
        codes[~is_owner] = Code.FENCED
    for index in np.flatnonzero(~is_there).tolist():
        codes[index] = Code.EXPIRED if names[index] in expired else Code.UNKNOWN_STREAM
    good = codes == 0
    return ResumeDecision(
        np.where(good, slots, SCRATCH_SLOT),
        codes,
        np.where(good, np.minimum(claimed, due), 0).astype(np.int64),
        np.where(good & is_owner, epochs, 0).astype(np.uint64),
        np.where(is_there, next_seq, 0),
    )
