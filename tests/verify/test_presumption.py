"""That this machine is certified only where a bit differs, and that nothing else depends on whether it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.model.certify import certify
from instep.model.folder import load_model
from instep.recording.reader import RecordingReader
from instep.verify import check, conditions, verifier, ways
from instep.verify.comparison import Comparison
from instep.verify.replay import replay_whole
from instep.verify.ways import Task, Ways
from tests.support.forger import Forger
from tests.support.recordings import Recorded, make_gru, record_gru

LENGTHS = [12, 0, 30, 1, 7, 30, 3]


def report_of(recorded: Recorded, found: dict[str, Ways] | None = None) -> dict[str, Any]:
    with RecordingReader(recorded.path) as reader:
        report = verifier.verify(
            reader, load_model(recorded.folder), None, lambda stage, share: None, found_before=found
        )
    as_json: dict[str, Any] = json.loads(json.dumps(report.as_json()))
    del as_json["seconds"]
    return as_json


def nudged(recorded: Recorded) -> Recorded:
    """With one output one unit in the last place off."""
    forger = Forger(recorded.path, recorded.path.with_name("nudged.rec"))
    batch, at = forger.find_frame(3, 8)
    y = forger.column(batch, "y")
    y.view(np.int32)[at, 2] += 1
    forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


def comes_true(condition: Callable[[], bool], within_s: float = 20) -> bool:
    until = time.monotonic() + within_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def certified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every certification."""
    times: list[int] = []

    def counted(*arguments: Any) -> Any:
        times.append(1)
        return certify(*arguments)

    monkeypatch.setattr(conditions, "certify", counted)
    return times


@pytest.mark.parametrize(
    ("break_it", "times", "verdict"), [(lambda recorded: recorded, 0, "exact"), (nudged, 1, "mismatch")]
)
def test_this_machine_is_certified_where_a_bit_differs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certified: list[int],
    break_it: Callable[[Recorded], Recorded],
    times: int,
    verdict: str,
) -> None:
    recorded = break_it(record_gru(tmp_path, make_gru(3, 16), LENGTHS))
    found: dict[str, Ways] = {}
    report = report_of(recorded, found)
    assert report["verdict"] == verdict
    assert len(certified) == times
    assert [each.conditions.is_presumed for each in found.values()] == [not times]
    report_of(recorded, found)
    assert len(certified) == times, "once for all files of one engine"
    monkeypatch.setattr(verifier, "presume_conditions", conditions.find_conditions)
    assert report_of(recorded) == report
    assert len(certified) == times + 1


def test_a_machine_whose_whole_sequences_have_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def otherwise(*arguments: Any) -> Any:
        y, h = replay_whole(*arguments)
        return np.nextafter(y, np.float32(2)), h

    def honestly(*arguments: Any) -> Any:
        return replace(certify(*arguments), whole_sequence=False)

    monkeypatch.setattr(ways, "replay_whole", otherwise)
    monkeypatch.setattr(conditions, "certify", honestly)
    report = report_of(record_gru(tmp_path, make_gru(), LENGTHS))
    assert report["verdict"] == "within tolerance"
    assert report["notes"] == ["on this machine, a whole sequence in one call has other bits than stepping it"]


def test_where_a_bit_differs_the_other_ways_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_truth = ways.check_truth
    ended: list[bool] = []

    def as_long_as_it_may(task: Task) -> Comparison:
        if task.ways.conditions.is_presumed:
            ended.append(comes_true(task.is_over))
        return check_truth(task)

    monkeypatch.setattr(check, "check_truth", as_long_as_it_may)
    assert report_of(nudged(record_gru(tmp_path, make_gru(), LENGTHS)))["verdict"] == "mismatch"
    assert ended
    assert all(ended)
