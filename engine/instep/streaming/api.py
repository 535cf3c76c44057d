"""The engine's interface to front ends: arrays and plain values, independent of sockets and wire formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np

from instep.core.admission import SENT_COLUMN, SENT_MESSAGE
from instep.core.streams import StreamTable
from instep.core.tables import Records
from instep.core.typing import F32, I32, I64, U8, U32, U64
from instep_client.protocol.codes import Code

Buffer: TypeAlias = bytes | memoryview
"""Contiguous memory; for an array, `array.data.cast("B")`."""

MAX_REPLY_MESSAGES: Final = 128
"""The most messages that one `Reply` answers."""


@dataclass(slots=True)
class Frames:
    """Well-formed messages of frames, each of T timesteps of N streams; admission judges their contents.

    The arrays are valid until the turn ends, because a front end reuses their memory.
    """

    messages: Records
    """`core.admission.SENT_MESSAGE` [M]."""
    columns: Records
    """`core.admission.SENT_COLUMN`: handle, seq of the first timestep, and the seq below which the client has every
    output.
    """
    x: U32
    """The bits of float32 inputs."""

    @classmethod
    def of(
        cls, origin: Origin, tag: int, timesteps: int, width: int, columns: Buffer, x: Buffer, arrived_ns: int
    ) -> Frames:
        """One message of an origin: its columns, SENT_COLUMN [N], and x, float32 [T, N, features]."""
        message = tag, origin.number, origin.arrival, timesteps, width, 0, 0, arrived_ns, 0
        return cls(
            np.array([message], SENT_MESSAGE),
            np.frombuffer(bytearray(columns), SENT_COLUMN),
            np.frombuffer(bytearray(x), np.uint32),
        )


@dataclass(slots=True)
class Reply:
    """The outputs of one or more messages of one origin with equal T, with their columns side by side.

    The arrays are valid until `Origin.deliver` returns, because the engine reuses their memory.
    """

    messages: I64
    """int64 [2, M]: tag and number of columns of each message."""
    y: F32
    """float32 [T, N, outputs], with NaN for frames that were not applied."""
    failures: I64 | None
    """int64 [3, N], or None if everything was applied. Per column: the code of its refusal or 0, the number of leading
    timesteps that were applied, and the seq that its stream expects (0 if the stream is not the origin's).
    """
    frames: int
    """The number of frames that were computed for it."""
    queue_ns: int
    """The time from the arrival of the first message to the step of its last frames."""
    compute_ns: int
    send_ns: int
    """The time from the end of that step to this reply."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A change of an origin's streams: they were evicted, fenced or lost, or they hibernate.

    After HIBERNATED the server wakes them. Another event follows: with `renewed` once they are in memory, or with the
    reason that they cannot be woken now.
    """

    code: Code
    handles: U64
    renewed: U64 | None = None
    """The new handles of streams that hibernated and are in memory again."""


class Origin(Protocol):
    """A source of frames that takes their replies: a ZeroMQ peer, or an object in this process."""

    number: int
    """The number that `Origins.connect` gave it, under which it owns streams."""
    arrival: int
    """Its rank in the order of all connections, from 1."""

    def deliver(self, reply: Reply) -> None:
        """Accept a reply. Never blocks, and never raises because a peer is slow or gone."""

    def refuse(self, tag: int, refusal: Refusal) -> None:
        """Report that a message of frames was refused as a whole and nothing of it was applied."""

    def notify(self, event: StreamEvent) -> None:
        """Report a change of streams of this origin."""

    def check_quota(self, streams: int) -> None:
        """Raise a Refusal if it may not open this number of streams more."""


class Refusal(Exception):
    """A request was refused as a whole, and nothing of it was applied.

    Args:
        code: the reason.
        detail: appended to the code's sentence.
        retry_after_us: the time to wait before trying again; 0 if that does not help.
        sentence: replaces the code's own.
    """

    def __init__(self, code: Code, detail: str = "", retry_after_us: int = 0, *, sentence: str = "") -> None:
        super().__init__((sentence or code.sentence) + (f": {detail}" if detail else ""))
        self.code = code
        self.detail = detail
        self.retry_after_us = retry_after_us


@dataclass(frozen=True, slots=True)
class Grants:
    """The result of opening or resuming N streams."""

    handles: U64
    """Handles; 0 if refused."""
    epochs: U64
    next_seqs: I64
    codes: I32
    expected_seqs: I64
    """For a refused stream that exists, the seq that it expects next."""

    @classmethod
    def none(cls, codes: I32) -> Grants:
        """Grants in which every stream is refused."""
        count = len(codes)
        zeros = np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.int64)
        return cls(*zeros, codes, np.zeros(count, np.int64))

    @classmethod
    def of(cls, table: StreamTable, slots: I64, codes: I32) -> Grants:
        """Make grants for slots, int64 [N]; those with a code (int32 [N]) other than 0 are refused."""
        granted = codes == 0
        return cls(
            np.where(granted, table.slots.handles(slots), 0).astype(np.uint64),
            np.where(granted, table.epoch[slots], 0).astype(np.uint64),
            np.where(granted, table.next_seq[slots], 0),
            codes,
            np.zeros(len(slots), np.int64),
        )

    def spread(self, codes: I32) -> Grants:
        """Insert these grants, in order, where int32 `codes` are 0; the other streams were refused before."""
        grants = Grants.none(codes)
        places = np.flatnonzero(codes == 0)
        for name in ("handles", "epochs", "next_seqs", "codes", "expected_seqs"):
            getattr(grants, name)[places] = getattr(self, name)
        return grants


@dataclass(frozen=True, slots=True)
class StatesRead:
    """The states of N streams, each before the frame `next_seqs[n]`."""

    next_seqs: I64
    states: U8
    """Rows of bytes [N, row_bytes]; undefined where `codes` is not 0."""
    codes: I32


Names: TypeAlias = Sequence[str]
