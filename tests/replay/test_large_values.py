"""Frames and states that are finite, but too large for float32 to compute with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import load_model, make_model
from instep.models.network import PortableNetwork
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from instep.recording.writer import RecordingWriter
from tests.support.recordings import NO_BITS, Recorded, make_gru, record_gru, record_model, served_step
from tests.support.scribe import Scribe
from tests.support.verifying import forge, verdicts, verify

LARGEST = float(np.finfo(np.float32).max)
HUGE = 1e39  # frames of this magnitude are clipped to ±LARGEST, most of them


def record_lively(where: Path, model: Recorded, act: Callable[[Scribe], None]) -> Recorded:
    network = PortableNetwork(load_model(model.folder))
    writer = RecordingWriter.create(where / "b.rec", model.header)
    act(Scribe(writer, served_step(network)))
    writer.close()
    return Recorded(where / "b.rec", model.folder, model.header)


def one_among_huge(scribe: Scribe) -> None:
    """Stream 1 beside fifteen streams of huge frames."""
    for stream in range(1, 17):
        scribe.open(stream)
        scribe.magnitudes[stream] = 1.0 if stream == 1 else HUGE
    for _ in range(12):
        scribe.step(range(1, 17))
    for stream in range(1, 17):
        scribe.close(stream)


def change_outputs(recorded: Recorded, streams: Iterable[int], seq: int, by: float) -> Recorded:
    forger = forge(recorded)
    for stream in streams:
        batch, at = forger.find_frame(stream, seq)
        y = forger.column(batch, "y")
        y[at, 2] += np.float32(by)
        forger.change_batch(batch, y=y)
    return Recorded(forger.path, recorded.folder, recorded.header)


def test_huge_frames_of_other_streams_widen_no_tolerance(tmp_path: Path) -> None:
    model = record_gru(tmp_path, make_gru(3, 4, seed=1), [1], changes=NO_BITS)
    recorded = record_lively(tmp_path, model, one_among_huge)
    assert verify(recorded).verified
    for by in (60.0, 0.001):
        # All are changed, so that all are compared within their bounds, side by side.
        report = verify(change_outputs(recorded, range(1, 17), 7, by))
        assert report.streams[0].verdict == "mismatch"
        assert len(report.streams[0].problems) == 3
        assert {stream.verdict for stream in report.streams[1:]} <= {"not checked", "within tolerance"}


def of_states(scribe: Scribe) -> None:
    for stream in range(1, 17):
        scribe.open(stream, scribe.random_state() * np.float32(LARGEST))
    for _ in range(12):
        scribe.step(range(1, 17))
    scribe.reset(4, np.full_like(scribe.states[4], LARGEST))
    for _ in range(12):
        scribe.step(range(1, 17))


def of_large_frames(scribe: Scribe) -> None:
    for stream in range(1, 17):
        scribe.open(stream)
        scribe.magnitudes[stream] = 10.0**stream
    for _ in range(30):
        scribe.step(range(1, 17))


@pytest.mark.parametrize("act", [one_among_huge, of_states, of_large_frames])
@pytest.mark.parametrize("network", ["small", "deep", "dense"])
def test_honest_recordings_of_large_values_are_exact(
    tmp_path: Path, network: str, act: Callable[[Scribe], None]
) -> None:
    if network == "dense":
        description = GruDescription(
            features=7,
            before=(DenseLayer(size=9, activation="relu"),),
            gru=GruLayers(hidden_size=8),
            after=(DenseLayer(size=5, activation="tanh"), DenseLayer(size=3)),
        )
        model = record_model(tmp_path, make_model(description, "random", name="dense"), [1])
    else:
        gru = make_gru(*{"small": (3, 4, 1), "deep": (40, 24, 3)}[network])
        model = record_gru(tmp_path, gru, [1])
    report = verify(record_lively(tmp_path, model, act))
    assert verdicts(report) == ["exact"] * 16
    assert report.verified
    assert report.largest("max_error") < 1, "the distance from the reference counts only where it means something"


def test_a_large_value_that_float32_rounds_as_float64_is_still_compared(tmp_path: Path) -> None:
    # Wrong alike: recording and replay leave the gates out, but the frames are of a size that the reference judges.
    model = record_gru(tmp_path, make_gru(3, 4), [1])
    other = load_model(record_gru(tmp_path / "other", make_gru(3, 4, seed=9), [1]).folder)
    network = PortableNetwork(other)
    writer = RecordingWriter.create(tmp_path / "b.rec", model.header)
    scribe = Scribe(writer, served_step(network), magnitude=1e4)
    scribe.open(1)
    for _ in range(10):
        scribe.step([1])
    writer.close()
    report = verify(Recorded(tmp_path / "b.rec", model.folder, model.header))
    assert verdicts(report) == ["mismatch"]
    assert any("float64 reference" in problem for problem in report.streams[0].problems)


@pytest.mark.parametrize("has_bits", [False, True])
def test_where_neither_bits_nor_the_reference_decide_a_stream_is_not_checked(tmp_path: Path, has_bits: bool) -> None:
    model = record_gru(tmp_path, make_gru(3, 4), [1], changes={} if has_bits else NO_BITS)
    recorded = record_lively(tmp_path, model, one_among_huge)
    report = verify(change_outputs(recorded, [5], 7, 60.0))
    wrong = report.streams[4]
    assert (wrong.verdict, wrong.lossy_from) == ("mismatch" if has_bits else "not checked", 7)
    assert (report.verified, report.mismatches) == (False, int(has_bits))
    assert verify(recorded).verified
