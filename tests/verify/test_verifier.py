from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.models.folder import load_model, make_model
from instep.models.recurrent.description import ACTIVATIONS, DenseLayer, GruDescription, GruLayers
from instep.models.recurrent.network import RecurrentNetwork
from instep.recording.errors import NoSuchStream, RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import BatchGroup
from instep.verify.checkers import CheckLimits
from instep.verify.replay import replay_stepped, replay_whole
from instep.verify.report import CannotVerify
from tests.support.forger import Forger
from tests.support.recordings import (
    Recorded,
    make_gru,
    record,
    record_gru,
    record_model,
    served_step,
)
from tests.support.verifying import verdicts, verify

LENGTHS = [12, 0, 30, 1, 7, 30, 3]


pytestmark = pytest.mark.usefixtures("exact_machine")


@pytest.mark.parametrize(
    ("features", "hidden", "layers", "bias"), [(3, 4, 1, True), (5, 16, 2, False), (1, 2, 3, True), (40, 128, 1, True)]
)
def test_honest_recordings_are_exact(tmp_path: Path, features: int, hidden: int, layers: int, bias: bool) -> None:
    gru = make_gru(features, hidden, layers, bias)
    report = verify(record_gru(tmp_path, gru, LENGTHS, initial=[1, 2, 4], leave_open=[5]))
    assert report.verdict == "exact"
    assert verdicts(report) == ["exact", "empty", *["exact"] * 5]
    assert [stream.frames for stream in report.streams] == LENGTHS
    assert report.notes == ()
    assert 0 < report.max_error < 1e-5
    elements = sum(LENGTHS) * hidden
    states = 5 * layers * hidden  # of the closed streams that have frames
    assert report.elements == {"stepped": elements + states, "whole sequence": elements}
    assert {stream.max_ulp for stream in report.streams} == {0}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_layers_are_exact_as_served(tmp_path: Path, activation: Any) -> None:
    description = GruDescription(
        features=5,
        before=(DenseLayer(size=7, activation=activation),),
        gru=GruLayers(hidden_size=9, num_layers=2),
        after=(DenseLayer(size=6, activation=activation), DenseLayer(size=3, bias=False)),
    )
    model = make_model(description, "random", name="dense")
    report = verify(record_model(tmp_path, model, LENGTHS, initial=[0]))
    assert verdicts(report) == ["exact", "empty", *["exact"] * 5]
    assert 0 < report.max_error < 1e-5


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-20, 1e20, 3e37])
def test_frames_of_any_finite_magnitude(tmp_path: Path, magnitude: float) -> None:
    assert verify(record_gru(tmp_path, make_gru(5, 16), LENGTHS, magnitude=magnitude)).verdict == "exact"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_forged_frames_of_any_value_are_mismatches(tmp_path: Path, value: float) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS)
    for column in ("x", "y"):
        forger = Forger(recorded.path, tmp_path / f"{column}.rec")
        batch, at = forger.find_frame(3, 8)
        values = forger.column(batch, column)
        values[at] = value
        forger.change_batch(batch, **{column: values})
        report = verify(Recorded(forger.path, recorded.folder, recorded.header))
        assert [stream.stream for stream in report.streams if stream.verdict == "mismatch"] == [3]
        # Only stepping can say that outputs are not those of an input that is too large for float32.
        assert len(report.streams[2].problems) == (3 if column == "y" else 1)
        json.dumps(report.as_json(), allow_nan=False)


def test_memory_is_bounded_by_working_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(layers=2), [50, 49, 20, 20, 20, 3], initial=[0, 2])
    whole = verify(recorded)
    spans: list[int] = []

    def counted(network: RecurrentNetwork, buckets: tuple[int, ...], x: Any, h: Any) -> Any:
        spans.append(x.shape[0] * x.shape[1])
        return replay_whole(network, buckets, x, h)

    monkeypatch.setattr("instep.verify.checkers.replay_whole", counted)
    verify(recorded)
    assert max(spans) > 100
    spans.clear()
    pieces = verify(recorded, limits=CheckLimits(call_bytes=100 * 8 * 12))
    assert len(spans) > 5
    assert max(spans) <= 100
    assert verdicts(pieces) == verdicts(whole) == ["exact"] * 6
    assert pieces.max_error == whole.max_error
    assert pieces.elements == whole.elements


def test_a_recording_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(), [50, 49, 20, 20, 20, 3])
    read: list[int] = []
    groups = RecordingReader.whole_groups

    def counted(*arguments: Any) -> Iterator[BatchGroup]:
        for group in groups(*arguments):
            read.extend(group.positions)
            yield group

    monkeypatch.setattr(RecordingReader, "whole_groups", counted)
    assert verify(recorded).verdict == "exact"
    assert set(Counter(read).values()) == {1}


