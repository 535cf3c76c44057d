"""New recordings made from old ones: ranges that were cut out, and what repair saves."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from instep.models.folder import load_model
from instep.recording import inspection
from instep.recording.commands import cut_file, parse_time
from instep.recording.database import DatabaseLimits
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.inspection import Inspection, inspect, look_over, recordings_in, when
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.repair import repair
from instep.recording.schema import HISTORY
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from instep.replay.recovery import look_through
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record_gru
from tests.support.replaying import replay
from tests.support.scribe import F32, Scribe
from tests.support.stretches import stretches_of
from tests.support.written import cut_out, write_recording

GRU = make_gru(3, 4)
DEEP = make_gru(3, 4, layers=2)
TICK_NS = 10**9
"""Of the scribe's clock, between rows: times are told to the second."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return record_gru(tmp_path / "made", GRU, [1]).folder


@pytest.fixture
def scribe(tmp_path: Path, model: Path) -> Scribe:
    """A recording, still open, with a checkpoint about every hundred rows; streams come and go and are reset."""
    header = make_header(gru_description(GRU), model_fingerprint=load_model(model).fingerprint)
    # Nothing is old enough to be trimmed, and an eighth of that is 100 ticks.
    writer = RecordingWriter.create(tmp_path / "a.rec", header, Retention(keep_ns=800 * TICK_NS))
    scribe = Scribe(writer, gru_step(GRU), tick_ns=TICK_NS)
    for stream in (1, 2, 3):
        scribe.open(stream)
    for number in range(120):
        position = scribe.step(sorted(scribe.states))
        if number % 10 == 4:
            scribe.reset(max(scribe.states), scribe.random_state())
        if number % 40 == 20:
            scribe.open(10 + number, scribe.random_state())
            scribe.close(min(scribe.states))
        scribe.writer.commit()
        if scribe.writer.wants_checkpoint(scribe.now):
            scribe.checkpoint(position)
            scribe.writer.commit()
    return scribe


def checkpoints(path: Path) -> list[int]:
    with RecordingReader(path) as reader:
        return [each.position for each in reader.checkpoints()]


def verified(path: Path, model: Path) -> bool:
    console = Console(file=io.StringIO(), width=200)
    return run([path], model, [], console) == 0


def frames(path: Path) -> dict[tuple[int, int], bytes]:
    """The inputs and outputs of each frame, by stream and seq."""
    found = {}
    for stretch in stretches_of(path):
        for seq, (x, y) in enumerate(zip_longest(stretch.x, stretch.y, fillvalue=np.zeros(0)), stretch.first_seq):
            found[stretch.stream, seq] = x.tobytes() + y.tobytes()
    return found


def trim_all(scribe: Scribe) -> None:
    while scribe.writer.trim(scribe.now + 500 * TICK_NS):
        pass


# ── Cutting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_range_begins_at_the_checkpoint_before_it_and_is_verified(
    scribe: Scribe, tmp_path: Path, model: Path
) -> None:
    path, out = scribe.writer.path, tmp_path / "out.rec"
    points = checkpoints(path)
    found = cut_out(path, out, points[1] + 7, points[2] + 40)
    assert (found.first_position, found.last_position) == (points[1] + 1, points[2] + 40)
    assert (look_over(out)["first_position"], inspect(out).frames) == (points[1] + 1, found.frames)
    assert verified(out, model)
    everything, part = frames(path), frames(out)
    assert 30 < len(part) < len(everything) / 2
    assert part.items() <= everything.items()
    look_through(out)  # an engine can continue it


def test_without_bounds_it_is_everything(scribe: Scribe, tmp_path: Path, model: Path) -> None:
    found = cut_out(scribe.writer.path, tmp_path / "out.rec")
    assert (found.first_position, found.last_position) == (1, scribe.writer.position)
    assert frames(tmp_path / "out.rec") == frames(scribe.writer.path)
    assert verified(tmp_path / "out.rec", model)


