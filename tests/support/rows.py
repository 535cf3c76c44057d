"""One row at a time for a recording's writer, or for its recorder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from instep.recording.recorder import Recorder, Write
from instep.recording.writer import RecordingWriter
from tests.support.states import rows_of

F32 = npt.NDArray[np.float32]


def open_stream(
    to: RecordingWriter | Recorder,
    stream: int,
    name: str,
    epoch: int,
    first_seq: int,
    time_ns: int,
    initial_state: F32 | None,
) -> int | None:
    states = None if initial_state is None else rows_of(initial_state[None])
    columns = (np.array([stream]), [name], np.array([epoch], np.uint64), np.array([first_seq]))
    return _write(to, lambda writer: writer.open_streams(time_ns, *columns, states))


def close_stream(
    to: RecordingWriter | Recorder, stream: int, time_ns: int, reason: str, frames: int, final_state: F32 | None
) -> int | None:
    state = rows_of(np.zeros((1, 1), np.float32) if final_state is None else final_state[None])
    lost = np.array([final_state is None])
    return _write(
        to,
        lambda writer: writer.close_streams(time_ns, np.array([stream]), reason, np.array([frames]), state, lost),
    )


def stream_event(
    to: RecordingWriter | Recorder,
    time_ns: int,
    kind: str,
    stream: int,
    seq: int,
    detail: str = "",
    state: F32 | None = None,
) -> int | None:
    states = None if state is None else rows_of(state[None])
    return _write(
        to,
        lambda writer: writer.stream_events(time_ns, kind, np.array([stream]), np.array([seq]), [detail], states),
    )


def _write(to: RecordingWriter | Recorder, write: Write) -> int | None:
    if isinstance(to, Recorder):
        return to.put(write, small_rows=1)
    write(to)
    return None
