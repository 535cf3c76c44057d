from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import DamagedRecording
from instep.recording.records import OpenStream, StateRows
from instep.recording.recovery import Recovered
from instep.recording.schema import owner_detail
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import look_through
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.replaying import replay
from tests.support.rows import close_stream, stream_event
from tests.support.scribe import Scribe
from tests.support.states import rows_of

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU))


def scribe_on(path: Path) -> Scribe:
    return Scribe(RecordingWriter.create(path, HEADER), gru_step(GRU))


def busy(path: Path, *, with_snapshot: bool = True) -> Scribe:
    """Streams 1 to 6 with everything that may happen; a killed engine's recording, of which all was committed."""
    scribe = scribe_on(path)
    for stream in (1, 2, 3):
        scribe.open(stream)
    scribe.open(4, scribe.random_state(), first_seq=100, name="restored")
    for _ in range(5):
        scribe.step([3, 1, 4])
    scribe.step([1, 2], "failed")
    through = scribe.step([2, 1])
    scribe.reset(3, scribe.random_state())
    scribe.close(2)
    if with_snapshot:
        scribe.checkpoint(through)
    scribe.open(5, epoch=5000)
    scribe.step([1, 5, 3])
    scribe.reset(1)
    scribe.step([3, 1], "failed")
    scribe.step([3, 1, 4])
    scribe.close(5)
    stream_event(scribe.writer, scribe.now, "owner", 4, 7000, owner_detail(1004, 106))
    scribe.open(6, scribe.random_state(), epoch=6000)
    scribe.step([1, 6], "unanswered")
    scribe.step([4, 3], "unanswered")
    scribe.writer.commit()
    scribe.writer.abandon()
    return scribe


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_replayed_the_states_are_those_the_engine_had(tmp_path: Path, with_snapshot: bool) -> None:
    scribe = busy(tmp_path / "a.rec", with_snapshot=with_snapshot)
    with Recovered(tmp_path / "a.rec") as recovered:
        found = replay(recovered, gru_step(GRU))
        streams = recovered.load(recovered.names)
        assert [(s.stream, s.name, s.epoch, s.former_epoch, s.granted_seq, s.first_seq) for s in streams] == [
            (1, "stream-1", 1001, 0, 0, 0),
            (3, "stream-3", 1003, 0, 0, 0),
            (4, "restored", 7000, 1004, 106, 100),
            (6, "stream-6", 6000, 0, 0, 0),
        ]
        assert (recovered.last_stream, recovered.last_epoch) == (6, 7000)
        assert (recovered.checkpoint_position > 0) is with_snapshot
    assert found.seqs == {stream: scribe.seqs[stream] for stream in (1, 3, 4, 6)}
    for stream in (1, 3, 4, 6):
        assert found.states[stream].tobytes() == scribe.states[stream].tobytes()
    assert found.unanswered == 4
    if with_snapshot:
        tail = streams[2]
        assert (tail.tail_seq, tail.seq) == (103, 105)
        assert tail.tail_x.tobytes() == np.stack([scribe.x[4][103], scribe.x[4][104]]).tobytes()
        assert tail.tail_y.tobytes() == np.stack([scribe.y[4][103], scribe.y[4][104]]).tobytes()


def test_an_empty_recording_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    RecordingWriter.create(tmp_path / "a.rec", HEADER).close()
    with Recovered(tmp_path / "a.rec") as recovered:
        assert (recovered.load(recovered.names), recovered.last_stream, recovered.last_epoch) == ([], 0, 0)
        assert seqs_of(recovered) == {}


def test_a_state_may_hold_frames_from_after_the_snapshots_position(tmp_path: Path) -> None:
    # Snapshots are read while streams go on: what a state holds already is left out of the replay.
    scribe = scribe_on(tmp_path / "a.rec")
    scribe.open(1)
    scribe.open(2)
    through = scribe.step([1, 2])
    scribe.step([1])
    scribe.reset(1, scribe.random_state())
    scribe.step([2, 1])
    scribe.checkpoint(through)
    scribe.step([1, 2])
    scribe.writer.commit()
    scribe.writer.abandon()
    with Recovered(tmp_path / "a.rec") as recovered:
        assert [stream.seq for stream in recovered.load(recovered.names)] == [3, 2]
        assert seqs_of(recovered) == {1: [3], 2: [2]}
    with Recovered(tmp_path / "a.rec") as recovered:
        found = replay(recovered, gru_step(GRU))
    for stream in (1, 2):
        assert found.states[stream].tobytes() == scribe.states[stream].tobytes()


def test_a_second_snapshot_replaces_what_changed_and_forgets_what_closed(tmp_path: Path) -> None:
    scribe = scribe_on(tmp_path / "a.rec")
    for stream in (1, 2, 3):
        scribe.open(stream)
    scribe.checkpoint(scribe.step([1, 2, 3]))
    scribe.close(2)
    scribe.checkpoint(scribe.step([3]))
    scribe.writer.commit()
    scribe.writer.abandon()
    assert [row["stream"] for row in Forger(tmp_path / "a.rec", tmp_path / "b.rec").rows("states")] in ([], [1, 3])
    with Recovered(tmp_path / "a.rec") as recovered:
        assert [(stream.stream, stream.seq) for stream in recovered.load(recovered.names)] == [(1, 1), (3, 2)]
        assert seqs_of(recovered) == {}
    writer = RecordingWriter.resume(tmp_path / "a.rec", HEADER)
    close_stream(writer, 3, 1, "closed", 2, None)
    nothing = np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32)
    state = rows_of(np.ones((1, 2, 4)))
    writer.checkpoint(1, writer.position, StateRows(np.array([1]), np.array([1]), state, np.array([1]), *nothing))
    writer.close()
    assert [row["stream"] for row in Forger(tmp_path / "a.rec", tmp_path / "b.rec").rows("states")] == [1]
    with Recovered(tmp_path / "a.rec") as recovered:
        (found,) = recovered.load(recovered.names)
        assert found.state is not None
        assert (found.stream, float(found.state.view("<f4")[7])) == (1, 1.0)


