"""The contents of a recording, as values."""

from __future__ import annotations

from dataclasses import dataclass

from instep.core.typing import F32, U8, U32, U64
from instep.recording.schema import RecordingHeader


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One opening of a stream, from its opening to its close."""

    stream: int
    name: str
    epoch: int
    """Of its first ownership."""
    first_seq: int
    """Of its first frame."""
    opened_ns: int
    opened_position: int
    initial_state: U8 | None
    """Before its first frame, uint8 [row_bytes]; None for the model's initial state."""
    closed_ns: int | None
    """None where it was still open at the last commit; so are all the fields below."""
    closed_position: int | None
    reason: str | None
    frames: int | None
    """The seq that its next frame would have had, as counted at the close."""
    final_state: U8 | None
    """uint8 [row_bytes]; None also where it was not known."""


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """One step, as read-only columns."""

    position: int
    time_ns: int
    bucket: int
    streams: U32
    """uint32 [B]."""
    seqs: U64
    """uint64 [B]."""
    x: F32
    """float32 [B, features]."""
    y: F32 | None
    """float32 [B, outputs]; None where the engine was killed, or is just now, between its inputs and its outputs."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """Anything else the engine wrote down."""

    position: int
    time_ns: int
    stream: int | None
    seq: int | None
    kind: str
    detail: str
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state, and where the kind has none."""


@dataclass(frozen=True, slots=True)
class StateReset:
    """A stream's state was replaced before its frame `seq`."""

    position: int
    stream: int
    seq: int
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state."""


@dataclass(frozen=True, slots=True)
class RecordedEngine:
    """One engine that wrote the recording: what followed it up to the next one."""

    position: int
    """Where it began; 0 for the first."""
    header: RecordingHeader


@dataclass(frozen=True, slots=True)
class StreamState:
    """The state of a stream at a checkpoint."""

    stream: int
    position: int
    """Of the checkpoint that wrote it."""
    seq: int
    """The state is that before this frame."""
    state: U8
    """uint8 [row_bytes]."""
    tail_seq: int
    """The client may not have the outputs of the frames from here to `seq`."""
    tail_x: F32
    """float32 [seq - tail_seq, features]: those frames."""
    tail_y: F32
    """float32 [seq - tail_seq, outputs]: their outputs."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """States of all streams at some position; the fields are the columns of the table, see `schema`."""

    position: int = 0
    completed: int = 0
    """Position of the event that completed it; states may contain frames of batches up to here."""
    time_ns: int = 0
    bytes: int = 0
    """Written to the history up to `position`, since the recording began."""
    openings: int = 0
    closings: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Where the history was trimmed; the fields are the columns of the table."""

    position: int = 0
    """Of the checkpoint that the recording begins with."""
    events: int = 0
    """How many events up to there still count."""
    last_stream: int = 0
    last_epoch: int = 0