@pytest.mark.parametrize(
    ("wanted", "streams"),
    [(["stream-3"], [3]), (["4"], [4]), (["6", "stream-2", "stream-6"], [2, 6]), ([], [1, 2, 3, 4, 5, 6, 7])],
)
def test_some_streams_only(tmp_path: Path, wanted: list[str], streams: list[int]) -> None:
    report = verify(record_gru(tmp_path, make_gru(), LENGTHS), *wanted)
    assert [stream.stream for stream in report.streams] == streams
    assert report.verdict == "exact"


def test_nothing_recorded_is_not_a_pass(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), [0, 0])
    with pytest.raises(CannotVerify, match=r"holds no frames: nothing was recorded"):
        verify(recorded)
    with pytest.raises(CannotVerify, match=r"holds no frames: nothing was recorded"):
        verify(recorded, "stream-1")


def test_a_stream_without_frames_alone_is_not_a_pass(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS)
    with pytest.raises(CannotVerify, match="stream 'stream-2' has no frames with"):
        verify(recorded, "stream-2")
    with pytest.raises(CannotVerify, match="none of the 2 streams has frames with"):
        verify(recorded, "stream-2", "2")


def test_one_of_the_wanted_that_is_not_there_is_not_a_pass(tmp_path: Path) -> None:
    with pytest.raises(NoSuchStream, match="no stream 'stream-33'"):
        verify(record_gru(tmp_path, make_gru(), LENGTHS), "stream-3", "stream-33")


def test_a_recording_still_being_written_is_checked_up_to_its_last_commit(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), [3])
    live = tmp_path / "live.rec"
    network = RecurrentNetwork(load_model(recorded.folder), torch.device("cpu"))
    writer = record(live, recorded.header, served_step(network), [5, 6], leave_open=[0, 1], finish=False)
    report = verify(Recorded(live, recorded.folder, recorded.header))
    assert report.verdict == "exact"
    assert report.frames == 11
    assert not report.finished
    writer.close()
    assert verify(Recorded(live, recorded.folder, recorded.header)).finished


def nudge_output(recorded: Recorded, stream: int, seq: int, ulps: int) -> Recorded:
    forger = Forger(recorded.path, recorded.path.with_name("nudged.rec"))
    batch, at = forger.find_frame(stream, seq)
    y = forger.column(batch, "y")
    y.view(np.int32)[at, 2] += ulps
    forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"exactness": "off"}, "the engine ran with exactness off, which promises no bits"),
        ({"exactness": "tolerance"}, "the engine ran with exactness tolerance, which promises no bits"),
        ({"numerics": {"torch": "0.1", "threads": "1"}}, "this machine differs from the one that recorded"),
    ],
)
def test_within_tolerance_where_bits_are_not_promised(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS, changes=changes)
    untouched = verify(recorded)
    assert untouched.verdict == "exact", "equal bits are exact whatever was promised"
    assert untouched.notes[0].startswith(why)
    near = verify(nudge_output(recorded, 3, 8, ulps=2))
    assert near.verdict == "within tolerance"
    assert verdicts(near).count("within tolerance") == 1
    bad = near.streams[2]
    assert bad.divergence is not None
    assert (bad.divergence.frame, bad.divergence.element, bad.divergence.ulp, bad.max_ulp) == (8, 2, 2, 2)
    assert bad.problems == ()
    far = verify(nudge_output(recorded, 3, 8, ulps=20_000))
    assert verdicts(far).count("mismatch") == 1
    assert len(far.streams[2].problems) == 3, "all three ways see it"


def test_one_ulp_is_a_mismatch_where_bits_are_promised(tmp_path: Path) -> None:
    report = verify(nudge_output(record_gru(tmp_path, make_gru(), LENGTHS), 3, 8, ulps=1))
    assert verdicts(report) == ["exact", "empty", "mismatch", *["exact"] * 4]
    stream = report.streams[2]
    assert [problem.split(":")[0] for problem in stream.problems] == ["frame 8, element 2"] * 2
    assert stream.divergence is not None
    assert (stream.divergence.checker, stream.divergence.ulp) == ("stepped", 1)


