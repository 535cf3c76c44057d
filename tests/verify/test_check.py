"""That what settles a chunk early finds the same as the bound, and that nothing goes on after an interrupt."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from instep.models.folder import load_model
from instep.recording.reader import RecordingReader
from instep.verify import verifier, ways
from instep.verify.bound import FLOOR, ErrorBound
from instep.verify.check import ChunkCheck
from instep.verify.replay import replay_stepped
from tests.support.forger import Forger
from tests.support.recordings import Recorded, make_amplifying_gru, make_gru, record_gru

LENGTHS = [12, 0, 30, 1, 7, 30, 3]
NO_BITS = {"exactness": "off"}


def nudged(recorded: Recorded, by: float, seq: int = 8) -> Recorded:
    forger = Forger(recorded.path, recorded.path.with_name("nudged.rec"))
    batch, at = forger.find_frame(3, seq)
    y = forger.column(batch, "y")
    y[at, 2] += np.float32(by)
    forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


def report_of(recorded: Recorded) -> dict[str, Any]:
    with RecordingReader(recorded.path) as reader:
        report = verifier.verify(reader, load_model(recorded.folder), [], lambda stage, share: None)
    found: dict[str, Any] = json.loads(json.dumps(report.as_json()))
    del found["seconds"]
    return found


class Rounds:
    """Counts the parts that the reference computes in float32."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = ErrorBound.run

        def counted(bound: ErrorBound, *arguments: Any) -> Any:
            self.count += 1
            return run(bound, *arguments)

        monkeypatch.setattr(ErrorBound, "run", counted)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(monkeypatch)


@pytest.mark.parametrize("changes", [{}, NO_BITS])
@pytest.mark.parametrize("by", [0, 1e-6])
def test_what_is_near_the_truth_is_settled_without_float32(
    tmp_path: Path, rounds: Rounds, changes: dict[str, Any], by: float
) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS, changes=changes)
    found = report_of(nudged(recorded, by))
    assert rounds.count == 0
    assert found["verdict"] == ("exact" if not by else "within tolerance" if changes else "mismatch")


@pytest.mark.parametrize(("y_off", "h_off"), [(FLOOR, 0), (0, FLOOR), (10 * FLOOR, 0), (0, 10 * FLOOR)])
@pytest.mark.parametrize("way", ["replay_stepped", "replay_whole"])
def test_a_replay_that_is_off_by_more_than_both_sides_may_be_is_held_against_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: Rounds, way: str, y_off: float, h_off: float
) -> None:
    recorded = record_gru(tmp_path, make_gru(), [1, 1, 1], changes=NO_BITS)
    replay = getattr(ways, way)

    def off(*arguments: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        y, h = replay(*arguments)
        return y + np.float32(y_off), h + np.float32(h_off)

    monkeypatch.setattr(ways, way, off)
    report_of(recorded)
    compared = y_off > 2 * FLOOR or (h_off > 2 * FLOOR and way == "replay_stepped")  # states are compared where stepped
    assert (rounds.count > 0) == compared


def test_what_is_not_is_held_against_the_bound(tmp_path: Path, rounds: Rounds) -> None:
    found = report_of(record_gru(tmp_path, make_amplifying_gru(), [200, 150]))
    assert found["verdict"] == "exact"
    assert found["max_error"] > 100 * FLOOR
    assert rounds.count > 0


def test_what_is_within_the_bound_alone_is_within_tolerance(tmp_path: Path, rounds: Rounds) -> None:
    recorded = record_gru(tmp_path, make_amplifying_gru(), [5, 5, 200], changes=NO_BITS)
    found = report_of(nudged(recorded, 1000 * FLOOR, seq=199))
    assert found["verdict"] == "within tolerance"
    assert rounds.count > 0


@pytest.mark.parametrize("changes", [{}, NO_BITS])
@pytest.mark.parametrize("by", [0, FLOOR / 2, 1.5 * FLOOR, 3 * FLOOR, 1.0, np.inf, np.nan], ids=lambda by: f"{by:.0e}")
@pytest.mark.parametrize("grows", [False, True], ids=["forgets", "amplifies"])
def test_the_report_is_that_of_the_bound_whatever_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], by: float, grows: bool
) -> None:
    monkeypatch.setattr(ways, "PART_FRAMES", 40)
    recorded = nudged(
        record_gru(tmp_path, make_amplifying_gru() if grows else make_gru(), LENGTHS, changes=changes), by
    )
    found = report_of(recorded)
    begin = ChunkCheck.__init__

    def with_bound(self: ChunkCheck, *arguments: Any, at_least: bool) -> None:
        begin(self, *arguments, at_least=False)

    monkeypatch.setattr(ChunkCheck, "__init__", with_bound)
    assert found == report_of(recorded)


def test_torch_is_set_up_in_every_thread_that_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up, computing = set[str](), set[str]()
    monkeypatch.setattr(verifier, "threads_as_here", lambda: lambda: set_up.add(threading.current_thread().name))

    def step(*arguments: Any) -> Any:
        computing.add(threading.current_thread().name)
        return replay_stepped(*arguments)

    monkeypatch.setattr(ways, "replay_stepped", step)
    assert report_of(record_gru(tmp_path, make_gru(), LENGTHS))["verdict"] == "exact"
    assert computing
    assert computing <= set_up


def test_an_interrupt_ends_what_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(), [20] * 40)
    monkeypatch.setattr(ways, "PART_FRAMES", 8)  # a frame a part
    finished, stopped = threading.Event(), threading.Event()
    stop = ChunkCheck.stop
    parts: list[int] = []

    def told(stage: verifier.Stage, share: float) -> None:
        if stage == "replaying":
            finished.set()
            raise KeyboardInterrupt

    def step(*arguments: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if finished.is_set():
            stopped.wait(20)
            parts.append(1)
        return replay_stepped(*arguments)

    def stopping(self: ChunkCheck) -> None:
        stop(self)
        stopped.set()

    monkeypatch.setattr(ways, "replay_stepped", step)
    monkeypatch.setattr(ChunkCheck, "stop", stopping)
    with RecordingReader(recorded.path) as reader, pytest.raises(KeyboardInterrupt):
        verifier.verify(reader, load_model(recorded.folder), [], told)
    assert len(parts) <= verifier.MOST_AT_ONCE, "each thread ends the part that it is at"
