"""Streams that are settled without the bound are judged as with it, and nothing goes on after an interrupt."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from instep.core.typing import U8
from instep.models.network import PortableNetwork
from instep.replay import verifier
from instep.replay.bound import FLOOR, ErrorBound
from instep.replay.checkers import Block, CheckLimits, Distances, check_reference
from tests.support import verifying
from tests.support.recordings import NO_BITS, Recorded, make_amplifying_gru, make_gru, record_gru
from tests.support.states import rows_of
from tests.support.verifying import forge, stepping

LENGTHS = [12, 0, 30, 1, 7, 30, 3]


def nudged(recorded: Recorded, by: float, seq: int = 8) -> Recorded:
    forger = forge(recorded)
    batch, at = forger.find_frame(3, seq)
    y = forger.column(batch, "y")
    y[at, 2] += np.float32(by)
    forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


def report_of(recorded: Recorded) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(verifying.verify(recorded).as_json()))
    del found["seconds"]
    return found


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streams side by side in every part for which the bound was computed."""
    rows: list[int] = []
    outputs = ErrorBound.outputs

    def counted(bound: ErrorBound, x: Any, *arguments: Any) -> Any:
        rows.append(x.shape[1])
        return outputs(bound, x, *arguments)

    monkeypatch.setattr(ErrorBound, "outputs", counted)
    return rows


@pytest.mark.parametrize("changes", [{}, NO_BITS])
@pytest.mark.parametrize("by", [0, 1e-6])
def test_streams_near_the_truth_are_settled_without_the_bound(
    tmp_path: Path, bounded: list[int], changes: dict[str, Any], by: float
) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS, changes=changes)
    found = report_of(nudged(recorded, by))
    assert bool(bounded) == (by > 0 and not changes), "only where bits differ that must be equal"
    assert found["verdict"] == ("exact" if not by else "within tolerance" if changes else "mismatch")


@pytest.mark.parametrize(("y_off", "h_off"), [(FLOOR, 0), (0, FLOOR), (10 * FLOOR, 0), (0, 10 * FLOOR)])
def test_a_replay_that_is_off_by_more_than_both_sides_may_be_is_compared_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: list[int], y_off: float, h_off: float
) -> None:
    recorded = record_gru(tmp_path, make_gru(), [1, 1, 1], changes=NO_BITS)

    def off(y: npt.NDArray[np.float32], states: U8) -> tuple[npt.NDArray[np.float32], U8]:
        return y + np.float32(y_off), rows_of(states.view(np.float32) + np.float32(h_off))

    stepping(monkeypatch, off)
    report_of(recorded)
    assert bool(bounded) == (max(y_off, h_off) > 2 * FLOOR)


def test_torch_that_is_off_by_more_than_both_sides_may_be_is_compared_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: list[int]
) -> None:
    recorded = record_gru(tmp_path, make_gru(), [1, 1, 1])
    right: Any = PortableNetwork.sequence

    def off(*arguments: Any) -> tuple[npt.NDArray[np.float32], U8]:
        y, states = right(*arguments)
        return y + np.float32(10 * FLOOR), states

    monkeypatch.setattr(PortableNetwork, "sequence", off)
    assert (report_of(recorded)["verdict"], bool(bounded)) == ("mismatch", True)


def test_an_output_within_the_bound_alone_is_within_tolerance(tmp_path: Path, bounded: list[int]) -> None:
    recorded = record_gru(tmp_path, make_amplifying_gru(), [5, 5, 200], changes=NO_BITS)
    found = report_of(nudged(recorded, 1000 * FLOOR, seq=199))
    assert found["verdict"] == "within tolerance"
    assert bounded


@pytest.mark.parametrize("changes", [{}, NO_BITS])
@pytest.mark.parametrize("by", [0, 1.5 * FLOOR, 1.0, np.nan], ids=lambda by: f"{by:.0e}")
@pytest.mark.parametrize("grows", [False, True], ids=["forgets", "amplifies"])
def test_the_report_is_that_of_the_bound_whatever_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], by: float, grows: bool
) -> None:
    gru = make_amplifying_gru() if grows else make_gru()
    recorded = nudged(record_gru(tmp_path, gru, LENGTHS, changes=changes), by)

    def found() -> dict[str, Any]:
        report = report_of(recorded)
        del report["max_distance"]
        for stream in report["streams"]:  # torch's bits depend on the streams that are computed side by side
            del stream["max_distance"]
            stream["problems"] = [problem.split(": ")[0] for problem in stream["problems"]]
        return report

    before = found()

    def beyond(block: Block) -> Distances:
        measured = check_reference(block)
        measured.settled[:] = False
        return measured

    monkeypatch.setattr(verifier, "check_reference", beyond)
    assert found() == before


def test_an_interrupt_ends_whatever_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(), [20] * 40)
    finished = threading.Event()
    calls: list[int] = []

    def told(share: float) -> None:
        finished.set()
        raise KeyboardInterrupt

    class Stopping(threading.Event):
        """Holds the work back until it is stopped, once the first segment is finished."""

        def is_set(self) -> bool:
            if finished.is_set():
                self.wait(20)
            return super().is_set()

    def sequence(*arguments: Any) -> Any:
        calls.append(1)
        return right(*arguments)

    right = PortableNetwork.sequence
    monkeypatch.setattr("instep.replay.verifier.Event", Stopping)
    monkeypatch.setattr(PortableNetwork, "sequence", sequence)
    with pytest.raises(KeyboardInterrupt):
        verifying.verify(recorded, on_progress=told, limits=CheckLimits(call_bytes=8))  # a frame a call
    assert len(calls) <= 40, "each thread ends the call that it is at"
