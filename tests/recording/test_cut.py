"""A range of a recording, archived as a recording of its own."""

from __future__ import annotations

import io
import json
import os
import re
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.cli import app
from instep.models.folder import load_model
from instep.recording import inspection
from instep.recording.copies import Bound, cut, repair
from instep.recording.errors import RecordingError
from instep.recording.inspection import Inspection, inspect, when
from instep.recording.reader import RecordingReader
from instep.recording.schema import HISTORY
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from instep.replay.recovery import look_through
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record_gru
from tests.support.scribe import Scribe
from tests.support.stretches import stretches_of

GRU = make_gru(3, 4)
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


def when_it_began(path: Path) -> int:
    with RecordingReader(path) as reader:
        return int(next(row[1] for table in HISTORY for row in reader.rows(table, 1, 1)))


def verified(path: Path, model: Path) -> bool:
    console = Console(file=io.StringIO(), width=200)
    return run(path, model_folder=model, streams=[], json=False, console=console) == 0


def frames(path: Path) -> dict[tuple[int, int], bytes]:
    """The inputs and outputs of each frame, by stream and seq."""
    found = {}
    for stretch in stretches_of(path):
        for seq, (x, y) in enumerate(zip_longest(stretch.x, stretch.y, fillvalue=np.zeros(0)), stretch.first_seq):
            found[stretch.stream, seq] = x.tobytes() + y.tobytes()
    return found


def test_a_range_begins_at_the_checkpoint_before_it_and_is_verified(
    scribe: Scribe, tmp_path: Path, model: Path
) -> None:
    path, out = scribe.writer.path, tmp_path / "out.rec"
    points = checkpoints(path)
    assert len(points) >= 3
    found = cut(path, out, Bound("position", points[1] + 7), Bound("position", points[2] + 40))
    assert (found.first_position, found.last_position, found.begins_early) == (points[1] + 1, points[2] + 40, True)
    inspection = inspect(out)
    assert (inspection.first_position, inspection.frames) == (points[1] + 1, found.frames)
    assert verified(out, model)
    everything, part = frames(path), frames(out)
    assert 30 < len(part) < len(everything) / 2
    assert part.items() <= everything.items()
    look_through(out)  # an engine can go on with it


