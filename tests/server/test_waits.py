"""How much may wait before nobody is asked for more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from instep.server.waits import MOST_WAITING, Waits

from instep.core.streams import StreamTable


@pytest.mark.parametrize("waits_for", ["answers", "ends"])
def test_only_so_much_waits_for_frames_and_for_streams_that_close(waits_for: str) -> None:
    table = StreamTable(max_streams=2, max_owners=1)
    slots, _ = table.open(["s"], 0, 0)
    worker: Any = None
    waits, done = Waits(table, worker), list[int]()

    def wait(number: int) -> None:
        (waits.when_answered if waits_for == "answers" else waits.when_ended)(slots, lambda: done.append(number))

    def end() -> None:
        table.pending[slots] = 0
        table.closing[slots] = False
        waits.answered()
        waits.ended()

    table.pending[slots] = 1
    table.closing[slots] = True
    for number in range(MOST_WAITING):
        assert waits.has_room
        wait(number)
    assert not waits.has_room
    assert not done
    end()
    np.testing.assert_array_equal(done, np.arange(MOST_WAITING))
    assert waits.has_room
