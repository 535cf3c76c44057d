"""A recording of several files, read by the client as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instep.recording.writer import RecordingWriter
from instep_client.commands.problems import BadFile
from instep_client.commands.recordings import is_recording, read_recording
from instep_client.protocol.wire import F32
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.scribe import Scribe

GRU = make_gru(3, 4, layers=2)
FILES = ["a.rec", "a-000002.rec", "a-000003.rec"]


@pytest.fixture
def scribe(tmp_path: Path) -> Scribe:
    """Three files: streams that go on in each, that end, begin and are reset in between; the last is being written."""
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", make_header(gru_description(GRU))), gru_step(GRU))
    scribe.open(1, scribe.random_state())
    scribe.open(2, first_seq=1000)
    scribe.step([1, 2])
    scribe.step([1])
    scribe.close(2)
    scribe.rotate()
    scribe.open(3)
    scribe.step([3, 1])
    scribe.rotate()
    scribe.reset(3)
    scribe.step([3, 1])
    scribe.writer.commit()
    return scribe


def frames(of: dict[int, F32]) -> F32:
    return np.array([row for _, row in sorted(of.items())], np.float32)


def test_all_files_are_read_as_one(tmp_path: Path, scribe: Scribe) -> None:
    found = read_recording(tmp_path / "a.rec")
    assert found.names == ("stream-1", "stream-2", "stream-3", "stream-3")
    assert found.lengths.tolist() == [4, 1, 1, 1]
    assert found.outputs is not None
    np.testing.assert_array_equal(found.frames, np.concatenate([frames(scribe.x[each]) for each in (1, 2, 3)]))
    np.testing.assert_array_equal(found.outputs, np.concatenate([frames(scribe.y[each]) for each in (1, 2, 3)]))
    assert found.initial_states.keys() == {0}


def test_one_file_is_read_alone_by_its_own_name(tmp_path: Path, scribe: Scribe) -> None:
    found = read_recording(tmp_path / FILES[1])
    assert found.names == ("stream-1", "stream-3")
    assert found.lengths.tolist() == [1, 1]
    np.testing.assert_array_equal(found.frames, [scribe.x[1][2], scribe.x[3][0]])


def test_the_first_may_be_gone_and_one_in_the_middle_may_not(tmp_path: Path, scribe: Scribe) -> None:
    scribe.writer.close()
    (tmp_path / FILES[1]).rename(tmp_path / "away")
    with pytest.raises(BadFile, match=r"a file of .*a\.rec is missing: one ends at position 8, and the next begins at"):
        read_recording(tmp_path / "a.rec")
    (tmp_path / "away").rename(tmp_path / FILES[1])
    (tmp_path / "a.rec").unlink()
    assert is_recording(tmp_path / "a.rec")
    found = read_recording(tmp_path / "a.rec")
    assert found.lengths.tolist() == [2, 1, 1]
    assert found.initial_states.keys() == {0}


def test_a_file_that_is_only_called_like_one_of_them_is_none(tmp_path: Path, scribe: Scribe) -> None:
    RecordingWriter.create(tmp_path / "a-000009.rec", make_header(gru_description(GRU))).close()
    (tmp_path / "a-000010.rec").write_text("hello")
    assert read_recording(tmp_path / "a.rec").lengths.tolist() == [4, 1, 1, 1]