def test_each_way_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS)

    def off_by_one_bit(run: Any) -> Any:
        def wrong(*arguments: Any) -> Any:
            y, h = run(*arguments)
            y[2, 0].view(np.int32)[1] += 1
            return y, h

        return wrong

    ways: list[tuple[Any, str]] = [(replay_stepped, "stepped"), (replay_whole, "whole sequence")]
    for run, way in ways:
        with monkeypatch.context() as patch:
            patch.setattr(f"instep.verify.checkers.{run.__name__}", off_by_one_bit(run))
            report = verify(recorded)
        wrong = [stream for stream in report.streams if stream.verdict == "mismatch"]
        assert wrong
        assert all(len(stream.problems) == 1 for stream in wrong)
        assert all(f", {way} " in stream.problems[0] for stream in wrong)


def test_the_reference_notices_when_server_and_replay_are_wrong_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The network swaps two gates: what it streams is what it replays, bit for bit, but it is not the model.
    gru, swapped = make_gru(3, 4), make_gru(3, 4)
    with torch.no_grad():
        for parameter in swapped.parameters():
            reset, update, new = parameter.chunk(3)
            parameter.copy_(torch.cat([update, reset, new]))
    recorded = record_gru(tmp_path, gru, [1])
    other = load_model(record_gru(tmp_path / "other", swapped, [1]).folder)
    wrong = RecurrentNetwork(other, torch.device("cpu"))
    record(tmp_path / "b.rec", recorded.header, served_step(wrong), LENGTHS)
    monkeypatch.setattr(RecurrentNetwork, "bind", wrong.bind)
    monkeypatch.setattr(RecurrentNetwork, "sequence", wrong.sequence)
    report = verify(Recorded(tmp_path / "b.rec", recorded.folder, recorded.header))
    assert verdicts(report) == ["mismatch", "empty", *["mismatch"] * 5]
    for stream in report.streams:
        assert all("float64 reference" in problem for problem in stream.problems)


def test_final_states_are_compared(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(layers=2), LENGTHS)
    for number, problems in ((3, 1), (2, 1)):
        forger = Forger(recorded.path, tmp_path / "forged.rec")
        closing = next(row for row in forger.rows("closings") if row["stream"] == number)
        state = np.frombuffer(closing["final_state"], np.float32).copy()
        state.view(np.int32)[5] ^= 1
        forger.change("closings", closing["position"], final_state=state.tobytes())
        report = verify(Recorded(forger.path, recorded.folder, recorded.header))
        assert [stream.stream for stream in report.streams if stream.verdict == "mismatch"] == [number]
        stream = report.streams[number - 1]
        assert len(stream.problems) == problems
        assert "final state" in stream.problems[0]


def test_a_final_state_on_which_server_and_replay_agree_is_held_against_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Recording and replay hold the same wrong bits of the state and all outputs are right: only the truth can tell.
    recorded = record_gru(tmp_path, make_gru(layers=2), LENGTHS)
    forger = Forger(recorded.path, tmp_path / "forged.rec")
    closing = next(row for row in forger.rows("closings") if row["stream"] == 5)
    right = np.frombuffer(closing["final_state"], np.float32)
    wrong = right.copy()
    wrong[2] += 1e-4
    forger.change("closings", closing["position"], final_state=wrong.tobytes())

    def wrong_alike(*arguments: Any) -> Any:
        y, states = replay_stepped(*arguments)
        for state in states.view(np.float32):
            if np.array_equal(state, right):
                state[:] = wrong
        return y, states

    monkeypatch.setattr("instep.verify.checkers.replay_stepped", wrong_alike)
    report = verify(Recorded(forger.path, recorded.folder, recorded.header))
    assert verdicts(report) == ["exact", "empty", "exact", "exact", "mismatch", "exact", "exact"]
    stream = report.streams[4]
    (problem,) = stream.problems
    assert problem.startswith("final state before frame 7, element 2: recorded")
    assert "float64 reference" in problem
    assert stream.divergence is not None
    assert stream.divergence.replayed == pytest.approx(right[2], abs=1e-5)
    assert stream.max_error == pytest.approx(1e-4, rel=0.05)


def test_a_final_state_that_is_not_known_is_not_compared(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS)
    forger = Forger(recorded.path, tmp_path / "forged.rec")
    forger.change("closings", forger.rows("closings")[0]["position"], final_state=None)
    assert verify(Recorded(forger.path, recorded.folder, recorded.header)).verdict == "exact"


def test_threads_of_the_process_are_given_back(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), [4])
    torch.set_num_threads(2)
    try:
        assert verify(recorded).verdict == "exact"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_forged_width_that_does_not_fit_the_batches_is_damage(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(3, 4), LENGTHS)
    forger = Forger(recorded.path, tmp_path / "forged.rec")
    forger.change_header("features", "5")
    with pytest.raises(RecordingError, match=r"holds \d+ bytes where \d+ belong"):
        verify(Recorded(forger.path, recorded.folder, recorded.header))
