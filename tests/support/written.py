"""A recording whose every number the test itself wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from instep.recording.reader import RecordingReader
from instep.recording.repair import Cut, cut
from instep.recording.writer import RecordingWriter
from tests.support.recordings import make_header
from tests.support.rows import close_stream, open_stream
from tests.support.scribe import START_NS

FEATURES = 3
OUTPUTS = 2
NAMES = ("mic-1", 'a "b", ü c', "mic-1", "2", "mic-2")
"""Streams 1 to 5: two openings of one name, one that CSV must quote, one that looks like another's number."""
ODD = np.array([0.1, -0.0, 1e-45, 3.4028235e38, 1 / 3, 16777216.0, 1e-5, np.nan], np.float32)

DESCRIPTION = {
    "features": FEATURES,
    "before": [],
    "gru": {"hidden_size": OUTPUTS, "num_layers": 1, "bias": True},
    "after": [],
}


@dataclass
class Row:
    stream: str
    stream_id: int
    seq: int
    time_ns: int
    x: list[float]
    y: list[float]


@dataclass
class Written:
    path: Path
    rows: list[Row] = field(default_factory=list)
    unanswered: int = 0
    """How many of the last rows have no recorded output: NaN."""

    def of(self, *stream_ids: int) -> list[Row]:
        return [row for row in self.rows if row.stream_id in stream_ids]


def write_recording(
    folder: Path,
    *,
    steps: int = 40,
    unanswered: int = 0,
    stranger_at: int | None = None,
    finish: bool = True,
) -> Written:
    """A recording of streams 1 to 5, of which stream 5 has no frames; 4 and 5 are still open.

    Args:
        folder: where `a.rec` goes.
        steps: batches.
        unanswered: how many of the last steps have no recorded outputs.
        stranger_at: a step that also holds a frame of a stream that was never opened.
        finish: close it.
    """
    rng = np.random.default_rng(5)
    written = Written(folder / "a.rec")
    writer = RecordingWriter.create(written.path, make_header(DESCRIPTION))
    for stream, name in enumerate(NAMES, 1):
        open_stream(writer, stream, name, stream, 0, START_NS, None)
    done = np.zeros(len(NAMES), np.int64)
    for step in range(steps):
        chosen = rng.permutation(4)[: rng.integers(1, 5)]
        x = rng.choice(np.concatenate([ODD[:-1], rng.standard_normal(20).astype(np.float32)]), (len(chosen), FEATURES))
        y = rng.standard_normal((len(chosen), OUTPUTS)).astype(np.float32)
        y[:, 0] = rng.choice(ODD, len(chosen))
        time_ns = START_NS + 1_000_003 * step + 7
        for at, stream in enumerate((chosen + 1).tolist()):
            found = y[at].tolist() if step < steps - unanswered else [np.nan] * OUTPUTS
            written.rows.append(Row(NAMES[stream - 1], stream, int(done[stream - 1]), time_ns, x[at].tolist(), found))
            written.unanswered += step >= steps - unanswered
        streams = chosen.astype(np.uint32) + 1
        if step == stranger_at:
            streams[0] = 77
        batch = writer.add_inputs(time_ns, streams.astype(np.uint32), done[chosen].astype(np.uint64), x)
        if step < steps - unanswered:
            writer.add_outputs(START_NS, batch, y)
        done[chosen] += 1
    for stream in range(1, 4):
        close_stream(writer, stream, START_NS, "closed by its client", int(done[stream - 1]), None)
    writer.commit()
    if finish:
        writer.close()
    return written


def bits(floats: npt.ArrayLike) -> list[int]:
    """float32 as the integers they are stored as: -0.0 is not 0.0, NaN is NaN."""
    found: list[int] = np.asarray(floats, np.float32).view(np.uint32).ravel().tolist()
    return found


def exact(rows: Sequence[Row]) -> list[tuple[str, int, int, int, list[int], list[int]]]:
    return [(row.stream, row.stream_id, row.seq, row.time_ns, bits(row.x), bits(row.y)) for row in rows]


def cut_out(source: Path, target: Path, after: int = 0, last: int | None = None) -> Cut:
    """`cut` on a reader of its own."""
    with RecordingReader(source) as reader:
        return cut(reader, target, after, last)
