from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.folder import load_model, make_model
from instep.models.network import DefinitionReference, PortableNetwork
from instep.models.recurrent.description import ACTIVATIONS, DenseLayer, GruDescription, GruLayers
from instep.recording.errors import DamagedRecording
from instep.replay.checkers import CheckLimits
from instep.replay.report import CannotVerify, Coverage, Report
from tests.support.forger import Forger
from tests.support.recordings import (
    NO_BITS,
    Recorded,
    make_gru,
    record,
    record_gru,
    record_model,
    served_step,
)
from tests.support.verifying import stepping, verdicts, verify

LENGTHS = [12, 0, 30, 1, 7, 30, 3]


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
    assert 0 < report.largest("max_error") < 1e-5
    elements = sum(LENGTHS) * hidden
    states = 5 * layers * hidden  # of the closed streams that have frames
    computed = {"stepped": elements + states, "definition": elements + 6 * layers * hidden, "torch": elements}
    assert report.elements == {**computed, "float64 reference": elements + states}
    assert report.definition == Coverage(6, sum(LENGTHS))
    assert (report.largest("max_difference"), 0 < report.largest("max_distance") < 1e-5) == (0, True)


def test_layers_around_are_exact_as_served(tmp_path: Path) -> None:
    description = GruDescription(
        features=5,
        before=tuple(DenseLayer(size=7, activation=activation) for activation in ACTIVATIONS),
        gru=GruLayers(hidden_size=9, num_layers=2),
        after=(DenseLayer(size=6, activation="softmax"), DenseLayer(size=3, bias=False)),
    )
    model = make_model(description, "random", name="dense")
    report = verify(record_model(tmp_path, model, LENGTHS, initial=[0]))
    assert verdicts(report) == ["exact", "empty", *["exact"] * 5]
    assert 0 < report.largest("max_error") < 1e-5


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 3e37])
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
        # Only bits can say that outputs are not those of an input that is too large for float32.
        assert len(report.streams[2].problems) == (4 if column == "y" else 2)
        json.dumps(report.as_json(), allow_nan=False)


def test_memory_is_bounded_by_working_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(layers=2), [50, 49, 20, 20, 20, 3], initial=[0, 2])
    whole = verify(recorded)
    spans: list[int] = []
    sequence = PortableNetwork.sequence

    def counted(network: PortableNetwork, x: F32, states: U8) -> Any:
        spans.append(x.shape[0] * x.shape[1])
        return sequence(network, x, states)

    monkeypatch.setattr(PortableNetwork, "sequence", counted)
    verify(recorded)
    assert max(spans) > 100
    spans.clear()
    pieces = verify(recorded, limits=CheckLimits(call_bytes=100 * 8 * 12))
    assert len(spans) > 2
    assert max(spans) <= 100
    assert verdicts(pieces) == verdicts(whole) == ["exact"] * 6
    assert pieces.largest("max_error") == whole.largest("max_error")
    assert pieces.elements == whole.elements


@pytest.mark.parametrize(
    ("wanted", "streams"),
    [(["stream-3"], [3]), (["4"], [4]), (["6", "stream-2", "stream-6"], [2, 6]), ([], [1, 2, 3, 4, 5, 6, 7])],
)
def test_some_streams_only(tmp_path: Path, wanted: list[str], streams: list[int]) -> None:
    report = verify(record_gru(tmp_path, make_gru(), LENGTHS), *wanted)
    assert [stream.stream for stream in report.streams] == streams
    assert report.verdict == "exact"


def test_a_stream_without_frames_alone_is_not_a_pass(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS)
    with pytest.raises(CannotVerify):
        verify(recorded, "stream-2")
    with pytest.raises(CannotVerify):
        verify(recorded, "stream-2", "2")


def nudge_output(recorded: Recorded, stream: int, seq: int, digits: int) -> Recorded:
    """So many units in the last place off."""
    forger = Forger(recorded.path, recorded.path.with_name("nudged.rec"))
    batch, at = forger.find_frame(stream, seq)
    y = forger.column(batch, "y")
    y.view(np.int32)[at, 2] += digits
    forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


