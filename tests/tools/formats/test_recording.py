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
from tests.support.rows import close_stream, open_stream, stream_event
from tests.support.states import gru_state

START_NS = 1_700_000_000_000_000_000
MS = 1_000_000


def header(features: int = 2, hidden: int = 3) -> RecordingHeader:
    description = {"features": features, "before": [], "gru": {"hidden_size": hidden, "num_layers": 2}, "after": []}
    return RecordingHeader(
        instep_version="0",
        created_ns=START_NS,
        model_name="m",
        model_folder="",
        description=description,
        features=features,
        outputs=hidden,
        state=gru_state(2, hidden).encode(),
        model_fingerprint="f" * 64,
        arithmetic="portable-1",
        durability="commit",
    )


def begin(writer: RecordingWriter, ms: int, frames: list[tuple[int, int, float]]) -> int:
    """Frames as (stream, seq, value): x is [value, value + 0.5]."""
    value = np.array([frame[2] for frame in frames], np.float32)
    return writer.add_inputs(
        START_NS + ms * MS,
        np.array([frame[0] for frame in frames], np.uint32),
        np.array([frame[1] for frame in frames], np.uint64),
        np.stack([value, value + 0.5], axis=1),
    )


def batch(writer: RecordingWriter, ms: int, frames: list[tuple[int, int, float]]) -> None:
    """The same, answered with y [value, -value, 0]."""
    value = np.array([frame[2] for frame in frames], np.float32)
    position = begin(writer, ms, frames)
    writer.add_outputs(START_NS + ms * MS, position, np.stack([value, -value, 0 * value], axis=1))


def opened(writer: RecordingWriter, stream: int, name: str, ms: int, state: F32 | None = None, first: int = 0) -> None:
    open_stream(writer, stream, name, 10 + stream, first, START_NS + ms * MS, state)


@pytest.fixture
def writer(tmp_path: Path) -> RecordingWriter:
    return RecordingWriter.create(tmp_path / "r.db", header())


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
    writer.close()
    read = read_sequences(tmp_path / "r.db")
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


def test_a_recording_being_written_is_read_up_to_its_last_commit(tmp_path: Path, writer: RecordingWriter) -> None:
    write_three(writer)
    batch(writer, 50, [(2, 3, 23.0)])
    assert read_sequences(tmp_path / "r.db").lengths.tolist() == [1, 3, 1]
    writer.commit()
    assert read_sequences(tmp_path / "r.db").lengths.tolist() == [1, 4, 1]
    writer.close()


def test_frames_of_a_failed_step_do_not_count(tmp_path: Path, writer: RecordingWriter) -> None:
    opened(writer, 1, "a", 0)
    failed = begin(writer, 1, [(1, 0, 5.0)])
    writer.fail_batch(START_NS + MS, failed, "out of memory")
    batch(writer, 2, [(1, 0, 6.0)])
    writer.close()
    assert read_sequences(tmp_path / "r.db").frames[:, 0].tolist() == [6]


def test_frames_whose_outputs_were_not_recorded_are_there_without_them(tmp_path: Path, writer: RecordingWriter) -> None:
    opened(writer, 1, "a", 0, first=7)
    batch(writer, 1, [(1, 7, 5.0)])
    begin(writer, 2, [(1, 8, 6.0)])
    writer.commit()
    writer.abandon()  # the engine was killed
    writer = RecordingWriter.resume(tmp_path / "r.db", header())
    batch(writer, 3, [(1, 9, 7.0)])
    writer.close()
    read = read_sequences(tmp_path / "r.db")
    assert read.frames[:, 0].tolist() == [5, 6, 7]
    assert read.answered is not None
    assert read.answered.tolist() == [True, False, True]
    assert read.outputs is not None
    assert read.outputs[[0, 2], 0].tolist() == [5, 7]
    assert np.isnan(read.outputs[1]).all()


def test_a_reset_begins_a_sequence_of_its_own(tmp_path: Path, writer: RecordingWriter) -> None:
    states = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    opened(writer, 1, "a", 0, states[0])
    opened(writer, 2, "b", 1)
    batch(writer, 10, [(1, 0, 1.0), (2, 0, 2.0)])
    for ms, state in ((20, None), (21, states[1])):  # the second one counts
        stream_event(writer, START_NS + ms * MS, "reset", 1, 1, "", state)
    batch(writer, 30, [(1, 1, 3.0)])
    stream_event(writer, START_NS + 40 * MS, "reset", 1, 2, "", None)  # nothing follows
    writer.close()
    read = read_sequences(tmp_path / "r.db")
    assert read.names == ("a", "a", "b")
    assert read.lengths.tolist() == [1, 1, 1]
    assert read.frames[:, 0].tolist() == [1, 3, 2]
    assert list(read.initial_states) == [0, 1]
    np.testing.assert_array_equal(read.initial_states[1]["h"], states[1])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("UPDATE batches SET x = zeroblob(length(x)) WHERE position = 5", "row at position 5"),
        ("DROP TABLE openings", "is missing"),
    ],
)
def test_damage_is_found(tmp_path: Path, writer: RecordingWriter, damage: str, why: str) -> None:
    write_three(writer)
    writer.close()
    database = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    database.execute(damage)
    database.close()
    with pytest.raises(BadFile, match=why):
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


def test_what_is_no_recording_or_holds_nothing(tmp_path: Path, writer: RecordingWriter) -> None:
    writer.close()
    (tmp_path / "x.db").write_bytes(b"SQLite format 3\0 and then nonsense" * 100)
    sqlite3.connect(tmp_path / "bag.db3").execute("CREATE TABLE topics (id)").connection.close()
    for name, why in (("r.db", "no frames"), ("x.db", "is not a recording"), ("bag.db3", "is not a recording")):
        with pytest.raises(BadFile, match=why):
            read_sequences(tmp_path / name)
