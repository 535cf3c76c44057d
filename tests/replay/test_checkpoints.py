"""Checkpoints are complete, and their states are those that the replay comes to."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from rich.console import Console

from instep.models.folder import load_model
from instep.models.network import PortableNetwork
from instep.recording.errors import DamagedRecording
from instep.recording.schema import TABLES
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from tests.support import verifying
from tests.support.forger import Forger, key_of
from tests.support.recordings import NO_BITS, Recorded, make_gru, record_gru, served_step
from tests.support.scribe import Scribe
from tests.support.verifying import forge, verdicts

Row: TypeAlias = dict[str, Any]


@pytest.fixture
def scribe(tmp_path: Path) -> Scribe:
    """Four streams, of which the third has closed and the last has no frames, with a checkpoint in between."""
    return lively(start(tmp_path))


def start(tmp_path: Path, **changes: Any) -> Scribe:
    model = record_gru(tmp_path / "model", make_gru(3, 8, layers=2), [1], changes=changes)
    network = PortableNetwork(load_model(model.folder))
    return Scribe(RecordingWriter.create(tmp_path / "a.rec", model.header), served_step(network))


def lively(scribe: Scribe) -> Scribe:
    for stream in (1, 2, 3, 4):
        scribe.open(stream, scribe.random_state() if stream == 2 else None, first_seq=10 * stream)
    for _ in range(5):
        scribe.step([1, 2, 3])
    scribe.reset(1, scribe.random_state())
    through = scribe.step([1, 3])
    scribe.step([1, 2])
    scribe.checkpoint(through, tail=3)
    for _ in range(4):
        scribe.step([2, 1, 3])
    scribe.close(3)
    return scribe


def finished(scribe: Scribe) -> Recorded:
    scribe.writer.close()
    return Recorded(scribe.writer.path, model_folder(scribe.writer.path.parent), scribe.writer.header)


def model_folder(tmp_path: Path) -> Path:
    return tmp_path / "model" / "model"


def state_row(forger: Forger, stream: int) -> Row:
    return next(row for row in forger.rows("states") if row["stream"] == stream)


def change_state(forger: Forger, key: int, **columns: Any) -> None:
    forger.change("states", key, **columns)


def verify(forger: Forger, recorded: Recorded) -> Any:
    return verifying.verify(recorded, path=forger.path)


def test_the_states_of_a_checkpoint_are_compared(scribe: Scribe) -> None:
    recorded = finished(scribe)
    report = verifying.verify(recorded)
    assert verdicts(report) == ["exact", "exact", "exact", "empty"]
    frames = sum(len(of_stream) for of_stream in scribe.y.values())
    assert report.frames == frames
    states = 1 + 3  # the final state of stream 3, and three in the checkpoint
    assert report.elements["stepped"] == 8 * frames + 16 * states


@pytest.mark.parametrize("stream", [1, 2, 3])
def test_a_state_with_another_bit_is_a_mismatch(scribe: Scribe, stream: int) -> None:
    recorded = finished(scribe)
    forger = forge(recorded)
    row = state_row(forger, stream)
    state = np.frombuffer(row["state"], np.int32).copy()
    state[5] ^= 1
    change_state(forger, stream, state=state.tobytes())
    report = verify(forger, recorded)
    assert [each.stream for each in report.streams if each.verdict == "mismatch"] == [stream]
    problems = report.streams[stream - 1].problems
    assert problems[0].startswith(f"checkpoint before frame {row['seq']}, element 5: recorded")


@pytest.mark.parametrize("column", ["tail_x", "tail_y"])
def test_a_frame_of_a_checkpoint_with_another_bit_is_a_mismatch(scribe: Scribe, column: str) -> None:
    recorded = finished(scribe)
    forger = forge(recorded)
    row = state_row(forger, 1)
    values = np.frombuffer(row[column], np.int32).copy()
    values[-1] ^= 1
    change_state(forger, 1, **{column: values.tobytes()})
    report = verify(forger, recorded)
    assert verdicts(report) == ["mismatch", "exact", "exact", "empty"]
    expected = f"frame {row['seq'] - 1} in a checkpoint differs from the recorded frame"
    assert report.streams[0].problems == [expected]


def test_where_bits_are_not_required_states_are_compared_within_the_bound(tmp_path: Path) -> None:
    recorded = finished(lively(start(tmp_path, **NO_BITS)))
    for by, verdict in ((1e-7, "within tolerance"), (1e-3, "mismatch")):
        forger = forge(recorded)
        state = np.frombuffer(state_row(forger, 2)["state"], np.float32).copy()
        state[3] += np.float32(by)
        change_state(forger, 2, state=state.tobytes())
        assert verify(forger, recorded).streams[1].verdict == verdict


def test_a_state_before_or_after_a_reset_at_the_same_frame_is_good(tmp_path: Path) -> None:
    scribe = start(tmp_path)
    scribe.open(1)
    scribe.open(2)
    through = scribe.step([1, 2])
    scribe.reset(1, scribe.random_state())
    scribe.checkpoint(through)  # of stream 1, the state after the reset; it may be
    scribe.reset(2, scribe.random_state())  # of stream 2, the one before
    scribe.step([1, 2])
    assert verdicts(verifying.verify(finished(scribe))) == ["exact", "exact"]


def test_a_checkpoint_that_misses_a_reset_is_a_mismatch(tmp_path: Path) -> None:
    scribe = start(tmp_path)
    scribe.open(1)
    scribe.step([1])
    before = scribe.states[1]
    scribe.reset(1, scribe.random_state())
    scribe.checkpoint(scribe.writer.position)
    scribe.step([1])
    recorded = finished(scribe)
    forger = forge(recorded)
    change_state(forger, 1, state=before.tobytes())
    (stream,) = verify(forger, recorded).streams
    assert stream.problems[0].startswith("checkpoint before frame 1, element 0:")


def test_outputs_that_only_the_checkpoint_holds_are_compared(tmp_path: Path) -> None:
    scribe = start(tmp_path)
    scribe.open(1)
    scribe.step([1])
    scribe.step([1], "unanswered")
    scribe.writer.commit()
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(scribe.writer.path, scribe.writer.header)
    scribe.checkpoint(scribe.writer.position)
    scribe.step([1])
    recorded = finished(scribe)
    (stream,) = verifying.verify(recorded).streams
    assert (stream.verdict, stream.frames, stream.not_compared) == ("exact", 3, 0)
    forger = forge(recorded)
    y = np.frombuffer(state_row(forger, 1)["tail_y"], np.int32).copy()
    y[-3] ^= 1
    change_state(forger, 1, tail_y=y.tobytes())
    (stream,) = verify(forger, recorded).streams
    assert stream.problems[0].startswith("frame 1, element 5: recorded")


def drop_state(forger: Forger) -> None:
    forger.remove("states", 2)


def count_states_again(forger: Forger) -> None:
    (newest,) = forger.rows("newest")
    forger.change("newest", newest["position"], states=len(forger.rows("states")))


def drop_state_and_count_again(forger: Forger) -> None:
    forger.remove("states", 2)
    count_states_again(forger)


def drop_checkpoint(forger: Forger) -> None:
    (mark,) = forger.rows("checkpoints")
    forger.remove("checkpoints", mark["position"])
    for row in forger.rows("states"):
        forger.remove("states", row["stream"])
    count_states_again(forger)


def take_an_older_state(forger: Forger) -> None:
    opening = next(row for row in forger.rows("openings") if row["stream"] == 2)
    change_state(forger, 2, seq=20, tail_seq=20, state=opening["initial_state"], tail_x=b"", tail_y=b"")


def name_an_unknown_stream(forger: Forger) -> None:
    change_state(forger, 2, stream=9)


def move_checkpoint(forger: Forger) -> None:
    (mark,) = forger.rows("checkpoints")
    forger.move("checkpoints", mark["position"], mark["position"] + 1)


@pytest.mark.parametrize(
    "forgery",
    [
        drop_state,
        drop_state_and_count_again,
        drop_checkpoint,
        take_an_older_state,
        name_an_unknown_stream,
        move_checkpoint,
    ],
)
def test_an_incomplete_checkpoint_is_damage(scribe: Scribe, forgery: Callable[[Forger], None]) -> None:
    recorded = finished(scribe)
    forger = forge(recorded)
    forgery(forger)
    with pytest.raises(DamagedRecording):
        verify(forger, recorded)


def test_a_state_of_frames_that_were_not_recorded_is_a_mismatch(scribe: Scribe) -> None:
    recorded = finished(scribe)
    forger = forge(recorded)
    change_state(forger, 2, seq=31, tail_seq=31, tail_x=b"", tail_y=b"")
    report = verify(forger, recorded)
    assert report.streams[1].problems == [
        "a checkpoint holds its state before frame 31, where no frames were recorded",
    ]


def test_no_row_of_any_table_can_go_unnoticed(tmp_path: Path) -> None:
    recorded = finished(lively(start(tmp_path)))
    for table in [*TABLES.keys() - {"trimmed"}, "header"]:
        rows = forge(recorded).rows(table)
        assert rows, table
        for row in rows[:12] + rows[-12:]:
            forger = forge(recorded)
            forger.remove(table, *(row[name] for name in key_of(table)))
            console = Console(file=io.StringIO(), width=200)
            status = run(forger.path, model_folder=recorded.folder, streams=[], json=False, console=console)
            assert status != 0, (table, row)
