"""Up to where a history is deleted: to a checkpoint, by its age and by the bytes before it."""

from __future__ import annotations

import pytest

from instep.recording.records import Checkpoint, Trimmed
from instep.recording.trim import Retention

POINTS = [Checkpoint(position=at * 10, time_ns=at * 100, bytes=at * 1000) for at in range(1, 6)]


@pytest.mark.parametrize(
    ("retention", "now_ns", "file_bytes", "position"),
    [
        (Retention(), 10**9, 10**9, 0),
        (Retention(keep_ns=250), 400, 0, 10),
        (Retention(keep_ns=250), 349, 0, 0),
        (Retention(keep_ns=250), 750, 0, 50),
        (Retention(keep_bytes=4000), 0, 4000, 0),
        (Retention(keep_bytes=4000), 0, 4001, 10),
        (Retention(keep_bytes=4000), 0, 6500, 30),
        (Retention(keep_bytes=4000), 0, 99_000, 50),
        (Retention(keep_bytes=4000, keep_ns=250), 600, 5500, 30),
    ],
)
def test_due(retention: Retention, now_ns: int, file_bytes: int, position: int) -> None:
    assert retention.due(POINTS, Trimmed(), now_ns, file_bytes) == position


def test_nothing_is_due_twice() -> None:
    retention = Retention(keep_ns=1)
    assert retention.due(POINTS, Trimmed(position=50), 10**9, 0) == 0
    assert retention.due(POINTS[1:], Trimmed(position=20), 10**9, 0) == 50
