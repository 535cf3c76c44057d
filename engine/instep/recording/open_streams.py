"""Streams that are open in a recording: everything that an engine needs to continue each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instep.core.typing import F32, U8
from instep.recording.reader import RecordingReader
from instep.recording.schema import OWNER_EVENT, read_owner_detail


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream in its newest state that the recording holds."""

    stream: int
    name: str
    epoch: int
    """The last one it was given."""
    former_epoch: int
    """The one its owner held before, 0 for none or somebody else's."""
    granted_seq: int
    """The frame that was due next when it was given."""
    first_seq: int
    """The one it opened with."""
    seq: int
    """The state is that before this frame."""
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state."""
    tail_seq: int
    """The client may not have the outputs of the frames from here to `seq`."""
    tail_x: F32
    """float32 [seq - tail_seq, features]: those frames."""
    tail_y: F32
    """float32 [seq - tail_seq, outputs]: their outputs."""


def load_open_streams(path: Path, streams: Iterable[int]) -> list[OpenStream]:
    """Open streams by their numbers, as of the last commit.

    Raises:
        RecordingError: when the file cannot be read.
        DamagedRecording: when a row of one of them is damaged or missing.
    """
    with RecordingReader(path) as reader, reader.at_once():
        return [read_open_stream(reader, stream) for stream in streams]


def read_open_stream(reader: RecordingReader, stream: int) -> OpenStream:
    """As `load_open_streams`, one of a recording that is open."""
    opening = reader.newest_row("openings", "stream = ?", stream)
    if opening is None:
        raise reader.damaged(f"the table openings has no row of stream {stream}")
    position, _, _, name, epoch, first_seq, initial = opening
    owner = (int(epoch), 0, int(first_seq))
    taken = reader.newest_row("events", f"kind = '{OWNER_EVENT}' AND stream = ?", stream)
    if taken is not None:
        at, _, _, seq, _, detail, _ = taken
        try:
            owner = (int(seq), *read_owner_detail(detail))
        except (TypeError, ValueError):
            raise reader.damaged(f"the event at position {at} names no owner") from None
    row = reader.newest_row("states", "stream = ?", stream)
    if row is not None:
        state = reader.stream_state(row)
        tail = (state.tail_seq, state.tail_x, state.tail_y)
        return OpenStream(stream, name, *owner, first_seq, state.seq, state.state, *tail)
    x, y = (np.zeros((0, width), np.float32) for width in (reader.header.features, reader.header.outputs))
    found = reader.state(initial, position)
    return OpenStream(stream, name, *owner, first_seq, first_seq, found, first_seq, x, y)
