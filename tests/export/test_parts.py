"""A recording of several files, exported as one table."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from instep.export.command import run
from instep.recording.writer import RecordingWriter
from tests.export.written import bits
from tests.support.forger import Forger
from tests.support.recordings import gru_description, gru_step, make_gru, make_header
from tests.support.scribe import Scribe

GRU = make_gru(3, 4, layers=2)
FILES = ["a.rec", "a-000002.rec", "a-000003.rec", "a-000004.rec"]


@pytest.fixture
def scribe(tmp_path: Path) -> Scribe:
    """Four files: streams that go on in each, that end, begin and are reset in between; the last is being written."""
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", make_header(gru_description(GRU))), gru_step(GRU))
    scribe.open(1)
    scribe.open(2, scribe.random_state(), first_seq=1000)
    scribe.open(3)
    scribe.step([3, 1, 2])
    scribe.step([1, 3], "failed")
    scribe.step([1, 3])
    scribe.close(3)
    scribe.rotate()
    scribe.open(4, name="stream-3")
    scribe.step([2, 4, 1])
    scribe.rotate()
    scribe.rotate()  # nothing happens in the third
    scribe.reset(1)
    scribe.step([4, 1])
    scribe.close(1)
    scribe.writer.commit()
    return scribe


@pytest.fixture
def base(tmp_path: Path, scribe: Scribe) -> Path:
    scribe.writer.close()
    return tmp_path / "a.rec"


def export(path: Path, output: Path, **options: Any) -> tuple[int, str]:
    said = io.StringIO()
    arguments = {"format": None, "output": output, "streams": [], "json": False, **options}
    status = run(path, console=Console(file=said, width=200), **arguments)
    return status, said.getvalue()


def read(path: Path) -> dict[tuple[str, int, int], tuple[list[int], list[int]]]:
    with np.load(path) as file:
        keys = zip(file["stream"].tolist(), file["stream_id"].tolist(), file["seq"].tolist(), strict=True)
        rows = [(key, (bits(x), bits(y))) for key, x, y in zip(keys, file["x"], file["y"], strict=True)]
        assert (np.diff(file["time_ns"]) >= 0).all()
    found = dict(rows)
    assert len(found) == len(rows), "no frame comes twice"
    return found


def truth(scribe: Scribe, *streams: int) -> dict[tuple[str, int, int], tuple[list[int], list[int]]]:
    name = {1: "stream-1", 2: "stream-2", 3: "stream-3", 4: "stream-3"}
    return {
        (name[stream], stream, seq): (bits(x), bits(scribe.y[stream][seq]))
        for stream in streams
        for seq, x in scribe.x[stream].items()
    }


def damage(path: Path) -> Forger:
    """A file that is changed in its place."""
    shutil.move(path, path.with_suffix(".was"))
    return Forger(path.with_suffix(".was"), path)


def test_all_files_are_one_table(tmp_path: Path, scribe: Scribe) -> None:
    status, text = export(tmp_path / "a.rec", tmp_path / "all.npz")
    assert status == 0, text
    assert ": 10 frames of 4 streams, 3 inputs and 4 outputs each, " in text
    assert "; from 4 files, a.rec to a-000004.rec; the recording was not closed: exported up to its last" in text
    assert read(tmp_path / "all.npz") == truth(scribe, 1, 2, 3, 4)
    for file in sorted(tmp_path.glob("a*.rec")):
        assert file.name in FILES


def test_some_streams_of_all_files(tmp_path: Path, scribe: Scribe) -> None:
    assert export(tmp_path / "a.rec", tmp_path / "one.npz", streams=["stream-1"])[0] == 0
    assert read(tmp_path / "one.npz") == truth(scribe, 1)
    assert export(tmp_path / "a.rec", tmp_path / "name.npz", streams=["stream-3"])[0] == 0
    assert read(tmp_path / "name.npz") == truth(scribe, 3, 4)


def test_the_name_of_a_first_file_that_is_gone_means_what_is_left(base: Path, scribe: Scribe, tmp_path: Path) -> None:
    base.unlink()
    status, text = export(base, tmp_path / "left.npz")
    assert status == 0
    assert "; the first file of a.rec is not there any more" in text
    whole = truth(scribe, 1, 2, 4)
    left = {key: row for key, row in whole.items() if key[1:] not in {(1, 0), (1, 1), (2, 1000)}}
    assert read(tmp_path / "left.npz") == left


def test_a_numbered_file_means_that_one(base: Path, scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    status, text = export(base.with_name(FILES[1]), tmp_path / "two.npz")
    assert status == 0
    assert f"only {FILES[1]} was looked at; {base} stands for the whole recording, which has 3 other files" in text
    assert {key[1:] for key in read(tmp_path / "two.npz")} == {(1, 2), (2, 1001), (4, 0)}
    assert export(base, tmp_path / "all.csv", json=True)[0] == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(file).name for file in found["files"]] == FILES
    assert found["frames"] == 10


def test_a_file_that_is_missing_in_the_middle(base: Path, tmp_path: Path) -> None:
    base.with_name(FILES[2]).unlink()
    status, text = export(base, tmp_path / "all.npz")
    assert status == 2
    assert text == (
        "not exported: a-000003.rec is missing; each file that is there can be exported for itself, by its own name, "
        "the first as a copy under another\n"
    )
    assert not (tmp_path / "all.npz").exists()


def test_damage_in_any_file_and_between_them(base: Path, tmp_path: Path) -> None:
    for name in FILES:
        copy = tmp_path / f"of-{name}"
        copy.mkdir()
        for file in FILES:
            shutil.copy(base.with_name(file), copy / file)
        forger = damage(copy / name)
        forger.remove("events", forger.rows("events")[-1]["position"])
        status, text = export(copy / "a.rec", tmp_path / "all.npz")
        assert status == 2
        assert text.startswith(f"not exported: {copy / name} is damaged: ")
        assert not (tmp_path / "all.npz").exists()


@pytest.mark.parametrize(
    ("said", "columns"),
    [
        ("stream 1, which is open at the end of the file before it, does not go on", {"stream": 77}),
        ("holds frame 1001 of stream 2 ('stream-2') where frame 1002 belongs", {}),
    ],
)
def test_streams_that_do_not_go_on_where_they_were(
    base: Path, tmp_path: Path, said: str, columns: dict[str, Any]
) -> None:
    if columns:
        forger = damage(base.with_name(FILES[1]))
        (row,) = (row for row in forger.rows("openings") if row["stream"] == 1)
        forger.change("openings", row["position"], **columns)
    else:  # the last frame of stream 1 in the first file is another's
        forger = damage(base)
        batch, at = forger.rows("batches")[-1], 0
        seqs, streams = forger.column(batch, "seqs"), forger.column(batch, "streams")
        seqs[at], streams[at] = 1001, 2
        forger.change_batch(batch, seqs=seqs, streams=streams)
    status, text = export(base, tmp_path / "all.npz")
    assert status == 2
    assert said in text


def test_positions_that_do_not_go_on(base: Path, tmp_path: Path) -> None:
    forger = damage(base)
    last = forger.rows("events")[-1]["position"]
    forger.remove("events", last)
    forger.change("newest", last, position=last - 1)
    status, text = export(base, tmp_path / "all.npz")
    assert status == 2
    assert f"it begins at position {last + 1}, but the file before it ends at {last - 1}" in text