def test_a_cut_of_a_cut_and_of_what_was_trimmed(scribe: Scribe, tmp_path: Path, model: Path) -> None:
    path, points = scribe.writer.path, checkpoints(scribe.writer.path)
    cut_out(path, tmp_path / "one.rec", points[0])
    cut_out(tmp_path / "one.rec", tmp_path / "two.rec", last=points[-1])
    assert verified(tmp_path / "two.rec", model)
    trim_all(scribe)
    left = checkpoints(path)
    assert cut_out(path, tmp_path / "three.rec", left[1]).first_position == left[1] + 1
    assert verified(tmp_path / "three.rec", model)


def test_times_as_typed(scribe: Scribe, tmp_path: Path) -> None:
    path, out, console = scribe.writer.path, tmp_path / "out.rec", Console(file=io.StringIO(), width=300)
    with RecordingReader(path) as reader:
        times = {row[0]: row[1] for table in HISTORY for row in reader.rows(table)}
        point = reader.checkpoints()[1]
    end = max(position for position in times if times[position] <= point.time_ns + 40 * TICK_NS)
    texts = [when(time_ns).replace(" UTC", "+00:00") for time_ns in (point.time_ns + TICK_NS, times[end])]
    cut_file(path, out, texts[0], texts[1], console)
    with RecordingReader(out) as reader:
        assert reader.first_position == point.position + 1
        rows = [row for table in ("batches", "outputs") for row in reader.rows(table)]
    assert max(row[1] for row in rows) <= times[end]
    assert parse_time("2026-11-26T19:30:05+01:00") == parse_time("2026-11-26T18:30:05") == 1_795_717_805 * 10**9
    for text in ("-3", "yesterday", "", "1200"):
        with pytest.raises(RecordingError):
            cut_file(path, tmp_path / "none.rec", text, None, console)
    with pytest.raises(RecordingError):
        cut_file(path, tmp_path / "none.rec", None, "1999-01-01", console)


def test_a_time_before_the_clock_went_back(tmp_path: Path, model: Path) -> None:
    header = make_header(gru_description(GRU), model_fingerprint=load_model(model).fingerprint)
    writer = RecordingWriter.create(tmp_path / "a.rec", header, Retention(keep_bytes=1))
    scribe = Scribe(writer, gru_step(GRU), tick_ns=TICK_NS)
    scribe.open(1)

    def record(frames: int) -> None:
        position = [scribe.step([1]) for _ in range(frames)][-1]
        scribe.checkpoint(position)
        scribe.writer.commit()

    record(5)
    early, start = scribe.writer.position, scribe.now
    record(10)
    late = scribe.now
    scribe.set_back(late - start)  # to the time of the first checkpoint
    record(2)
    record(1)
    with RecordingReader(tmp_path / "a.rec") as reader:
        after = reader.first_at(late - 3 * TICK_NS) - 1
        assert reader.first_at(late + TICK_NS) == reader.last_position + 1
    found = cut_out(tmp_path / "a.rec", tmp_path / "out.rec", after)
    assert found.first_position <= early
    assert frames(tmp_path / "out.rec").keys() == {(1, seq) for seq in range(5, 18)}
    assert verified(tmp_path / "out.rec", model)


def test_what_cannot_be_cut(scribe: Scribe, tmp_path: Path) -> None:
    path, out = scribe.writer.path, tmp_path / "out.rec"
    for after, last in ((0, 0), (3, 2), (scribe.writer.position, None)):
        with pytest.raises(RecordingError):
            cut_out(path, out, after, last)
    with pytest.raises(RecordingError):
        cut_out(path, path)
    trim_all(scribe)
    with RecordingReader(path) as reader:
        checkpoint = reader.checkpoints()[0]
    with pytest.raises(RecordingError):
        cut_out(path, out, last=checkpoint.completed)
    assert not out.exists()