def test_within_tolerance_where_bits_are_not_promised(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS, changes=NO_BITS)
    untouched = verify(recorded)
    assert untouched.verdict == "exact", "equal bits are exact whatever was promised"
    assert untouched.notes == ("the engine computed with torch on cuda:0, which promises no bits",)
    assert (untouched.definition, untouched.elements["definition"]) == (Coverage(), 0)
    near = verify(nudge_output(recorded, 3, 8, digits=2))
    assert near.verdict == "within tolerance"
    assert verdicts(near).count("within tolerance") == 1
    bad = near.streams[2]
    assert (bad.divergence, 0 < bad.max_difference < 1e-6, bad.problems) == (None, True, [])
    far = verify(nudge_output(recorded, 3, 8, digits=20_000))
    assert verdicts(far).count("mismatch") == 1
    assert len(far.streams[2].problems) == 3, "all three ways see it"


def problems_of(report: Report) -> dict[int, list[str]]:
    """By number, the checkers that found the first wrong value of each stream."""
    found: dict[int, list[str]] = {}
    for stream in report.streams:
        for problem in stream.problems:
            (checker,) = re.findall(r"recorded \S+, (.*) \S+$", problem)
            found.setdefault(stream.stream, []).append(checker)
    return found


def test_one_wrong_bit_is_found_by_the_compiled_step_and_by_the_definition(tmp_path: Path) -> None:
    report = verify(nudge_output(record_gru(tmp_path, make_gru(), LENGTHS), 3, 8, digits=1))
    assert verdicts(report) == ["exact", "empty", "mismatch", *["exact"] * 4]
    assert problems_of(report) == {3: ["stepped", "definition"]}
    stream = report.streams[2]
    assert {problem.split(":")[0] for problem in stream.problems} == {"frame 8, element 2"}
    assert stream.divergence is not None
    assert stream.divergence.checker == "stepped"


def serving(patch: pytest.MonkeyPatch, change: Callable[[F32, U8], tuple[F32, U8]]) -> None:
    """From now on, the compiled step gives something else, in a server and in the verifier."""
    step = PortableNetwork.step
    patch.setattr(PortableNetwork, "step", lambda network, x, states: change(*step(network, x, states)))
    stepping(patch, change)


def test_the_definition_alone_finds_a_wrong_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiled step is wrong: what it has served is what it computes again, and near enough to torch and float64.
    def off_by_one_bit(y: F32, after: U8) -> tuple[F32, U8]:
        y.view(np.int32)[:, 1] ^= 1
        return y, after

    serving(monkeypatch, off_by_one_bit)
    report = verify(record_gru(tmp_path, make_gru(), LENGTHS))
    assert verdicts(report) == ["mismatch", "empty", *["mismatch"] * 5]
    assert problems_of(report) == {number: ["definition"] for number in (1, 3, 4, 5, 6, 7)}
    divergence = report.streams[0].divergence
    assert divergence is not None
    assert (divergence.checker, divergence.frame, divergence.element) == ("definition", 0, 1)


def test_a_state_that_is_wrong_in_the_compiled_step_is_found_by_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one_bit(y: F32, after: U8) -> tuple[F32, U8]:
        after[:, 8] ^= 1
        return y, after

    serving(monkeypatch, off_by_one_bit)
    report = verify(record_gru(tmp_path, make_gru(), [1, 1]))
    assert problems_of(report) == {1: ["definition"], 2: ["definition"]}
    assert report.streams[0].problems[0].startswith("final state before frame 1, element 2:")


