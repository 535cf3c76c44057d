"""That this machine is certified only where a bit differs, and that nothing else depends on whether it was."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.models.certify import certify
from instep.models.folder import load_model
from instep.recording.frames import FrameStore
from instep.recording.reader import RecordingReader
from instep.verify import check, conditions, verifier, ways
from instep.verify.check import ChunkCheck
from instep.verify.comparison import Comparison
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.ways import Task
from tests.support.forger import Forger
from tests.support.recordings import Recorded, make_amplifying_gru, make_gru, record_gru

LENGTHS = [12, 0, 30, 1, 7, 30, 3]
"""Those of streams 1, 3, 5 and 6 are one chunk, those of 4 and 7 another."""


def report_of(
    recorded: Recorded,
    on_progress: verifier.Progress = lambda stage, share: None,
) -> dict[str, Any]:
    with RecordingReader(recorded.path) as reader:
        report = verifier.verify(reader, load_model(recorded.folder), [], on_progress)
    as_json: dict[str, Any] = json.loads(json.dumps(report.as_json()))
    del as_json["seconds"]
    return as_json


def as_it_is(recorded: Recorded) -> Recorded:
    return recorded


def with_another_output(recorded: Recorded, stream: int = 3, seq: int = 8) -> Recorded:
    """One unit in the last place off."""
    forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
    batch, at = forger.find_frame(stream, seq)
    y = forger.column(batch, "y")
    y.view(np.int32)[at, 2] += 1
    forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


def with_another_output_in_the_last_chunk(recorded: Recorded) -> Recorded:
    return with_another_output(recorded, 7, 1)


def with_another_final_state(recorded: Recorded) -> Recorded:
    """One unit in the last place off; only stepping compares it."""
    forger = Forger(recorded.path, recorded.path.with_name("forged.rec"))
    closing = next(row for row in forger.rows("closings") if row["stream"] == 3)
    state = np.frombuffer(closing["final_state"], np.int32).copy()
    state[2] += 1
    forger.change("closings", closing["position"], final_state=state.tobytes())
    return Recorded(forger.path, recorded.folder, recorded.header)


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
    ("forge", "times"),
    [
        (as_it_is, 0),
        (with_another_output, 1),
        (with_another_output_in_the_last_chunk, 1),
        (with_another_final_state, 1),
    ],
)
def test_this_machine_is_certified_where_a_bit_differs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certified: list[int],
    forge: Callable[[Recorded], Recorded],
    times: int,
) -> None:
    recorded = forge(record_gru(tmp_path, make_gru(3, 16), LENGTHS))
    report = report_of(recorded)
    assert report["verdict"] == ("mismatch" if times else "exact")
    assert len(certified) == times
    monkeypatch.setattr(verifier, "presume_conditions", conditions.find_conditions)
    assert report_of(recorded) == report
    assert len(certified) == times + 1


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_not_where_float32_alone_is_far_from_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified: list[int], threads: int
) -> None:
    monkeypatch.setattr(verifier, "_threads", lambda: threads)
    monkeypatch.setattr(ways, "PART_FRAMES", 8)  # a frame a part
    found = report_of(record_gru(tmp_path, make_amplifying_gru(), [200, 150, 120]))
    assert found["verdict"] == "exact"
    assert not certified


@pytest.mark.parametrize(
    ("way", "replay", "claims", "notes"),
    [
        (
            "replay_stepped",
            replay_stepped,
            {"exactness": "tolerance"},
            ["on this machine, a frame's bits depend on the batch size"],
        ),
        (
            "replay_whole",
            replay_whole,
            {"whole_sequence": False},
            ["on this machine, a whole sequence in one call has other bits than stepping it"],
        ),
    ],
)
def test_a_machine_that_computes_other_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    replay: Callable[..., Any],
    claims: dict[str, Any],
    notes: list[str],
) -> None:
    def otherwise(*arguments: Any) -> Any:
        y, h = replay(*arguments)
        return np.nextafter(y, np.float32(2)), h

    monkeypatch.setattr(ways, way, otherwise)
    monkeypatch.setattr(conditions, "certify", lambda *arguments: replace(certify(*arguments), **claims))
    report = report_of(record_gru(tmp_path, make_gru(), LENGTHS))
    assert report["verdict"] == "within tolerance"
    assert report["notes"] == notes


def test_where_a_bit_differs_the_other_ways_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_truth, stop = ways.check_truth, ChunkCheck.stop
    stopped = threading.Condition()
    ended: list[bool] = []

    def stopping(self: ChunkCheck) -> None:
        stop(self)
        with stopped:
            stopped.notify_all()

    def as_long_as_it_may(task: Task) -> Comparison:
        if task.ways.conditions.is_presumed:
            with stopped:
                ended.append(stopped.wait_for(task.is_over, 20))
        return check_truth(task)

    monkeypatch.setattr(ChunkCheck, "stop", stopping)
    monkeypatch.setattr(check, "check_truth", as_long_as_it_may)
    recorded = with_another_output(record_gru(tmp_path, make_gru(), LENGTHS))
    assert report_of(recorded)["verdict"] == "mismatch"
    assert ended
    assert all(ended)


def test_progress_begins_again_where_the_check_does(tmp_path: Path) -> None:
    shares: list[float] = []
    recorded = with_another_output_in_the_last_chunk(record_gru(tmp_path, make_gru(), LENGTHS))
    report_of(recorded, on_progress=lambda stage, share: shares.append(share) if stage == "replaying" else None)
    first, again = shares[: shares.index(0)], shares[shares.index(0) :]
    assert first == sorted(first)
    assert again == sorted(again)
    assert again[-1] == 1


def test_nothing_of_a_refuted_check_is_held_on_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[weakref.ref[FrameStore]] = []
    begin = FrameStore.__init__

    def watched(self: FrameStore, *arguments: Any) -> None:
        stores.append(weakref.ref(self))
        begin(self, *arguments)

    monkeypatch.setattr(FrameStore, "__init__", watched)
    recorded = with_another_output(record_gru(tmp_path, make_gru(), LENGTHS))
    gc.collect()
    gc.disable()
    try:
        assert report_of(recorded)["verdict"] == "mismatch"
        assert [store() for store in stores] == [None]
    finally:
        gc.enable()
