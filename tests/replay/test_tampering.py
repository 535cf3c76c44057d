"""A recording of all that happens to streams is exact; tampered with, it is a mismatch of that stream, or damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from instep.models.folder import load_model
from instep.models.network import PortableNetwork
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.schema import TABLES
from instep.recording.writer import RecordingWriter
from instep.replay.recorded_model import recorded_model
from instep.replay.report import CannotVerify, Report
from tests.support import verifying
from tests.support.forger import Forger, key_of
from tests.support.recordings import NO_BITS, Recorded, make_gru, record_gru, served_step
from tests.support.scribe import Scribe
from tests.support.verifying import verdicts

Values: TypeAlias = npt.NDArray[Any]
Tamper: TypeAlias = Callable[[Forger], object]
SIZE, STATE = 8, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record_gru(tmp_path_factory.mktemp("model"), make_gru(3, SIZE, layers=2), [1])


def scribe_on(folder: Path, model: Recorded, **changes: Any) -> Scribe:
    network = PortableNetwork(load_model(model.folder))
    writer = RecordingWriter.create(folder / "a.rec", replace(model.header, **changes))
    return Scribe(writer, served_step(network))


def kill(scribe: Scribe) -> None:
    """The engine dies and another one continues with the same states."""
    scribe.writer.commit()
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(scribe.writer.path, scribe.writer.header)


def live(scribe: Scribe) -> Path:
    """Seven streams through a failed step, resets, a checkpoint and two crashes."""
    scribe.open(1)
    scribe.open(2, scribe.random_state(), first_seq=1000)
    scribe.open(3)
    for _ in range(4):
        scribe.step([3, 1, 2])
    scribe.step([1, 3], "failed")
    scribe.reset(3, scribe.random_state())
    scribe.reset(2)
    through = scribe.step([2, 3])
    scribe.step([1, 2])
    scribe.checkpoint(through, tail=3)
    scribe.step([1, 2], "unanswered")
    scribe.step([3], "unanswered")
    kill(scribe)
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
    kill(scribe)
    scribe.open(6, scribe.random_state(), first_seq=3)
    scribe.open(7, scribe.random_state())
    scribe.step([6, 2])
    for stream in (1, 3, 6):
        scribe.close(stream)
    scribe.writer.close()
    return scribe.writer.path


COMPARED = {1: 9, 2: 10, 3: 8, 4: 3, 5: 0, 6: 1, 7: 0}
"""Frames whose outputs are recorded."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, model: Recorded) -> Recorded:
    path = live(scribe_on(tmp_path_factory.mktemp("recorded"), model))
    return Recorded(path, model.folder, model.header)


def verify(model: Recorded, path: Path) -> Report:
    return verifying.verify(model, path=path)


def test_it_is_exact_from_end_to_end(recorded: Recorded) -> None:
    report = verify(recorded, recorded.path)
    assert verdicts(report) == ["exact"] * 4 + ["empty", "exact", "empty"]
    assert {stream.stream: stream.frames for stream in report.streams} == COMPARED
    assert [stream.not_compared for stream in report.streams] == [1, 1, 1, 0, 1, 0, 0]
    states = 3 + 3  # of the streams that were closed after frames, and in the checkpoint
    assert report.elements["stepped"] == report.frames * SIZE + states * STATE


# ── Tampering ──────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(values: Values) -> None:
    """Another last bit of one value."""
    values.view(np.int32)[5 % len(values)] ^= 1


def in_frame(stream: int, seq: int, column: str, change: Callable[[Values], object] = flip) -> Tamper:
    def tamper(forger: Forger) -> None:
        batch, at = forger.find_frame(stream, seq)
        values = forger.column(batch, column)
        change(values[at])
        forger.change_batch(batch, **{column: values})

    return tamper


def in_row(table: str, column: str, **wanted: object) -> Tamper:
    """Another bit in the first row that has these values."""

    def tamper(forger: Forger) -> None:
        row = next(row for row in forger.rows(table) if row[column] and wanted.items() <= row.items())
        values = np.frombuffer(row[column], np.float32).copy()
        flip(values)
        forger.change(table, row[key_of(table)[0]], **{column: values.tobytes()})

    return tamper