@pytest.mark.parametrize("has_older", [False, True])
def test_a_snapshot_that_was_not_finished_leaves_the_older_one_good_and_some_states_newer(
    tmp_path: Path, has_older: bool
) -> None:
    scribe = scribe_on(tmp_path / "a.rec")
    for stream in (1, 2, 3):
        scribe.open(stream)
    older = scribe.step([1, 2, 3])
    if has_older:
        scribe.checkpoint(older)
    through = scribe.step([1, 2])
    scribe.writer.commit()
    scribe.open(4)
    scribe.step([1, 4])
    scribe.checkpoint(through, only=[1, 4], is_part=True)
    scribe.writer.commit()
    scribe.step([1, 2, 3])
    scribe.writer.commit()
    scribe.writer.abandon()
    with Recovered(tmp_path / "a.rec") as recovered:
        assert recovered.checkpoint_position == (older if has_older else 0)
        assert [stream.seq for stream in recovered.load(recovered.names)] == [3, *([1, 1] if has_older else [0, 0]), 1]
        assert seqs_of(recovered) == {1: [3], 2: [1, 2] if has_older else [0, 1, 2], 3: [1] if has_older else [0, 1]}
    with Recovered(tmp_path / "a.rec") as recovered:
        found = replay(recovered, gru_step(GRU))
    for stream, state in scribe.states.items():
        assert found.states[stream].tobytes() == state.tobytes()

    scribe.writer = RecordingWriter.resume(tmp_path / "a.rec", HEADER)
    scribe.close(4)
    scribe.checkpoint(scribe.step([2]))
    scribe.writer.close()
    with Recovered(tmp_path / "a.rec") as recovered:
        assert seqs_of(recovered) == {}
        assert [(stream.stream, stream.seq) for stream in recovered.load(recovered.names)] == [(1, 4), (2, 4), (3, 2)]


def closed(path: Path) -> Path:
    """As `busy`, in one file: gone on with and closed."""
    busy(path)
    RecordingWriter.resume(path, HEADER).close()
    return path


def read(path: Path) -> list[OpenStream]:
    look_through(path)
    with Recovered(path) as recovered:
        return recovered.load(recovered.names)


def seqs_of(recovered: Recovered) -> dict[int, list[int]]:
    """The frames that a restart steps again, by stream."""
    found: dict[int, list[int]] = {}
    for segment in recovered.segments():
        assert not segment.marks
        for stream, seq in zip(segment.frames.streams.tolist(), segment.frames.seqs.tolist(), strict=True):
            found.setdefault(stream, []).append(seq)
    return found


@pytest.mark.parametrize(
    ("table", "which", "columns"),
    [
        ("states", 0, {"seq": 4, "tail_seq": 2}),
        ("states", 1, {"stream": 77}),
        ("states", 2, {"seq": 99, "tail_seq": 97}),
        ("states", 0, {"tail_seq": 7}),
        ("checkpoints", 0, {"openings": 3}),
        ("checkpoints", 0, {"closings": 1}),
        ("checkpoints", 0, {"position": 4}),
        ("openings", 4, {"stream": 0}),
        ("closings", 0, {"stream": 77}),
        ("events", 3, {"seq": 12}),
        ("events", 5, {"stream": 99}),
        ("newest", 0, {"states": 9}),
        ("newest", 0, {"position": 8}),
    ],
)
def test_what_does_not_fit_is_refused_even_with_the_right_crc(
    tmp_path: Path, table: str, which: int, columns: dict[str, int | None]
) -> None:
    forger = Forger(closed(tmp_path / "a.rec"), tmp_path / "b.rec")
    row = forger.rows(table)[which]
    key = next(iter(row))
    forger.change(table, row[key], **columns)
    with pytest.raises(DamagedRecording):
        read(forger.path)


@pytest.mark.parametrize("table", ["states", "checkpoints", "newest"])
def test_rows_beside_the_history_that_are_gone(tmp_path: Path, table: str) -> None:
    forger = Forger(closed(tmp_path / "a.rec"), tmp_path / "b.rec")
    row = forger.rows(table)[0]
    forger.remove(table, row[next(iter(row))])
    with pytest.raises(DamagedRecording):
        read(forger.path)


def test_a_state_that_claims_frames_nobody_recorded(tmp_path: Path) -> None:
    scribe = scribe_on(tmp_path / "a.rec")
    scribe.open(1)
    through = scribe.step([1])
    scribe.step([1])
    scribe.seqs[1] = 5
    scribe.checkpoint(through, tail=0)
    scribe.writer.close()
    with pytest.raises(DamagedRecording):
        read(tmp_path / "a.rec")
