"""Values that represent the contents of a recording."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.errors import NoSuchStream, RecordingError
from instep.recording.schema import Column, RecordingHeader


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One opening of a stream, up to its close."""

    stream: int
    name: str
    epoch: int
    first_seq: int
    opened_ns: int
    opened_position: int
    initial_state: U8 | None
    """The state before its first frame, uint8 [row_bytes]; None for the model's initial state."""
    closed_ns: int | None = None
    """The time of its close. This and the fields below are None if it was still open at the last commit."""
    closed_position: int | None = None
    reason: str | None = None
    frames: int | None = None
    """The seq that its next frame would have had, as counted at the close; also None if that was unknown."""
    final_state: U8 | None = None
    """The state at its close, uint8 [row_bytes]; also None if that was unknown."""


@dataclass(frozen=True, slots=True)
class RecordedFrames:
    """Frames in the order in which they were stepped, as read-only columns; frames of one batch share a position."""

    positions: I64
    times_ns: I64
    streams: I64
    """Their streams' numbers."""
    seqs: I64
    x: F32
    """float32 [N, features]."""
    y: F32
    """float32 [N, outputs]; zeros if no outputs were recorded."""
    answered: Bool
    """bool [N]: False if the outputs were not recorded, because the engine was killed or is still computing."""

    def __len__(self) -> int:
        return len(self.seqs)

    def only(self, wanted: Bool | slice) -> RecordedFrames:
        """Select some of the frames."""
        return RecordedFrames(*(getattr(self, each.name)[wanted] for each in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[RecordedFrames]) -> RecordedFrames:
        """Concatenate frames."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """Any other row that the engine recorded."""

    position: int
    time_ns: int
    stream: int | None
    seq: int | None
    kind: str
    detail: str
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state, and for kinds without a state."""


@dataclass(frozen=True, slots=True)
class RecordedEngine:
    """One engine that wrote part of the recording; its rows end where the next engine begins."""

    position: int
    """The position at which it began; 0 for the first engine."""
    header: RecordingHeader


@dataclass(frozen=True, slots=True)
class StreamState:
    """The state of a stream at a checkpoint."""

    stream: int
    position: int
    """The position of the checkpoint that wrote it."""
    seq: int
    """The seq of the frame that follows the state."""
    state: U8
    """uint8 [row_bytes]."""
    tail_seq: int
    """The client may still lack the outputs of the frames from this seq to `seq`."""
    tail_x: F32
    """Those frames, float32 [seq - tail_seq, features]."""
    tail_y: F32
    """Their outputs, float32 [seq - tail_seq, outputs]."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The states of all streams at some position; the fields are the table's columns, see `schema`."""

    position: int = 0
    completed: int = 0
    """The position of the event that completed it; states may include frames of batches up to here."""
    time_ns: int = 0
    bytes: int = 0
    """The bytes written to the history up to `position`, since the recording began."""
    openings: int = 0
    closings: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Trimmed:
    """The beginning of a trimmed history; the fields are the table's columns."""

    position: int = 0
    """The position of the checkpoint with which the recording begins."""
    events: int = 0
    """The number of events up to there that still count."""
    last_stream: int = 0
    last_epoch: int = 0


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream in the newest state that the recording has."""

    stream: int
    name: str
    epoch: int
    """Its current epoch."""
    former_epoch: int
    """The epoch that the owner held before; 0 if none."""
    granted_seq: int
    """The seq of the frame that was next when the epoch was granted."""
    first_seq: int
    """The seq with which it was opened."""
    seq: int
    """The seq of the frame that follows the state."""
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state."""
    tail_seq: int
    """The client may still lack the outputs of the frames from this seq to `seq`."""
    tail_x: F32
    """Those frames, float32 [seq - tail_seq, features]."""
    tail_y: F32
    """Their outputs, float32 [seq - tail_seq, outputs]."""


def find_sorted(values: I64, wanted: I64) -> tuple[I64, Bool]:
    """Find values in ascending ones. Returns indices, int64 [N], and whether each was found, bool [N]."""
    if not len(values):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    places: I64 = np.minimum(np.searchsorted(values, wanted), len(values) - 1).astype(np.int64)
    return places, values[places] == wanted


_MAY_DIFFER: Final = ("instep_version", "arithmetic", "durability", "output_names")


def refuse_other_model(path: Path, last: RecordingHeader, now: RecordingHeader) -> None:
    """Raise RecordingError if an engine would continue the recording of another model."""
    if now.model_fingerprint != last.model_fingerprint:
        raise RecordingError(
            f"{path} is a recording of the model {last.model_name!r} (fingerprint {last.model_fingerprint[:12]}…), and "
            f"this engine serves {now.model_name!r} ({now.model_fingerprint[:12]}…); move the file to another folder, "
            "which begins a new recording, or choose another file"
        )


def changed_values(last: RecordingHeader, now: RecordingHeader) -> dict[str, Any]:
    """The header values that differ for the engine that continues."""
    return {key: value for key in _MAY_DIFFER if (value := getattr(now, key)) != getattr(last, key)}


def select_streams(streams: Sequence[StreamInfo], wanted: Sequence[str]) -> list[int]:
    """Indices of the wanted streams in order; all if `wanted` is empty.

    A name selects all its openings, a number one, and any other word is a pattern of names, as `fnmatch` reads them.

    Raises:
        NoSuchStream: when there is none; the message suggests similar names.
    """
    if not wanted:
        return list(range(len(streams)))
    return sorted({at for word in wanted for at in _openings(streams, word, is_pattern=True)})


def openings_of(streams: Sequence[StreamInfo], word: str) -> list[StreamInfo]:
    """The openings of one stream by its name, or the one of this number.

    Raises:
        NoSuchStream: when there is none; the message suggests similar names.
    """
    return [streams[at] for at in _openings(streams, word, is_pattern=False)]


def _openings(streams: Sequence[StreamInfo], word: str, *, is_pattern: bool) -> list[int]:
    found = [at for at, info in enumerate(streams) if info.name == word]
    # A number selects its stream, unless another stream has that name.
    found = found or [at for at, info in enumerate(streams) if str(info.stream) == word]
    if not found and is_pattern:
        fits = re.compile(fnmatch.translate(word)).match
        found = [at for at, info in enumerate(streams) if fits(info.name)]
    if not found:
        raise no_such_stream(streams, word)
    return found


def no_such_stream(streams: Sequence[StreamInfo], word: str) -> NoSuchStream:
    """The error for a missing stream, which suggests similar names or lists all."""
    names = list(dict.fromkeys(info.name for info in streams))
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else _what_there_is(streams)
    return NoSuchStream(f"the recording has no stream {word!r}; {hint}")


def _what_there_is(streams: Sequence[StreamInfo]) -> str:
    if not streams:
        return "it has no streams at all"
    if len(streams) == 1:
        return f"its only stream is {streams[0].name!r}"
    return f"it has {len(streams):,} streams, from {streams[0].name!r} to {streams[-1].name!r}"


@dataclass(frozen=True, slots=True)
class MovedStreams:
    """Streams that come from another version's recording, as columns."""

    streams: I64
    """Their numbers in the recording that continues them, int64 [N]."""
    names: Sequence[str]
    owners: Sequence[tuple[int, int, int]]
    """For each, the epoch, the one its owner held before (or 0), and the frame that was next when it was granted."""
    next_seqs: I64
    """The seqs of their next frames, int64 [N]."""
    states: U8
    """States before those frames, uint8 [N, row_bytes]."""
    replayed_from: I64 | None
    """The first frame that is part of each state, int64 [N]; None if the other version made the states."""
    numbers: I64
    """Their numbers in the other recording, int64 [N]."""


@dataclass(frozen=True, slots=True)
class StateRows:
    """States of streams at some point, as columns."""

    streams: I64
    """Distinct numbers, int64 [N]."""
    seqs: I64
    """The seqs of the frames that follow the states, int64 [N]."""
    states: U8
    """Rows of bytes, uint8 [N, row_bytes]."""
    tail_seqs: I64
    """int64 [N]: the client may still lack the outputs of the frames from here to `seqs`."""
    tail_x: F32
    """Those frames, one stream after another, float32 [sum(seqs - tail_seqs), features]."""
    tail_y: F32
    """Their outputs, float32 [sum(seqs - tail_seqs), outputs]."""

    def as_rows(self, position: int) -> Iterator[tuple[Column, ...]]:
        """Rows of the table `states`, without CRCs, for the checkpoint at a position."""
        lengths = self.seqs - self.tail_seqs
        assert len(self.tail_x) == len(self.tail_y) == lengths.sum()
        assert (lengths >= 0).all()
        ends = np.cumsum(lengths).tolist()
        columns = zip(self.streams.tolist(), self.seqs.tolist(), self.tail_seqs.tolist(), strict=True)
        for at, (stream, seq, tail_seq) in enumerate(columns):
            tail = slice(ends[at] - (seq - tail_seq), ends[at])
            x, y = (blob(array, "<f4") for array in (self.tail_x[tail], self.tail_y[tail]))
            yield stream, position, seq, self.states[at].tobytes(), tail_seq, x, y


def blob(array: npt.NDArray[Any], dtype: str) -> bytes:
    """An array's bytes in the byte order of the file."""
    return np.ascontiguousarray(array, dtype).tobytes()


def state_blobs(states: U8 | None, count: int) -> Iterator[bytes | None]:
    """Blobs of `count` states [N, row_bytes]; Nones if there are no states."""
    return repeat(None, count) if states is None else (state.tobytes() for state in states)