def columns(table: str, number: int = 0, /, **columns: Any) -> Tamper:
    """Other values in a row, counted from 0."""

    def tamper(forger: Forger) -> None:
        forger.change(table, forger.rows(table)[number][key_of(table)[0]], **columns)

    return tamper


def seqs(stream: int, *changes: tuple[int, int]) -> Tamper:
    def tamper(forger: Forger) -> None:
        for seq, becomes in changes:
            batch, at = forger.find_frame(stream, seq)
            values = forger.column(batch, "seqs")
            values[at] = becomes
            forger.change_batch(batch, seqs=values)

    return tamper


def lost(stream: int, seq: int) -> Tamper:
    def tamper(forger: Forger) -> None:
        batch, at = forger.find_frame(stream, seq)
        kept = {name: np.delete(forger.column(batch, name), at, axis=0) for name in ("streams", "seqs", "x", "y")}
        forger.change_batch(batch, **kept)

    return tamper


def both(*tampers: Tamper) -> Tamper:
    return lambda forger: [tamper(forger) for tamper in tampers]


def swap_frames(forger: Forger) -> None:
    # Inputs and outputs together: each is still a pair that the network once made.
    one, at = forger.find_frame(1, 2)
    other, other_at = forger.find_frame(1, 3)
    for column in ("x", "y"):
        values, other_values = forger.column(one, column), forger.column(other, column)
        values[at], other_values[other_at] = other_values[other_at].copy(), values[at].copy()
        forger.change_batch(one, **{column: values})
        forger.change_batch(other, **{column: other_values})


def swap_outputs(column: str) -> Tamper:
    def tamper(forger: Forger) -> None:
        one, other = forger.rows("outputs")[:2]
        forger.change("outputs", one["position"], **{column: other[column]})
        forger.change("outputs", other["position"], **{column: one[column]})

    return tamper


def older_state(forger: Forger) -> None:
    opening = forger.rows("openings")[1]
    forger.change("states", 2, seq=1000, tail_seq=1000, state=opening["initial_state"], tail_x=b"", tail_y=b"")


def without_states(*streams: int) -> Tamper:
    """The counts are right all the same."""

    def tamper(forger: Forger) -> None:
        for stream in streams:
            forger.remove("states", stream)
        (newest,) = forger.rows("newest")
        forger.change("newest", newest["position"], states=3 - len(streams))

    return tamper


def no_checkpoint(forger: Forger) -> None:
    forger.remove("checkpoints", forger.rows("checkpoints")[0]["position"])


def move_checkpoint(forger: Forger) -> None:
    (mark,) = forger.rows("checkpoints")
    forger.move("checkpoints", mark["position"], mark["position"] + 1)


