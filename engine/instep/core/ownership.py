"""Who may resume a stream, and from where: decided by epoch and by what the claimant holds."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.streams import StreamTable
from instep.core.typing import I32, I64, U64
from instep_client.codes import HAVE_ALL, Code


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
) -> Claims:
    """Judge claims to streams; nothing is changed.

    Whoever holds the present epoch is the owner, though the server may still take its former connection for alive. So
    is who gave the former epoch for it, until a frame was sent under the present one: the answer may have been lost on
    its way. An epoch beyond the present one was given by a server that lost what it had not made durable. It may have
    lost more than that: the end of this stream, and another of the same name. So that is data loss.

    Args:
        table: the streams.
        window: frames that the rings hold.
        expired: names of streams that were parked for too long.
        names: which streams, distinct.
        have: uint64 [N], outputs that the claimant holds (seqs below it), `HAVE_ALL` for as many as were computed.
        epochs: uint64 [N], under which the claimant had the streams; 0 for never.
        take_over: whether to take streams from whoever owns them, and to go on from where they are.
    """
    count = len(names)
    slots, codes = np.zeros(count, np.int64), np.zeros(count, np.int32)
    held, expected = np.zeros(count, np.int64), np.zeros(count, np.int64)
    former = np.zeros(count, np.uint64)
    for index, name in enumerate(names):
        slot = table.find(name)
        if slot is None or table.closing[slot]:
            codes[index] = Code.EXPIRED if name in expired else Code.UNKNOWN_STREAM
            continue
        next_seq = int(table.next_seq[slot])
        expected[index] = next_seq
        claimed = next_seq if int(have[index]) == HAVE_ALL else int(have[index])
        unanswered = epochs[index] == table.former_epoch[slot] != 0 and next_seq <= table.granted_seq[slot]
        is_owner = bool(epochs[index] >= table.epoch[slot] or unanswered)
        if not is_owner and not take_over:
            codes[index] = Code.NUMERICS_CHANGED if table.renumbered[slot] else Code.FENCED
        elif (claimed > next_seq or epochs[index] > table.epoch[slot]) and not take_over:
            codes[index] = Code.DATA_LOSS
        elif claimed < max(int(table.acked[slot]), next_seq - window):
            codes[index] = Code.OUTPUTS_GONE
        else:
            slots[index], held[index] = slot, min(claimed, next_seq)
            former[index] = epochs[index] if is_owner else 0
    return Claims(slots, codes, held, former, expected)