def test_a_damaged_recording_is_not_cut(scribe: Scribe, tmp_path: Path) -> None:
    """Also where the damage is seen only in the range that was cut out."""
    scribe.writer.close()
    changes: list[tuple[dict[str, Any], bool]] = [({"time_ns": 7}, False), ({"size": 0}, True)]
    for columns, fix_crc in changes:
        forger = Forger(scribe.writer.path, tmp_path / "b.rec", fix_crc=fix_crc)
        forger.change("batches", forger.rows("batches")[9]["position"], **columns)
        with pytest.raises(DamagedRecording) as caught:
            cut_out(forger.path, tmp_path / "out.rec")
        assert (caught.value.path, (tmp_path / "out.rec").exists()) == (forger.path, False)


# ── New files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_recording(tmp_path).path


def while_looked_through(monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], object]) -> None:
    """Let something happen to the new file when it is complete and has no name yet."""

    def look_through(path: Path) -> Inspection:
        happens(path)
        return inspect(path)

    monkeypatch.setattr(inspection, "inspect", look_through)


def test_a_new_file_gets_its_name_once_it_is_complete_and_one_command_makes_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out.rec", list[Path]()

    def look(part: Path) -> None:
        seen.append(part)
        assert not out.exists()
        assert recordings_in(tmp_path) == [source], "one that is not complete is none yet"
        with pytest.raises(RecordingError):
            cut_out(source, out)

    while_looked_through(monkeypatch, look)
    assert cut_out(source, out).frames
    assert len(seen) == 1
    assert set(tmp_path.iterdir()) == {source, out}


def test_a_file_that_is_made_meanwhile_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[Callable[[Path], object]] = [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
    ]
    for at, make in enumerate(kinds):
        out = tmp_path / f"{at}.rec"
        while_looked_through(monkeypatch, lambda _: make(out))  # noqa: B023 - called in this round
        before = set(tmp_path.iterdir())
        with pytest.raises(RecordingError):
            cut_out(source, out)
        assert set(tmp_path.iterdir()) == before | {out}
        assert out.is_symlink() or out.read_text() == "mine"