MISMATCHES: dict[str, tuple[Tamper, int, str]] = {
    "an output": (in_frame(2, 1001, "y"), 2, "output 1001"),
    "an output after a crash": (in_frame(2, 1007, "y"), 2, "output 1007"),
    "an input": (in_frame(1, 2, "x", lambda x: np.add(x, 0.25, out=x)), 1, "output 2"),
    "two frames swapped": (swap_frames, 1, "output 2"),
    "outputs swapped": (swap_outputs("y"), 1, "output 0"),
    "seqs swapped": (seqs(1, (2, 1000), (3, 2), (1000, 3)), 1, ""),
    "a frame lost": (lost(1, 2), 1, ""),
    "the first frame lost": (lost(1, 0), 1, ""),
    "the last frame lost": (lost(3, 8), 3, ""),
    "a frame lost, and the others counted again": (
        both(lost(4, 8), seqs(4, (9, 8)), columns("events", 6, seq=9), columns("closings", 0, frames=9)),
        4,
        "output 8",
    ),
    "a state that it was opened with": (in_row("openings", "initial_state", stream=2), 2, "output 1000"),
    "another first frame": (columns("openings", 1, first_seq=0), 2, ""),
    "a state that it was reset to": (in_row("events", "state", stream=1), 1, "final state 10"),
    "a reset forgotten": (columns("events", 1, kind="note"), 3, "output 4"),
    "a reset elsewhere": (columns("events", 1, seq=3), 3, ""),
    "a final state": (in_row("closings", "final_state", stream=1), 1, "final state 10"),
    "a final state after a reset": (in_row("closings", "final_state", stream=4), 4, "final state 10"),
    "a count of frames": (columns("closings", 1, frames=9), 1, ""),
    **{
        f"a state of a checkpoint, {each}": (in_row("states", "state", stream=each), each, "checkpoint")
        for each in (1, 2, 3)
    },
    "an input of a checkpoint": (in_row("states", "tail_x", stream=1), 1, ""),
    "an output of a checkpoint": (in_row("states", "tail_y", stream=2), 2, ""),
    "a state of a checkpoint from later": (
        columns("states", 1, seq=1011, tail_seq=1011, tail_x=b"", tail_y=b""),
        2,
        "checkpoint 1011",
    ),
}
DAMAGE: dict[str, Tamper] = {
    "outputs of another batch": swap_outputs("batch"),
    "a failed batch that was applied": columns("events", 0, kind="note"),
    "a state of a checkpoint gone": without_states(2),
    "a checkpoint gone": both(no_checkpoint, without_states(1, 2, 3)),
    "a checkpoint moved": move_checkpoint,
    "an older state of a checkpoint": older_state,
    "a state of an unknown stream": columns("states", 1, stream=9),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_of_the_stream_and_with_the_wrong_crc_damage(recorded: Recorded, tmp_path: Path, name: str) -> None:
    tamper, stream, place = MISMATCHES[name]
    forger = Forger(recorded.path, tmp_path / "b.rec")
    tamper(forger)
    wrong = [each for each in verify(recorded, forger.path).streams if each.verdict == "mismatch"]
    assert wrong[0].stream == stream
    assert len(wrong) == (3 if name == "outputs swapped" else 1)
    found = wrong[0].divergence
    assert ("" if found is None else f"{found.place} {found.frame}").startswith(place)
    assert bool(place) == (found is not None)
    forger = Forger(recorded.path, tmp_path / "c.rec", fix_crc=False)
    tamper(forger)
    with pytest.raises(DamagedRecording):
        verify(recorded, forger.path)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_even_with_the_right_crc(recorded: Recorded, tmp_path: Path, name: str) -> None:
    forger = Forger(recorded.path, tmp_path / "b.rec")
    DAMAGE[name](forger)
    with pytest.raises(DamagedRecording):
        verify(recorded, forger.path)


def test_no_row_of_any_table_can_go_unnoticed(recorded: Recorded, tmp_path: Path) -> None:
    for table in [*TABLES.keys() - {"trimmed"}, "header"]:
        rows = Forger(recorded.path, tmp_path / "b.rec").rows(table)
        assert rows, table
        for row in rows[:12] + rows[-12:]:
            forger = Forger(recorded.path, tmp_path / "b.rec")
            forger.remove(table, *(row[name] for name in key_of(table)))
            with pytest.raises(RecordingError):
                verify(recorded, forger.path)


@pytest.mark.parametrize("seq", [0, 5])
def test_a_stream_that_got_the_state_of_another(tmp_path: Path, seq: int) -> None:
    # Not forged: this is what an engine would record that mixed up two slots.
    mixed = record_gru(tmp_path, make_gru(3, 8), [12, 30, 25, 30], initial=[2, 3], mix_up=(1, 3, seq))
    [wrong] = [each for each in verify(mixed, mixed.path).streams if each.verdict == "mismatch"]
    assert wrong.divergence is not None
    assert (wrong.stream, wrong.divergence.frame) == (2, seq)


def test_the_weights_of_another_model(recorded: Recorded, tmp_path: Path) -> None:
    folder = record_gru(tmp_path, make_gru(3, SIZE, layers=2, seed=1), [1]).folder
    with pytest.raises(CannotVerify):
        recorded_model(recorded.header, folder)
    other = load_model(folder)
    for fix_crc in (True, False):
        forger = Forger(recorded.path, tmp_path / "forged.rec", fix_crc=fix_crc)
        forger.change_header("model_fingerprint", json.dumps(other.fingerprint))
        if fix_crc:
            report = verifying.verify(recorded, path=forger.path, model=other)
            assert report.mismatches == sum(1 for frames in COMPARED.values() if frames)
        else:
            with pytest.raises(RecordingError):
                verifying.verify(recorded, path=forger.path, model=other)


# ── Checkpoints and crashes ────────────────────────────────────────────────────────────────────────────────────────


def test_where_bits_are_not_required_states_are_compared_within_the_bound(model: Recorded, tmp_path: Path) -> None:
    path = live(scribe_on(tmp_path, model, **NO_BITS))
    for by, verdict in ((1e-7, "within tolerance"), (1e-3, "mismatch")):
        forger = Forger(path, tmp_path / "b.rec")
        state = np.frombuffer(forger.rows("states")[1]["state"], np.float32).copy()
        state[3] += np.float32(by)
        forger.change("states", 2, state=state.tobytes())
        assert verify(model, forger.path).streams[1].verdict == verdict


@pytest.mark.parametrize(("is_after", "verdict"), [(False, "exact"), (True, "mismatch")])
def test_a_checkpoint_at_a_reset_may_hold_the_state_before_it_and_one_after_it_may_not(
    model: Recorded, tmp_path: Path, is_after: bool, verdict: str
) -> None:
    scribe = scribe_on(tmp_path, model)
    scribe.open(1)
    through, before = scribe.step([1]), scribe.states[1]
    scribe.reset(1, scribe.random_state())
    scribe.checkpoint(scribe.writer.position if is_after else through)
    scribe.step([1])
    scribe.writer.close()
    assert verify(model, scribe.writer.path).verdict == "exact"
    forger = Forger(scribe.writer.path, tmp_path / "b.rec")
    forger.change("states", 1, state=before.tobytes())
    assert verify(model, forger.path).verdict == verdict


def test_outputs_that_only_the_checkpoint_holds_are_compared(model: Recorded, tmp_path: Path) -> None:
    scribe = scribe_on(tmp_path, model)
    scribe.open(1)
    scribe.step([1])
    scribe.step([1], "unanswered")
    kill(scribe)
    scribe.checkpoint(scribe.writer.position)
    scribe.step([1])
    scribe.writer.close()
    (stream,) = verify(model, scribe.writer.path).streams
    assert (stream.verdict, stream.frames, stream.not_compared) == ("exact", 3, 0)
    forger = Forger(scribe.writer.path, tmp_path / "b.rec")
    y = np.frombuffer(forger.rows("states")[0]["tail_y"], np.int32).copy()
    y[-3] ^= 1
    forger.change("states", 1, tail_y=y.tobytes())
    (stream,) = verify(model, forger.path).streams
    assert stream.divergence is not None
    assert (stream.verdict, stream.divergence.frame, stream.divergence.element) == ("mismatch", 1, 5)


def test_a_recording_that_has_lost_commits_is_not_a_pass(model: Recorded, tmp_path: Path) -> None:
    scribe = scribe_on(tmp_path, model)
    scribe.open(1)
    for _ in range(20):
        scribe.step([1])
        scribe.writer.commit()
    path, copy = scribe.writer.path, tmp_path / "b.rec"
    shutil.copyfile(path, copy)
    wal = bytearray(Path(f"{path}-wal").read_bytes())
    scribe.writer.abandon()
    for damage in (0, 1):
        wal[len(wal) * 2 // 3] ^= damage
        Path(f"{copy}-wal").write_bytes(wal)
        Path(f"{copy}-shm").unlink(missing_ok=True)
        assert verify(model, copy).verified == (not damage)


def test_a_recording_of_which_no_output_was_recorded_is_not_a_pass(model: Recorded, tmp_path: Path) -> None:
    scribe = scribe_on(tmp_path, model)
    scribe.open(1)
    scribe.step([1], "unanswered")
    scribe.writer.close()
    with pytest.raises(CannotVerify):
        verify(model, scribe.writer.path)
