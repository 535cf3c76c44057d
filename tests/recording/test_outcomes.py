"""Batches and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from instep.recording.errors import DamagedRecording
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from tests.support.batches import batches_of
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.scribe import Scribe

GRU = make_gru(3, 4, layers=2)
HEADER = make_header(gru_description(GRU))


@pytest.fixture
def scribe(tmp_path: Path) -> Scribe:
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", HEADER), gru_step(GRU))
    scribe.open(1)
    scribe.open(2)
    return scribe


def answered(path: Path, first: int = 1, last: int | None = None) -> list[tuple[int, bool]]:
    """Position of each batch, and whether it has outputs."""
    with RecordingReader(path) as reader:
        reader.check_positions()
        return [(batch.position, batch.y is not None) for batch in batches_of(reader, first, last)]


def test_outputs_may_come_after_the_next_inputs(scribe: Scribe) -> None:
    first = scribe.step([1], "unanswered")
    second = scribe.step([2], "unanswered")
    for batch, stream in ((first, 1), (second, 2)):
        scribe.writer.add_outputs(1, batch, scribe.y[stream][0][None])
    scribe.writer.commit()
    with RecordingReader(scribe.writer.path) as reader:
        for found, stream in zip(batches_of(reader), (1, 2), strict=True):
            assert found.y is not None
            assert found.y.tobytes() == scribe.y[stream][0].tobytes()
    assert answered(scribe.writer.path, second) == [(second, True)]
    assert answered(scribe.writer.path, 1, first) == [(first, True)]
    scribe.writer.close()


def test_failed_batches_are_left_out(scribe: Scribe) -> None:
    first = scribe.step([1, 2])
    scribe.step([2], "failed")
    last = scribe.step([2, 1])
    scribe.step([2], "failed")
    scribe.writer.close()
    assert answered(scribe.writer.path) == [(first, True), (last, True)]


@pytest.mark.parametrize("later", ["nothing", "another process", "another process twice", "outputs of the recovery"])
def test_batches_under_way_when_the_engine_was_killed(scribe: Scribe, later: str) -> None:
    path = scribe.writer.path
    first = scribe.step([1, 2])
    killed = [scribe.step([1], "unanswered"), scribe.step([2], "unanswered")]
    scribe.writer.commit()
    scribe.writer.abandon()
    expected = [(first, True), *((position, later == "outputs of the recovery") for position in killed)]
    if later != "nothing":
        if later == "another process twice":
            RecordingWriter.resume(path, HEADER).close()
        scribe.writer = RecordingWriter.resume(path, HEADER)
        if later == "outputs of the recovery":
            scribe.writer.add_outputs(1, killed[0], scribe.y[1][1][None])
            scribe.writer.add_outputs(1, killed[1], scribe.y[2][1][None])
        expected.append((scribe.step([2, 1]), True))
        scribe.writer.close()
    assert answered(path) == expected
    assert answered(path, killed[1]) == expected[2:]


@pytest.mark.parametrize("outcome", ["computed", "failed"])
def test_a_batch_without_outcome_before_one_with_is_damage(scribe: Scribe, outcome: str) -> None:
    scribe.step([1, 2])
    lost = scribe.step([1], "unanswered")
    scribe.step([2], outcome)  # type: ignore[arg-type]
    scribe.writer.close()
    with pytest.raises(DamagedRecording, match=rf"position {lost}\b"):
        answered(scribe.writer.path)


def test_after_a_restart_too(scribe: Scribe) -> None:
    scribe.step([1, 2], "unanswered")
    scribe.writer.commit()
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(scribe.writer.path, HEADER)
    lost = scribe.step([1], "unanswered")
    scribe.step([2])
    scribe.writer.close()
    with pytest.raises(DamagedRecording, match=rf"position {lost}\b"):
        answered(scribe.writer.path)


def swap(forger: Forger) -> None:
    one, other = forger.rows("outputs")[:2]
    forger.change("outputs", one["position"], batch=other["batch"])
    forger.change("outputs", other["position"], batch=one["batch"])


def give_to_a_failed_batch(forger: Forger) -> None:
    failed = next(row for row in forger.rows("events") if row["kind"] == "failed")
    forger.change("outputs", forger.rows("outputs")[-1]["position"], batch=failed["seq"])


def give_to_no_batch(forger: Forger) -> None:
    forger.change("outputs", forger.rows("outputs")[-1]["position"], batch=10_000)


def give_twice(forger: Forger) -> None:
    one, other = forger.rows("outputs")[:2]
    forger.change("outputs", other["position"], batch=one["batch"])


def give_to_an_earlier_position(forger: Forger) -> None:
    forger.change("outputs", forger.rows("outputs")[0]["position"], batch=1)


@pytest.mark.parametrize(
    "tamper", [swap, give_to_a_failed_batch, give_to_no_batch, give_twice, give_to_an_earlier_position]
)
def test_outputs_of_another_batch_are_damage(scribe: Scribe, tamper: Callable[[Forger], None]) -> None:
    for outcome in ("computed", "computed", "failed", "computed"):
        scribe.step([1], outcome)
    scribe.writer.close()
    forger = Forger(scribe.writer.path, scribe.writer.path.with_name("b.rec"))
    tamper(forger)
    with pytest.raises(DamagedRecording):
        answered(forger.path)
