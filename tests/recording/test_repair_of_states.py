"""What is saved of a damaged recording that holds states, and no frames before the damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.recording.copies import Bound, cut, repair
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.replaying import replay
from tests.support.scribe import F32, Scribe

GRU = make_gru(3, 4, layers=2)


@pytest.fixture
def scribe(tmp_path: Path) -> Scribe:
    """A recording that keeps all of its checkpoints."""
    header = make_header(gru_description(GRU))
    return Scribe(RecordingWriter.create(tmp_path / "a.rec", header, Retention(keep_bytes=1)), gru_step(GRU))


def damage(recording: Path, table: str, row: int) -> Path:
    """A copy whose row, counted from 0, does not match its CRC."""
    forger = Forger(recording, recording.with_name("damaged.rec"), fix_crc=False)
    forger.change(table, forger.rows(table)[row]["position"], time_ns=7)
    return forger.path


def continued(path: Path) -> dict[int, F32]:
    """The states of the open streams after a restart, by their numbers."""
    with Recovered(path) as recovered:
        return replay(recovered, gru_step(GRU)).states


@pytest.mark.parametrize("how", ["opened", "reset"])
def test_states_that_clients_have_given_are_saved(scribe: Scribe, tmp_path: Path, how: str) -> None:
    given = scribe.random_state()
    scribe.open(1, given if how == "opened" else None)
    scribe.open(2)
    if how == "reset":
        scribe.reset(1, given)
    scribe.close(2)
    scribe.writer.close()
    found = repair(damage(tmp_path / "a.rec", "closings", 0), tmp_path / "saved.rec")
    assert (found.frames, found.streams) == (0, 2)
    assert continued(tmp_path / "saved.rec")[1].tobytes() == given.tobytes()


@pytest.mark.parametrize("has_changed", [True, False])
def test_states_that_the_history_begins_with_are_saved(scribe: Scribe, tmp_path: Path, has_changed: bool) -> None:
    scribe.open(1, None if has_changed else scribe.random_state())
    scribe.open(2)
    scribe.checkpoint(scribe.step([1, 2] if has_changed else [2]))
    scribe.close(2)
    scribe.checkpoint(scribe.writer.position)
    state = scribe.states[1]
    scribe.checkpoint(scribe.step([1]))
    scribe.writer.close()
    with RecordingReader(tmp_path / "a.rec") as reader:
        begin = reader.checkpoints()[1]
    cut(tmp_path / "a.rec", tmp_path / "cut.rec", Bound("position", begin.position), None)
    with RecordingReader(tmp_path / "cut.rec") as reader:
        assert (reader.first_position, reader.state_rows) == (begin.position + 1, int(has_changed))
    found = repair(damage(tmp_path / "cut.rec", "batches", 0), tmp_path / "saved.rec")
    assert (found.frames, found.streams) == (0, 1)
    assert continued(tmp_path / "saved.rec")[1].tobytes() == state.tobytes()