def test_a_failure_leaves_nothing_of_a_database(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        Path(f"{path}-journal").touch()  # SQLite leaves it where it cannot roll back
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    while_looked_through(monkeypatch, fail)
    with pytest.raises(RecordingError):
        cut_out(source, tmp_path / "out.rec")
    assert set(tmp_path.iterdir()) == {source}


# ── Repair ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def deep(tmp_path: Path) -> Scribe:
    """An empty recording that keeps all of its checkpoints."""
    header = make_header(gru_description(DEEP))
    return Scribe(RecordingWriter.create(tmp_path / "a.rec", header, Retention(keep_bytes=1)), gru_step(DEEP))


def damage(recording: Path, table: str, row: int) -> Path:
    """A copy whose row, counted from 0, does not match its CRC."""
    forger = Forger(recording, recording.with_name("damaged.rec"), fix_crc=False)
    forger.change(table, forger.rows(table)[row]["position"], time_ns=7)
    return forger.path


def continued(path: Path) -> dict[int, F32]:
    """The states of the open streams after a restart, by their numbers."""
    with Recovered(path) as recovered:
        return replay(recovered, gru_step(DEEP)).states


def history(path: Path) -> list[Any]:
    """Rows of all kinds, by position."""
    with RecordingReader(path) as reader:
        return sorted((row for table in HISTORY for row in reader.rows(table)), key=lambda row: int(row[0]))


def test_repair_keeps_the_history_before_the_damage_and_its_states_are_computed(deep: Scribe, tmp_path: Path) -> None:
    deep.open(1)
    deep.open(2, deep.random_state())
    for _ in range(3):
        deep.step([1, 2])
    deep.checkpoint(deep.step([2]))
    deep.step([2, 1])
    state = deep.states[2]
    deep.step([1])
    deep.writer.close()
    damaged = damage(tmp_path / "a.rec", "batches", 5)
    before = damaged.read_bytes()
    found = repair(damaged, tmp_path / "saved.rec")
    assert (damaged.read_bytes(), found.frames, found.streams) == (before, 9, 2)
    assert "positions 14 to" in found.left_out
    rows = history(tmp_path / "saved.rec")
    assert rows[: found.positions] == history(tmp_path / "a.rec")[: found.positions]
    assert [row[4] for row in rows[found.positions :]] == ["checkpoint", "repaired"]
    assert continued(tmp_path / "saved.rec")[2].tobytes() == state.tobytes()
    RecordingWriter.resume(tmp_path / "saved.rec", deep.writer.header).close()
    inspect(tmp_path / "saved.rec")


@pytest.mark.parametrize("how", ["opened", "reset"])
def test_states_that_clients_have_given_are_saved(deep: Scribe, tmp_path: Path, how: str) -> None:
    given = deep.random_state()
    deep.open(1, given if how == "opened" else None)
    deep.open(2)
    if how == "reset":
        deep.reset(1, given)
    deep.close(2)
    deep.writer.close()
    found = repair(damage(tmp_path / "a.rec", "closings", 0), tmp_path / "saved.rec")
    assert (found.frames, found.streams) == (0, 2)
    assert continued(tmp_path / "saved.rec")[1].tobytes() == given.tobytes()


@pytest.mark.parametrize("has_changed", [True, False])
def test_states_that_the_history_begins_with_are_saved(deep: Scribe, tmp_path: Path, has_changed: bool) -> None:
    deep.open(1, None if has_changed else deep.random_state())
    deep.open(2)
    deep.checkpoint(deep.step([1, 2] if has_changed else [2]))
    deep.close(2)
    deep.checkpoint(deep.writer.position)
    state = deep.states[1]
    deep.checkpoint(deep.step([1]))
    deep.writer.close()
    begin = checkpoints(tmp_path / "a.rec")[1]
    cut_out(tmp_path / "a.rec", tmp_path / "cut.rec", begin)
    with RecordingReader(tmp_path / "cut.rec") as reader:
        assert (reader.first_position, reader.state_rows) == (begin + 1, int(has_changed))
    found = repair(damage(tmp_path / "cut.rec", "batches", 0), tmp_path / "saved.rec")
    assert (found.frames, found.streams) == (0, 1)
    assert continued(tmp_path / "saved.rec")[1].tobytes() == state.tobytes()


@pytest.mark.parametrize("keep", [0.7, 0.98])
def test_repair_of_a_file_that_was_cut_off(tmp_path: Path, keep: float) -> None:
    header, small = make_header(gru_description(DEEP)), DatabaseLimits(page_bytes=1024)
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", header, limits=small), gru_step(DEEP))
    scribe.open(1)
    for _ in range(300):
        scribe.step([1])
    scribe.writer.close()
    rows, content = history(tmp_path / "a.rec"), (tmp_path / "a.rec").read_bytes()
    (tmp_path / "b.rec").write_bytes(content[: int(len(content) * keep)])
    found = repair(tmp_path / "b.rec", tmp_path / "c.rec")
    assert found.positions > 10
    assert history(tmp_path / "c.rec")[: found.positions] == rows[: found.positions]


def test_what_cannot_be_saved(deep: Scribe, tmp_path: Path) -> None:
    deep.open(1)
    deep.step([1])
    deep.writer.close()
    whole = tmp_path / "a.rec"
    Forger(whole, tmp_path / "header.rec", fix_crc=False).change_header("model_name", '"x"')
    (tmp_path / "text.rec").write_text("frames" * 100)
    Forger(whole, tmp_path / "forged.rec").change("batches", 2, size=0)
    with sqlite3.connect(whole) as database:
        pages = dict(database.execute("SELECT name, rootpage FROM sqlite_master"))
    database.close()
    content = bytearray(whole.read_bytes())
    for table in ("openings", "batches", "outputs"):
        content[(pages[table] - 1) * 16_384 : pages[table] * 16_384] = bytes(16_384)
    (tmp_path / "empty.rec").write_bytes(content)
    before = set(tmp_path.iterdir())
    for name in ("missing", "header", "text", "forged", "empty"):
        with pytest.raises(RecordingError):
            repair(tmp_path / f"{name}.rec", tmp_path / "new.rec")
    assert set(tmp_path.iterdir()) == before
