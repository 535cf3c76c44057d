"""A recording of several files: each is verified, and that each begins with what the one before it ends with."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from instep.models.folder import load_model
from instep.recording import family
from instep.recording.joints import Following
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from instep.verify import verifier
from instep.verify.command import run
from tests.support.forger import Forger
from tests.support.recordings import Recorded, gru_step, make_gru, record_gru
from tests.support.scribe import Scribe

GRU = make_gru(3, 8, layers=2)
FILES = ["a.rec", "a-000002.rec", "a-000003.rec", "a-000004.rec"]


@pytest.fixture
def model(tmp_path: Path) -> Recorded:
    return record_gru(tmp_path / "model", GRU, [1])


@pytest.fixture
def base(tmp_path: Path, model: Recorded) -> Path:
    """Four files: streams that go on in each, that end, begin and are reset in between, and one without a frame."""
    (tmp_path / "r").mkdir()
    path = tmp_path / "r" / "a.rec"
    scribe = Scribe(RecordingWriter.create(path, model.header), gru_step(GRU))
    scribe.open(1)
    scribe.open(2, scribe.random_state(), first_seq=1000)
    scribe.open(3, scribe.random_state())
    scribe.open(9)
    for _ in range(4):
        scribe.step([3, 1, 2])
    scribe.step([1, 3], "failed")
    scribe.reset(1, scribe.random_state())
    scribe.step([1])
    scribe.close(3)
    scribe.rotate()
    scribe.step([2, 1])
    scribe.reset(2)
    scribe.open(4)
    scribe.step([4])
    scribe.writer.commit()
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(path, model.header)
    scribe.step([4, 2, 1])
    scribe.rotate()
    scribe.rotate()  # nothing happens in the third
    for _ in range(3):
        scribe.step([4, 1, 2])
    scribe.close(1)
    scribe.writer.close()
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(FILES)
    return path


def verify(*files: Path, **options: Any) -> tuple[int, str]:
    said = io.StringIO()
    arguments = {"model_folder": None, "streams": [], "json": False, **options}
    status = run(files, console=Console(file=said, width=160), **arguments)
    return status, said.getvalue()


def forge(file: Path) -> Forger:
    """Change a file in its place."""
    shutil.move(file, file.with_suffix(".was"))
    forger = Forger(file.with_suffix(".was"), file)
    file.with_suffix(".was").unlink()
    return forger


def opening(forger: Forger, stream: int) -> dict[str, Any]:
    return next(row for row in forger.rows("openings") if row["stream"] == stream)


def test_the_first_file_stands_for_all_that_are_there(base: Path) -> None:
    status, text = verify(base)
    assert status == 0, text
    assert text.splitlines()[-1] == "verified: 4 files, 5 streams, 28 frames, exact, 0 mismatches"
    lines = text.splitlines()
    assert len(lines) == len(FILES) + 1, "a line for each file"
    for name, line in zip(FILES, lines[:-1], strict=True):
        assert line.startswith(f"{base.with_name(name)}: verified: ")


def test_only_a_bad_file_has_tables(base: Path) -> None:
    forger = forge(base.with_name(FILES[3]))
    batch = forger.rows("batches")[0]
    x = np.frombuffer(batch["x"], "<f4").copy()
    x[0] += 1
    forger.change("batches", batch["position"], x=x.tobytes())
    status, text = verify(base)
    assert status == 1
    good, _, bad = text.partition(f"\n{forger.path}\n")
    assert [line.split(": ")[0] for line in good.splitlines()] == [str(base.with_name(name)) for name in FILES[:3]]
    assert "│" not in good
    assert "│" in bad
    assert text.splitlines()[-1].startswith("not verified: 4 files, 5 streams, 28 frames, 1 mismatch")


def test_files_of_two_recordings_are_counted_as_such(base: Path, tmp_path: Path) -> None:
    other = record_gru(tmp_path / "other", GRU, [5], changes={"created_ns": 7})
    status, text = verify(base.with_name(FILES[3]), other.path)
    assert (status, text.splitlines()[-1][:46]) == (0, "verified: 2 recordings, 5 streams, 14 frames, ")
    status, text = verify(base, base.with_name(FILES[1]), other.path)
    assert (status, text.splitlines()[-1][:47]) == (0, "verified: 3 files of 2 recordings, 6 streams, 2")


def test_a_file_in_the_middle_is_verified_alone_from_the_states_it_begins_with(base: Path, tmp_path: Path) -> None:
    status, text = verify(base.with_name(FILES[1]))
    assert status == 0
    assert f"only {FILES[1]} was looked at; {base} stands for the whole recording, which has 3 other files" in text
    assert text.splitlines()[-1].startswith("verified: 4 streams, 6 frames, exact, 0 mismatches")
    shutil.copy(base.with_name(FILES[1]), tmp_path / "elsewhere.rec")
    status, text = verify(tmp_path / "elsewhere.rec")
    assert status == 0
    assert "only" not in text


def test_files_are_verified_as_they_are_named(base: Path) -> None:
    status, text = verify(base, base.with_name(FILES[1]))
    assert (status, text.splitlines()[-1][:45]) == (0, "verified: 2 files, 5 streams, 19 frames, exac")
    status, text = verify(base.with_name(FILES[3]), base)
    assert status == 0


@pytest.mark.parametrize(("stream", "element"), [(1, 0), (2, 5), (9, 3)])
def test_a_state_that_was_changed_at_the_joint_is_a_mismatch_with_a_name(base: Path, stream: int, element: int) -> None:
    forger = forge(base.with_name(FILES[1]))
    row = opening(forger, stream)
    state = np.frombuffer(row["initial_state"] or bytes(64), "<f4").copy()
    state[element] = np.nextafter(state[element], np.float32(2))
    forger.change("openings", row["position"], initial_state=state.tobytes())
    status, text = verify(base)
    assert status == 1
    assert text.splitlines()[-1].startswith("not verified: 4 files, 5 streams, 28 frames, ")
    report = text.split(f"/{FILES[1]}")[0]
    assert f"first mismatch: stream {stream} (stream-{stream}): " in report
    what = (
        "but its state in the next file is not its initial state" if stream == 9 else "state in the next file, element"
    )
    assert what in report
    first, *_ = verify_json(base)["files"]
    assert [each["stream"] for each in first["streams"] if each["verdict"] == "mismatch"] == [stream]


def verify_json(base: Path) -> dict[str, Any]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        verify(base, json=True)
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def test_one_json_object_tells_of_all_files(base: Path) -> None:
    found = verify_json(base)
    assert (found["verified"], found["verdict"], found["mismatches"]) == (True, "exact", 0)
    assert [Path(each["file"]).name for each in found["files"]] == FILES
    assert [each["frames"] for each in found["files"]] == [13, 6, 0, 9]


@pytest.mark.parametrize(
    ("said", "columns"),
    [
        ("it is called 'other' in a-000002.rec", {"name": "other"}),
        ("a-000002.rec goes on with its frame 7, but its recorded frames end before frame 5", {"first_seq": 7}),
        ("it is open at the end of this file, and a-000002.rec begins without it", {"stream": 77}),
    ],
)
def test_what_goes_on_otherwise_than_it_ended_is_a_mismatch(
    base: Path, model: Recorded, said: str, columns: dict[str, Any]
) -> None:
    forger = forge(base.with_name(FILES[1]))
    forger.change("openings", opening(forger, 1)["position"], **columns)
    if "stream" in columns:
        (event,) = (row for row in forger.rows("events") if (row["stream"], row["kind"]) == (1, "carried"))
        forger.change("events", event["position"], stream=77)
    with RecordingReader(base) as reader, RecordingReader(forger.path) as after:
        following = Following.read(after)
        report = verifier.verify(reader, load_model(model.folder), [], lambda stage, share: None, following)
    assert [(each.stream, each.problems) for each in report.streams if each.problems] == [(1, (said,))]
    unknown = "a-000002.rec begins with streams that the file before it does not hold (1), first stream 77 ('stream-1')"
    assert report.problems == ((unknown,) if "stream" in columns else ())
    assert report.verdict == "mismatch"


def test_a_stream_that_ended_and_goes_on_all_the_same_is_a_mismatch(base: Path) -> None:
    forger = forge(base)
    closing = next(row for row in forger.rows("closings") if row["stream"] == 3)
    forger.change("closings", closing["position"], stream=9, frames=0, final_state=None)
    status, text = verify(base)
    assert status == 1
    assert "it ended in this file, and a-000002.rec begins with it" in text
    assert "it is open at the end of this file, and a-000002.rec begins without it" in text


def test_rows_that_are_missing_between_two_files_are_a_mismatch(base: Path) -> None:
    forger = forge(base)
    last = forger.rows("events")[-1]
    forger.remove("events", last["position"])
    newest = forger.rows("newest")[0]["position"]
    forger.change("newest", newest, position=newest - 1)
    status, text = verify(base)
    assert status == 1
    assert f"a-000002.rec begins at position {newest + 1:,}, but the file before it ends at {newest - 1:,}" in text


def test_files_that_are_missing_are_said(base: Path) -> None:
    base.with_name(FILES[1]).unlink()
    status, text = verify(base)
    assert status == 2
    assert text.splitlines()[-1].startswith(
        "not all checked: 3 files, 5 streams, 22 frames, exact, 0 mismatches; a-000002"
    )
    assert "a-000002.rec is missing" in text
    base.with_name(FILES[2]).unlink()
    assert "a-000002.rec to a-000003.rec are missing" in verify(base)[1]


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_the_newest_files_that_are_missing_are_said(base: Path, gone: int) -> None:
    *_, last = FILES[:-gone]
    for name in FILES[-gone:]:
        base.with_name(name).unlink()
    missing = f"{last} goes on in {FILES[-gone]}, which is not there"
    status, text = verify(base)
    assert status == 2, text
    assert text.splitlines()[-1].startswith("not all checked: ")
    assert text.splitlines()[-1].endswith(f"0 mismatches; {missing}")
    found = verify_json(base)
    assert (found["verified"], found["not_looked_at"]) == (False, [missing])
    lock = WriterLock(base)  # between two files nothing is missing
    assert verify(base)[0] == 0
    lock.release()
    copy = base.with_name("copy.rec")
    shutil.copy(base.with_name(last), copy)
    assert (verify(copy)[0] == 0) is (last != FILES[2])  # there, nothing happened
    base.with_name(f"{FILES[-gone]}-new").touch()  # its writer died as it made it
    assert verify(base)[0] == 0


def test_the_oldest_may_be_gone(base: Path) -> None:
    for name in FILES[:2]:
        base.with_name(name).unlink()
    status, text = verify(base)
    assert status == 0
    assert "the first 2 files of a.rec are not there any more" in text
    base.with_name(FILES[2]).unlink()
    assert verify(base)[0] == 0


def test_one_stream_is_looked_for_in_all_files(base: Path) -> None:
    status, text = verify(base, streams=["stream-3"])
    assert (status, text.splitlines()[-1][:41]) == (0, "verified: 1 file, 1 stream, 4 frames, exa")
    status, text = verify(base, streams=["stream-4"])
    assert status == 0
    assert "verified: 3 files, 1 stream, 5 frames" in text
    status, text = verify(base, streams=["nobody"])
    assert status == 2
    assert text.startswith("not checked: the recording has no stream 'nobody'")
    status, text = verify(base, streams=["stream-3", "nobody"])
    assert status == 2
    assert text.startswith("not checked: the recording has no stream 'nobody'")
    status, text = verify(base, streams=["stream-3", "stream-4"])
    assert (status, text.splitlines()[-1][:43]) == (0, "verified: 4 files, 2 streams, 9 frames, exa")


def test_joints_are_checked_in_whatever_order_files_are_named(base: Path) -> None:
    forger = forge(base.with_name(FILES[1]))
    carried = opening(forger, 2)
    state = bytearray(carried["initial_state"])
    state[0] ^= 1
    forger.change("openings", carried["position"], initial_state=bytes(state))
    named = [base.with_name(name) for name in FILES[:2]]
    assert verify(*named)[0] == verify(*reversed(named))[0] == 1


def test_streams_of_several_recordings_are_looked_for_in_each(base: Path, tmp_path: Path, model: Recorded) -> None:
    scribe = Scribe(RecordingWriter.create(tmp_path / "other.rec", model.header), gru_step(GRU))
    scribe.open(3, name="elsewhere")
    scribe.step([3])
    scribe.writer.close()
    for wanted, frames in (
        (["stream-3"], "4 frames"),
        (["elsewhere"], "1 frame"),
        (["elsewhere", "stream-3"], "5 frames"),
    ):
        status, text = verify(base, tmp_path / "other.rec", streams=wanted)
        assert status == 0, text
        assert f" {frames}, exact" in text.splitlines()[-1]


def test_states_for_a_restart_are_read(base: Path) -> None:
    forger = forge(base.with_name(FILES[1]))
    forger.fix_crc = False
    state = forger.rows("states")[0]
    forger.change("states", state["stream"], state=bytes(len(state["state"])))
    status, text = verify(base)
    assert status == 2
    assert f"{FILES[1]} is damaged: the row at stream" in text


def test_files_without_the_stream_are_read_to_their_end(base: Path) -> None:
    forger = forge(base.with_name(FILES[-1]))
    forger.fix_crc = False
    batch = forger.rows("batches")[-1]
    forger.change("batches", batch["position"], x=bytes(len(batch["x"])))
    assert verify(base)[0] == 2
    status, text = verify(base, streams=["stream-3"])
    assert status == 2
    assert f"{FILES[-1]} is damaged" in text


def test_several_files_without_a_frame_are_not_verified(tmp_path: Path, model: Recorded) -> None:
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", model.header), gru_step(GRU))
    scribe.open(1)
    scribe.rotate()
    scribe.writer.close()
    assert len(family.members(tmp_path / "a.rec")) == 2
    status, text = verify(tmp_path / "a.rec")
    assert (status, text.strip()) == (2, "not checked: no file holds frames with outputs: there is nothing to verify")