def test_each_way_counts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record_gru(tmp_path, make_gru(), LENGTHS)
    right: Any = PortableNetwork.sequence

    def off_by_one_bit(y: F32, after: U8) -> tuple[F32, U8]:
        y.view(np.int32)[0, 1] += 1
        return y, after

    def far_off(*arguments: Any) -> Any:
        y, h = right(*arguments)
        y[0, 0, 1] += 0.01
        return y, h

    with monkeypatch.context() as patch:
        stepping(patch, off_by_one_bit)
        assert {tuple(ways) for ways in problems_of(verify(recorded)).values()} == {("stepped",)}
    monkeypatch.setattr(PortableNetwork, "sequence", far_off)
    assert {tuple(ways) for ways in problems_of(verify(recorded)).values()} == {("torch",)}


def test_torch_and_the_reference_notice_when_server_and_replay_are_wrong_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The network swaps two gates: what it streams is what it replays, bit for bit, but it is not the model.
    gru, swapped = make_gru(3, 4), make_gru(3, 4)
    with torch.no_grad():
        for parameter in swapped.parameters():
            reset, update, new = parameter.chunk(3)
            parameter.copy_(torch.cat([update, reset, new]))
    recorded = record_gru(tmp_path, gru, [1])
    wrong = PortableNetwork(load_model(record_gru(tmp_path / "other", swapped, [1]).folder))
    record(tmp_path / "b.rec", recorded.header, served_step(wrong), LENGTHS)
    monkeypatch.setattr(PortableNetwork, "bind", lambda network, *tables: wrong._step.bind(*tables))
    monkeypatch.setattr(
        PortableNetwork, "definition", lambda network: DefinitionReference(wrong.form, wrong._tensors, wrong.state)
    )
    report = verify(Recorded(tmp_path / "b.rec", recorded.folder, recorded.header))
    assert verdicts(report) == ["mismatch", "empty", *["mismatch"] * 5]
    assert {tuple(checkers) for checkers in problems_of(report).values()} == {("torch", "float64 reference")}


@pytest.mark.parametrize("lengths", [[40] * 40, [1000]], ids=["many streams", "one stream"])
def test_the_definition_takes_as_long_as_stepping_and_the_report_says_how_far_it_came(
    tmp_path: Path, lengths: list[int]
) -> None:
    recorded = record_gru(tmp_path, make_gru(), lengths, most=40)
    short, long = (verify(recorded, limits=CheckLimits(definition_s=seconds)) for seconds in (0.0, 60.0))
    total = sum(lengths)
    assert long.definition == Coverage(len(lengths), total)
    assert long.by_definition == "every frame"
    streams, frames = short.definition
    assert 0 < frames < total
    assert 0 < streams <= len(lengths)
    assert f"definition: {frames:,} of {total:,} frames in {streams} of {len(lengths)} stream" in short.checkers()
    assert short.verified


def test_final_states_are_compared(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(layers=2), LENGTHS)
    for number, problems in ((3, 2), (2, 1)):
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

    def wrong_alike(y: Any, states: Any) -> Any:
        for state in states["h"].reshape(-1, 8) if isinstance(states, dict) else states.view(np.float32):
            if np.array_equal(state, right):
                state[:] = wrong
        return y, states

    run = DefinitionReference.run
    stepping(monkeypatch, wrong_alike)
    monkeypatch.setattr(DefinitionReference, "run", lambda *arguments: wrong_alike(*run(*arguments)))
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
    forger.change("closings", forger.rows("closings")[0]["position"], final_state=None, reason="state_lost")
    assert verify(Recorded(forger.path, recorded.folder, recorded.header)).verdict == "exact"
    forger.change("closings", forger.rows("closings")[0]["position"], reason="closed")
    with pytest.raises(DamagedRecording):
        verify(Recorded(forger.path, recorded.folder, recorded.header))


def test_a_forged_width_that_does_not_fit_the_batches_is_damage(tmp_path: Path) -> None:
    recorded = record_gru(tmp_path, make_gru(3, 4), LENGTHS)
    forger = Forger(recorded.path, tmp_path / "forged.rec")
    forger.change_header("features", "5")
    with pytest.raises(DamagedRecording):
        verify(Recorded(forger.path, recorded.folder, recorded.header))
