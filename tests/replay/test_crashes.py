"""Recordings that begin in the middle of streams, reset them, and span crashes."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from instep.models.folder import load_model
from instep.models.network import PortableNetwork
from instep.recording.errors import DamagedRecording
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from instep.replay.report import CannotVerify, Report
from tests.support import verifying
from tests.support.batches import batches_of
from tests.support.forger import Forger
from tests.support.recordings import Recorded, make_gru, record_gru, served_step
from tests.support.scribe import Scribe

GRU = make_gru(3, 8, layers=2)


@pytest.fixture
def model(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path / "model", GRU, [1])


@pytest.fixture
def scribe(tmp_path: Path, model: Recorded) -> Scribe:
    network = PortableNetwork(load_model(model.folder))
    return Scribe(RecordingWriter.create(tmp_path / "a.rec", model.header), served_step(network))


def verify(path: Path, model: Recorded, *wanted: str) -> Report:
    return verifying.verify(model, *wanted, path=path)


def kill(scribe: Scribe, model: Recorded) -> None:
    """The engine dies and another one goes on with the same states."""
    scribe.writer.commit()
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(scribe.writer.path, model.header)


def begin(scribe: Scribe) -> None:
    """Three streams, a failed step and another state."""
    scribe.open(1)
    scribe.open(2, scribe.random_state(), first_seq=1000)
    scribe.open(3)
    for _ in range(4):
        scribe.step([3, 1, 2])
    scribe.step([1, 3], "failed")
    scribe.reset(3, scribe.random_state())


def lively(scribe: Scribe, model: Recorded) -> None:
    """Six streams through two crashes."""
    begin(scribe)
    scribe.reset(2)
    scribe.step([2, 3])
    scribe.step([1, 2], "unanswered")
    scribe.step([3], "unanswered")
    kill(scribe, model)
    scribe.open(4, first_seq=7)
    for _ in range(3):
        scribe.step([4, 1, 3, 2])
    scribe.reset(1)
    scribe.reset(1, scribe.random_state())
    scribe.step([1])
    scribe.reset(4, scribe.random_state())
    scribe.close(4)
    scribe.open(5)
    scribe.step([5], "unanswered")
    kill(scribe, model)
    scribe.open(6, scribe.random_state(), first_seq=3)
    scribe.step([6, 2])
    for stream in (1, 2, 3, 6):
        scribe.close(stream)
    scribe.writer.close()


def test_it_is_exact_from_end_to_end(scribe: Scribe, model: Recorded) -> None:
    lively(scribe, model)
    report = verify(scribe.writer.path, model)
    assert [stream.problems for stream in report.streams] == [[]] * 6
    assert [stream.verdict for stream in report.streams] == ["exact"] * 4 + ["empty", "exact"]
    # All that was applied is either compared or said not to be.
    compared = {1: 4 + 3 + 1, 2: 5 + 3 + 1, 3: 5 + 3, 4: 3, 5: 0, 6: 1}
    assert {stream.stream: stream.frames for stream in report.streams} == compared
    assert [stream.not_compared for stream in report.streams] == [1, 1, 1, 0, 1, 0]
    assert report.frames == sum(compared.values())
    assert report.not_compared == 4
    assert report.finished
    states = 4 * 16  # of the streams that were closed after frames
    assert report.elements["stepped"] == report.frames * 8 + states


def test_the_outputs_are_those_of_nn_gru(scribe: Scribe, model: Recorded) -> None:
    # The frames of stream 1 up to its reset, crash and lost outputs included, in one call that knows none of it.
    lively(scribe, model)
    x = np.stack([scribe.x[1][seq] for seq in range(8)])
    with torch.inference_mode():
        y, _ = GRU(torch.from_numpy(np.repeat(x[:, None], 8, axis=1)))
    with RecordingReader(scribe.writer.path) as reader:
        for batch in batches_of(reader):
            for at in np.flatnonzero((batch.streams == 1) & (batch.seqs < 8)).tolist():
                if batch.y is not None:
                    assert batch.y[at] == pytest.approx(y[int(batch.seqs[at]), 0].numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ("stream", "seq", "problem"),
    [(2, 1001, "frame 1001, element 2"), (2, 1007, "frame 1007, element 2"), (1, 9, "frame 9, element 2")],
)
def test_a_flipped_bit_is_found_by_its_seq(
    scribe: Scribe, model: Recorded, tmp_path: Path, stream: int, seq: int, problem: str
) -> None:
    lively(scribe, model)
    forger = Forger(scribe.writer.path, tmp_path / "b.rec")
    if seq == 9:
        seq = 8  # there is no frame 9 in it: the state after the last reset is what is off
        reset = [row for row in forger.rows("events") if row["kind"] == "reset" and row["stream"] == 1][-1]
        state = np.frombuffer(reset["state"], np.float32).copy()
        state[10] += 0.25
        forger.change("events", reset["position"], state=state.tobytes())
        problem = "frame 8, element 0"
    else:
        batch, at = forger.find_frame(stream, seq)
        y = forger.column(batch, "y")
        y.view(np.uint32)[at, 2] ^= 1
        forger.change_batch(batch, y=y)
    report = verify(forger.path, model)
    wrong = [each for each in report.streams if each.verdict == "mismatch"]
    assert [each.stream for each in wrong] == [stream]
    assert wrong[0].problems[0].startswith(problem)


def swap_outputs(forger: Forger) -> None:
    one, other = forger.rows("outputs")[:2]
    forger.change("outputs", one["position"], y=other["y"])
    forger.change("outputs", other["position"], y=one["y"])


def drop_outputs(forger: Forger) -> None:
    forger.remove("outputs", forger.rows("outputs")[1]["position"])


def point_outputs_elsewhere(forger: Forger) -> None:
    one, other = forger.rows("outputs")[:2]
    forger.change("outputs", one["position"], batch=other["batch"])
    forger.change("outputs", other["position"], batch=one["batch"])


def forget_a_reset(forger: Forger) -> None:
    reset = next(row for row in forger.rows("events") if row["kind"] == "reset")
    forger.change("events", reset["position"], kind="note")


def reset_elsewhere(forger: Forger) -> None:
    reset = next(row for row in forger.rows("events") if row["kind"] == "reset")
    forger.change("events", reset["position"], seq=reset["seq"] - 1)


def fail_what_was_applied(forger: Forger) -> None:
    failed = next(row for row in forger.rows("events") if row["kind"] == "failed")
    forger.change("events", failed["position"], kind="note")


def open_at_another_seq(forger: Forger) -> None:
    forger.change("openings", forger.rows("openings")[1]["position"], first_seq=0)


@pytest.mark.parametrize(
    ("tamper", "stream"),
    [
        (swap_outputs, 1),
        (drop_outputs, None),
        (point_outputs_elsewhere, None),
        (forget_a_reset, 3),
        (reset_elsewhere, 3),
        (fail_what_was_applied, None),
        (open_at_another_seq, 2),
    ],
)
def test_tampering_is_a_mismatch_of_the_stream_or_damage(
    scribe: Scribe, model: Recorded, tmp_path: Path, tamper: Callable[[Forger], None], stream: int | None
) -> None:
    begin(scribe)
    scribe.step([2, 3, 1])
    for each in (1, 2, 3):
        scribe.close(each)
    scribe.writer.close()
    forger = Forger(scribe.writer.path, tmp_path / "b.rec")
    tamper(forger)
    if stream is None:
        with pytest.raises(DamagedRecording):
            verify(forger.path, model)
        return
    found = [each.stream for each in verify(forger.path, model).streams if each.verdict == "mismatch"]
    assert found[:1] == [stream]


def test_a_recording_that_has_lost_commits_is_not_a_pass(scribe: Scribe, model: Recorded, tmp_path: Path) -> None:
    begin(scribe)
    for _ in range(20):
        scribe.step([2, 3, 1])
        scribe.writer.commit()
    path, copy = scribe.writer.path, tmp_path / "b.rec"
    shutil.copyfile(path, copy)
    wal = bytearray(Path(f"{path}-wal").read_bytes())
    scribe.writer.abandon()
    console = Console(file=io.StringIO(), width=250)
    for damage, status in ((0, 0), (1, 2)):
        wal[len(wal) * 2 // 3] ^= damage
        Path(f"{copy}-wal").write_bytes(wal)
        Path(f"{copy}-shm").unlink(missing_ok=True)
        assert run(copy, model_folder=model.folder, streams=[], json=False, console=console) == status


def test_a_recording_of_which_no_output_was_recorded_is_not_a_pass(scribe: Scribe, model: Recorded) -> None:
    scribe.open(1)
    scribe.open(2)
    scribe.step([1], "unanswered")
    scribe.writer.close()
    for wanted in ([], ["1"]):
        with pytest.raises(CannotVerify):
            verify(scribe.writer.path, model, *wanted)


def test_a_final_state_after_a_reset_without_frames(scribe: Scribe, model: Recorded, tmp_path: Path) -> None:
    scribe.open(1)
    scribe.step([1])
    scribe.reset(1, scribe.random_state())
    scribe.close(1)
    scribe.writer.close()
    assert verify(scribe.writer.path, model).verdict == "exact"
    forger = Forger(scribe.writer.path, tmp_path / "b.rec")
    closing = forger.rows("closings")[0]
    forger.change("closings", closing["position"], final_state=bytes(len(closing["final_state"])))
    (stream,) = verify(forger.path, model).streams
    assert stream.verdict == "mismatch"
    assert stream.problems[0].startswith("final state before frame 1, element 0:")
