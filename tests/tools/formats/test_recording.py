from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
from instep_client.protocol.wire import F32
from instep_tools.formats.read import read_sequences
from instep_tools.problems import BadFile
from tests.support.rows import close_stream, open_stream
from tests.support.states import gru_state

START_NS = 1_700_000_000_000_000_000
MS = 1_000_000


HEADER = RecordingHeader(
    instep_version="0",
    created_ns=START_NS,
    model_name="m",
    model_folder="",
    description={"features": 2, "before": [], "gru": {"hidden_size": 3, "num_layers": 2}, "after": []},
    features=2,
    outputs=3,
    state=gru_state(2, 3).encode(),
    model_fingerprint="f" * 64,
    arithmetic="portable-1",
    durability="commit",
)


def batch(writer: RecordingWriter, ms: int, frames: list[tuple[int, int, float]], answered: bool = True) -> None:
    """Frames as (stream, seq, value): x is [value, value + 0.5] and y [value, -value, 0]."""
    streams, seqs, values = (np.array(column) for column in zip(*frames, strict=True))
    x, y = (
        (values[:, None] * scale + shift).astype(np.float32) for scale, shift in (([1, 1], [0, 0.5]), ([1, -1, 0], 0))
    )
    now_ns = START_NS + ms * MS
    position = writer.add_inputs(now_ns, streams.astype(np.uint32), seqs.astype(np.uint64), x)
    if answered:
        writer.add_outputs(now_ns, position, y)


def opened(writer: RecordingWriter, stream: int, name: str, ms: int, state: F32 | None = None, first: int = 0) -> None:
    open_stream(writer, stream, name, 10 + stream, first, START_NS + ms * MS, state)


@pytest.fixture
def writer(tmp_path: Path) -> RecordingWriter:
    return RecordingWriter.create(tmp_path / "r.db", HEADER)


def write_three(writer: RecordingWriter) -> None:
    """Streams 1 and 3 are called `mic` one after the other, 2 is `tap`; 4 sends nothing."""
    state = np.arange(6, dtype=np.float32).reshape(2, 3)
    opened(writer, 2, "tap", 0)
    opened(writer, 1, "mic", 5, state)
    batch(writer, 10, [(1, 0, 10.0), (2, 0, 20.0)])
    batch(writer, 20, [(2, 1, 21.0)])
    close_stream(writer, 1, START_NS + 25 * MS, "closed", 1, state)
    opened(writer, 3, "mic", 30)
    opened(writer, 4, "silent", 30)
    batch(writer, 40, [(3, 0, 30.0), (2, 2, 22.0)])
    writer.commit()


def test_streams_of_a_recording(tmp_path: Path, writer: RecordingWriter) -> None:
    write_three(writer)
    batch(writer, 50, [(2, 3, 23.0)])  # of one that is being written, up to its last commit
    read = read_sequences(tmp_path / "r.db")
    writer.close()
    assert read.names == ("mic", "tap", "mic")
    assert read.lengths.tolist() == [1, 3, 1]
    assert read.frames.tolist() == [[v, v + 0.5] for v in (10, 20, 21, 22, 30)]
    assert read.outputs is not None
    assert read.outputs.tolist() == [[v, -v, 0] for v in (10, 20, 21, 22, 30)]
    assert read.times_ns is not None
    assert ((read.times_ns - START_NS) // MS).tolist() == [10, 10, 20, 40, 40]
    assert list(read.initial_states) == [0]
    np.testing.assert_array_equal(read.initial_states[0]["h"], np.arange(6).reshape(2, 3))
    assert read.fingerprint == "f" * 64


def test_frames_whose_outputs_were_not_recorded_are_there_without_them(tmp_path: Path, writer: RecordingWriter) -> None:
    opened(writer, 1, "a", 0, first=7)
    batch(writer, 1, [(1, 7, 5.0)])
    batch(writer, 2, [(1, 8, 6.0)], answered=False)
    writer.commit()
    writer.abandon()  # the engine was killed
    writer = RecordingWriter.resume(tmp_path / "r.db", HEADER)
    batch(writer, 3, [(1, 9, 7.0)])
    writer.close()
    read = read_sequences(tmp_path / "r.db")
    assert read.frames[:, 0].tolist() == [5, 6, 7]
    assert read.answered is not None
    assert read.answered.tolist() == [True, False, True]
    assert read.outputs is not None
    assert read.outputs[[0, 2], 0].tolist() == [5, 7]
    assert np.isnan(read.outputs[1]).all()


def test_damage_is_found(tmp_path: Path, writer: RecordingWriter) -> None:
    write_three(writer)
    writer.close()
    database = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    database.execute("UPDATE batches SET x = zeroblob(length(x)) WHERE position = 5")
    database.close()
    with pytest.raises(BadFile, match="row at position 5"):
        read_sequences(tmp_path / "r.db")


def test_nothing_is_needed_but_what_the_client_library_needs(tmp_path: Path, writer: RecordingWriter) -> None:
    write_three(writer)
    writer.close()
    program = (
        "import sys\nfrom pathlib import Path\n"
        "sys.modules.update(dict.fromkeys(('torch', 'numba', 'pydantic', 'structlog', 'typer', 'rich', 'yaml')))\n"
        "from instep_tools.formats.read import read_sequences\n"
        "print(read_sequences(Path(sys.argv[1])).lengths.tolist())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "r.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[1, 3, 1]\n", "")
