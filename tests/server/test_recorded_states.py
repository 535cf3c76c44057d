from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from instep.core.streams import StreamTable
from instep.runtime.errors import StateLost
from instep.server.cold import RecordedStates
from tests.recording.test_stored_states import LAYERS, SIZE, Table, some


def test_it_reads_the_file_that_is_live_now(tmp_path: Path) -> None:
    first, second = tmp_path / "a.instep", tmp_path / "b.instep"
    table = StreamTable(4, 1)
    slots, _ = table.open(["a", "b"], 0, 0)
    table.recording_id[slots] = [7, 8]
    table.step_seq[slots] = [3, 4]
    for path, value in ((first, 10), (second, 20)):
        written = Table(path)
        written.state(7, 3, some(value))
        written.state(8, 4, some(value + 1))
        written.database.close()
    live = [first]
    cold = RecordedStates(table, LAYERS, SIZE, lambda: live[-1])
    np.testing.assert_array_equal(cold.read(slots), np.stack([some(10), some(11)]))
    live.append(second)
    np.testing.assert_array_equal(cold.read(slots[::-1]), np.stack([some(21), some(20)]))
    table.step_seq[slots[1]] = 5
    with pytest.raises(StateLost, match="stream 8") as lost:
        cold.read(slots)
    assert lost.value.slots is not None
    assert lost.value.slots.tolist() == [slots[1]]
    cold.close()


def test_a_file_that_is_followed_and_removed_as_it_is_opened_is_given_up_for_the_live_one(tmp_path: Path) -> None:
    table = StreamTable(4, 1)
    slots, _ = table.open(["a"], 0, 0)
    table.recording_id[slots], table.step_seq[slots] = 7, 3
    live = tmp_path / "live.instep"
    written = Table(live)
    written.state(7, 3, some(1))
    written.database.close()
    answers = [tmp_path / "removed.instep", live]
    cold = RecordedStates(table, LAYERS, SIZE, lambda: answers.pop(0))
    np.testing.assert_array_equal(cold.read(slots), np.stack([some(1)]))
    answers = [tmp_path / "removed.instep"] * 2
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        cold.read(slots)
    assert answers == []
    cold.close()