def test_of_a_copy_that_was_cut_off_what_comes_before_can_be_saved(scribe: Scribe, tmp_path: Path) -> None:
    for _ in range(3000):
        scribe.step(sorted(scribe.states))
    scribe.writer.commit()
    out = tmp_path / "out.rec"
    found = cut(scribe.writer.path, out, Bound("position", checkpoints(scribe.writer.path)[1]), None)
    os.truncate(out, out.stat().st_size * 7 // 10)
    assert repair(out, tmp_path / "saved.rec").frames > found.frames / 2


def test_without_bounds_it_is_everything(scribe: Scribe, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.rec"
    found = cut(scribe.writer.path, out, None, None)
    assert (found.first_position, found.last_position, found.begins_early) == (1, scribe.writer.position, False)
    assert frames(out) == frames(scribe.writer.path)
    assert verified(out, model)


def test_times(scribe: Scribe, tmp_path: Path) -> None:
    path, points = scribe.writer.path, checkpoints(scribe.writer.path)
    with RecordingReader(path) as reader:
        times = {row[0]: row[1] for table in ("batches", "outputs", "events") for row in reader.rows(table)}
        taken = [each.time_ns for each in reader.checkpoints()]
    end = max(position for position in times if position < points[2])
    found = cut(path, tmp_path / "out.rec", Bound("time", taken[0] + 5), Bound("time", times[end]))
    assert (found.first_position, found.last_position) == (points[0] + 1, end)
    first_ns = times[points[0] + 1]
    assert (found.first_ns, found.last_ns, found.begins_early) == (first_ns, times[end], True)
    found = cut(path, tmp_path / "all.rec", Bound("time", when_it_began(path)), None)
    assert (found.first_position, found.begins_early) == (1, False)


@pytest.mark.parametrize("kind", ["position", "time"])
def test_a_range_of_the_row_that_completes_a_checkpoint_begins_at_the_one_before(
    scribe: Scribe, tmp_path: Path, kind: Literal["position", "time"]
) -> None:
    with RecordingReader(scribe.writer.path) as reader:
        before, checkpoint = reader.checkpoints()[1:3]
    row = checkpoint.completed
    end = Bound("time", checkpoint.time_ns) if kind == "time" else Bound("position", row)
    found = cut(scribe.writer.path, tmp_path / "out.rec", Bound("position", row), end)
    assert (found.first_position, found.last_position, found.begins_early) == (before.position + 1, row, True)
    assert found.last_ns == checkpoint.time_ns


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
    assert scribe.now < late - 3 * TICK_NS
    found = cut(tmp_path / "a.rec", tmp_path / "out.rec", Bound("time", late - 3 * TICK_NS), None)
    part = frames(tmp_path / "out.rec")
    assert found.first_position <= early
    assert part.keys() == {(1, seq) for seq in range(5, 18)}
    assert verified(tmp_path / "out.rec", model)
    with pytest.raises(RecordingError, match="the range is empty"):
        cut(tmp_path / "a.rec", tmp_path / "no.rec", Bound("time", late), None)


def test_a_cut_of_a_cut_and_of_what_was_trimmed(scribe: Scribe, tmp_path: Path, model: Path) -> None:
    path, points = scribe.writer.path, checkpoints(scribe.writer.path)
    cut(path, tmp_path / "one.rec", Bound("position", points[0]), None)
    cut(tmp_path / "one.rec", tmp_path / "two.rec", None, Bound("position", points[-1]))
    assert verified(tmp_path / "two.rec", model)
    while scribe.writer.trim(scribe.now + 500 * TICK_NS):
        pass
    assert scribe.writer.trimmed.position
    left = checkpoints(path)
    found = cut(path, tmp_path / "three.rec", Bound("position", left[1]), None)
    assert found.first_position == left[1] + 1
    assert verified(tmp_path / "three.rec", model)


def test_the_source_may_be_trimmed_once_the_range_was_read(
    scribe: Scribe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, began = checkpoints(scribe.writer.path), when_it_began(scribe.writer.path)

    def look_through(path: Path) -> Inspection:
        while scribe.writer.trim(scribe.now + 500 * TICK_NS):
            pass
        return inspect(path)

    monkeypatch.setattr(inspection, "inspect", look_through)
    found = cut(scribe.writer.path, tmp_path / "out.rec", None, Bound("position", points[1]))
    assert scribe.writer.trimmed.position >= found.first_position
    assert (found.first_position, found.first_ns) == (1, began)
    assert found.frames == inspect(tmp_path / "out.rec").frames


def test_a_recording_without_its_beginning_says_so_wherever_it_is_described(
    scribe: Scribe, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    while scribe.writer.trim(scribe.now + 500 * TICK_NS):
        pass
    trimmed, archive, whole = scribe.writer.path, tmp_path / "out.rec", record_gru(tmp_path / "whole", GRU, [2])
    cut(trimmed, archive, None, None)
    for path in (trimmed, archive):
        with RecordingReader(path) as reader:
            begins = f"begins at position {reader.first_position:,} ({when(reader.checkpoints()[0].time_ns)}); "
            assert reader.first_position > 1
        result = CliRunner().invoke(app, ["recordings", "info", str(path)])
        shown = " ".join(result.stdout.split())
        assert f"trimmed {begins}what came before was trimmed or cut off last position" in shown
        console, page = Console(file=(text := io.StringIO()), width=80), tmp_path / f"{path.stem}.html"
        options: dict[str, Any] = {"model_folder": model, "streams": [], "console": console}
        assert run(path, json=False, page=page, **options) == 0
        assert f"\nthe recording {begins}what came before" in text.getvalue()
        assert page.read_text().count(begins) == 2, "among the limits of the verdict, and the facts"
        run(path, json=True, **options)
        assert json.loads(capsys.readouterr().out)["trimmed"].startswith(begins)
    run(whole.path, json=True, model_folder=None, streams=[], console=console)
    assert json.loads(capsys.readouterr().out)["trimmed"] == ""


def test_what_cannot_be_cut(scribe: Scribe, tmp_path: Path) -> None:
    path, out = scribe.writer.path, tmp_path / "out.rec"
    began, position = when_it_began(path), scribe.writer.position
    late = Bound("time", scribe.now + 10**9)
    ranges: list[tuple[Bound | None, Bound | None]] = [
        (None, Bound("position", 0)),
        (Bound("position", 3), Bound("position", 2)),
        (Bound("position", position + 1), None),
        (None, Bound("time", began - 1)),
        (late, None),
        (late, Bound("position", 20)),
    ]
    said = f"the range is empty: {path} holds the positions 1 to {position}, from {when(began)} to "
    for begin, end in ranges:
        with pytest.raises(RecordingError, match=re.escape(said)):
            cut(path, out, begin, end)
    with pytest.raises(RecordingError, match="already exists"):
        cut(path, path, None, None)
    with pytest.raises(RecordingError, match="there is no folder"):
        cut(path, tmp_path / "no" / "out.rec", None, None)
    while scribe.writer.trim(scribe.now + 500 * TICK_NS):
        pass
    with RecordingReader(path) as reader:
        checkpoint = reader.checkpoints()[0]
    for end in (Bound("position", checkpoint.completed), Bound("time", checkpoint.time_ns)):
        with pytest.raises(RecordingError, match=f"holds the positions {checkpoint.position + 1} to {position}"):
            cut(path, out, None, end)
    RecordingWriter.create(tmp_path / "b.rec", make_header(gru_description(GRU))).abandon()
    for end in (None, Bound("time", 0)):
        with pytest.raises(RecordingError, match=r"the range is empty: .* holds nothing"):
            cut(tmp_path / "b.rec", out, None, end)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("1200", Bound("position", 1200)),
        ("2026-11-26T18:30", Bound("time", int(datetime(2026, 11, 26, 18, 30, tzinfo=UTC).timestamp()) * 10**9)),
        ("2026-11-26T19:30:05+01:00", Bound("time", 1_795_717_805 * 10**9)),
    ],
)
def test_bounds_as_typed(text: str, bound: Bound) -> None:
    assert Bound.parse(text) == bound


def test_what_is_no_bound() -> None:
    for text in ("-3", "yesterday", ""):
        with pytest.raises(RecordingError, match="neither a position, like 1200, nor a time"):
            Bound.parse(text)


def test_as_typed(scribe: Scribe, tmp_path: Path) -> None:
    out, runner = tmp_path / "out.rec", CliRunner()
    result = runner.invoke(
        app, ["recordings", "cut", str(scribe.writer.path), str(out), "--from", "150", "--to", "200"]
    )
    assert result.exit_code == 0, result.output
    with RecordingReader(out) as reader:
        first = reader.first_position
    with RecordingReader(scribe.writer.path) as reader:
        first_ns, last_ns = (row[1] for at in (first, 200) for table in HISTORY for row in reader.rows(table, at, at))
    shown = " ".join(result.output.split())
    assert f"positions {first} to 200 of {scribe.writer.path} ({when(first_ns)} to {when(last_ns)}), " in shown
    assert "it begins earlier than --from, because a range can begin only where" in shown
    assert inspect(out).frames
    assert runner.invoke(app, ["recordings", "cut", str(scribe.writer.path), str(out)]).exit_code == 2
    whole = runner.invoke(app, ["recordings", "cut", str(scribe.writer.path), str(tmp_path / "whole.rec")])
    assert "earlier" not in whole.output


def test_a_damaged_recording_is_not_cut(scribe: Scribe, tmp_path: Path) -> None:
    """Also where the damage is seen only in the range that was cut out."""
    scribe.writer.close()
    changes: list[tuple[dict[str, Any], bool, str]] = [
        ({"time_ns": 7}, False, "is damaged: the row at position"),
        ({"size": 0}, True, "is damaged, and so is what was cut out of it"),
    ]
    for columns, fix_crc, said in changes:
        forger = Forger(scribe.writer.path, tmp_path / "b.rec", fix_crc=fix_crc)
        forger.change("batches", forger.rows("batches")[9]["position"], **columns)
        result = CliRunner().invoke(app, ["recordings", "cut", str(forger.path), str(tmp_path / "out.rec")])
        assert (result.exit_code, f"{forger.path} {said}" in result.output.replace("\n", "")) == (2, True), (
            result.output
        )
        assert not (tmp_path / "out.rec").exists()
