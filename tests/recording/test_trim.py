"""A recording that keeps a limited history: it stops growing, and what it holds is whole."""

from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from instep.models.folder import load_model
from instep.recording.database import LIMITS
from instep.recording.errors import DamagedRecording, TrimmedMeanwhile
from instep.recording.inspection import inspect, look_over
from instep.recording.reader import RecordingReader
from instep.recording.records import StateRows, Trimmed
from instep.recording.recovery import Recovered
from instep.recording.table import read_frames
from instep.recording.trim import Retention, counts_of_events, deletions
from instep.recording.writer import RecordingWriter
from instep.replay.command import run
from instep_tools.formats.read import read_sequences
from tests.support.batches import batches_of
from tests.support.forger import Forger
from tests.support.living import GRU, STREAMS, live, small_scribe, step
from tests.support.recordings import gru_description, gru_step, make_gru, make_header, record_gru
from tests.support.replaying import replay
from tests.support.scribe import Scribe
from tests.support.stretches import stretches_of
from tests.support.written import cut_out


def look_at(path: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True))


def count_pages(database: sqlite3.Connection) -> tuple[int, int]:
    """Pages of the file: all, and those that hold anything."""
    pages, free = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    return pages, pages - free


@pytest.fixture
def scribe(tmp_path: Path) -> Scribe:
    return small_scribe(tmp_path)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that has been trimmed many times, and is closed; to be copied."""
    scribe = small_scribe(tmp_path_factory.mktemp("trimmed"))
    for _ in live(scribe, 900):
        pass
    scribe.writer.close()
    return scribe.writer.path


def test_the_file_stops_growing(scribe: Scribe) -> None:
    with look_at(scribe.writer.path) as database:
        pages, used = np.array([count_pages(database) for _ in live(scribe, 2500)]).T.tolist()
    assert max(used[-500:]) <= 60 + 3, "it holds about what is kept"
    assert min(used[-500:]) >= 60 // 2, "and not much less"
    assert pages[-1] <= max(pages[:1000]) + 2, "pages are used again"
    assert scribe.writer.trimmed.position > scribe.writer.position * 0.7


def test_without_a_limit_nothing_is_trimmed(tmp_path: Path) -> None:
    scribe = Scribe(RecordingWriter.create(tmp_path / "a.rec", make_header(gru_description(GRU))), step)
    scribe.open(1)
    for _ in live(scribe, 50):
        assert not scribe.writer.wants_checkpoint(2**62)
    scribe.checkpoint(scribe.step(sorted(scribe.states)))
    scribe.writer.commit()
    assert not scribe.writer.trim(2**62)
    assert scribe.writer.trimmed == Trimmed()
    assert look_over(tmp_path / "a.rec")["first_position"] == 1


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_is_left_is_what_was_recorded(scribe: Scribe, goes_on: bool) -> None:
    for _ in live(scribe, 1500, goes_on=goes_on):
        pass
    found = inspect(path := scribe.writer.path)
    assert look_over(path)["first_position"] == scribe.writer.trimmed.position + 1
    with RecordingReader(path) as reader:
        streams = reader.streams()
        exported = sum(map(len, read_frames(reader, streams, range(len(streams)))))
    stretches = stretches_of(path)
    for stretch in stretches:
        for frames, truth in ((stretch.x, scribe.x), (stretch.y, scribe.y)):
            seqs = range(stretch.first_seq, stretch.first_seq + len(frames))
            expected = np.array([truth[stretch.stream][seq] for seq in seqs], np.float32).reshape(frames.shape)
            np.testing.assert_array_equal(frames, expected)
    assert exported == sum(len(stretch.x) for stretch in stretches) == found.frames
    assert int(read_sequences(path).lengths.sum()) == found.frames
    with Recovered(path) as recovered:
        replayed = replay(recovered, step)
    assert replayed.seqs == {stream: scribe.seqs[stream] for stream in scribe.states}
    for stream, state in scribe.states.items():
        assert replayed.states[stream].tobytes() == state.tobytes()


def test_it_is_verified_from_the_states_that_are_left(tmp_path: Path) -> None:
    gru = make_gru(3, 4)
    model = record_gru(tmp_path, gru, [1])
    header = make_header(gru_description(gru), model_fingerprint=load_model(model.folder).fingerprint)
    scribe = Scribe(RecordingWriter.create(tmp_path / "t.rec", header, Retention(keep_ns=300_000)), gru_step(gru))
    for stream in STREAMS:
        scribe.open(stream)
    for _ in live(scribe, 400):
        pass
    scribe.writer.close()
    assert scribe.writer.trimmed.position
    assert verify(tmp_path / "t.rec", model.folder)[0] == 0
    with RecordingReader(tmp_path / "t.rec") as reader:
        begun = {state.stream: state for state in reader.states() if state.position <= reader.trimmed.position}
        stream = next(info.stream for info in reader.streams() if info.stream in begun)
    state = begun[stream]
    forged = state.state.copy()
    forged.view("<f4")[0] += 0.25
    forger = Forger(tmp_path / "t.rec", tmp_path / "u.rec")
    forger.change_state(stream, state.position, state=forged.tobytes())
    status, text = verify(forger.path, model.folder)
    assert status == 1, text


def verify(path: Path, folder: Path) -> tuple[int, str]:
    said = io.StringIO()
    console = Console(file=said, width=200)
    return run([path], folder, [], console), said.getvalue()


def test_a_restart_keeps_the_limit_and_one_without_it_keeps_the_rest(scribe: Scribe) -> None:
    for _ in live(scribe, 900):
        pass
    path, first = scribe.writer.path, scribe.writer.trimmed.position
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(path, scribe.writer.header)
    for _ in live(scribe, 300):
        pass
    assert scribe.writer.trimmed.position == first
    assert look_over(path)["first_position"] == first + 1
    scribe.writer.abandon()
    scribe.writer = RecordingWriter.resume(path, scribe.writer.header, retention=Retention(keep_bytes=60 * 1024))
    for _ in live(scribe, 300):
        pass
    assert scribe.writer.trimmed.position > first
    inspect(path)
    with look_at(path) as database:
        assert count_pages(database)[1] <= 60 + 3


def test_a_reader_says_when_the_history_was_trimmed_under_its_hands(scribe: Scribe) -> None:
    for _ in live(scribe, 300):
        pass
    with RecordingReader(scribe.writer.path) as reader:
        for _ in live(scribe, 300):
            pass
        with pytest.raises(TrimmedMeanwhile):
            list(batches_of(reader))


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("trimmed", {"position": 5}),
        ("trimmed", {"events": 99}),
        ("checkpoints", {"openings": 99}),
        ("newest", {"states": 99}),
    ],
)
def test_what_does_not_fit_is_refused(trimmed: Path, tmp_path: Path, table: str, columns: dict[str, Any]) -> None:
    forger = Forger(trimmed, tmp_path / "b.rec")
    forger.change(table, forger.rows(table)[0]["position"], **columns)
    with pytest.raises(DamagedRecording):
        inspect(forger.path)


@pytest.fixture
def by_age(tmp_path: Path) -> Scribe:
    """Of a recording that keeps its history for 0.8 ms; its first checkpoint is kept, the next is too near to be."""
    writer = RecordingWriter.create(tmp_path / "a.rec", make_header(gru_description(GRU)), Retention(keep_ns=800_000))
    scribe = Scribe(writer, step)
    for stream in STREAMS:
        scribe.open(stream)
    for _ in range(2):
        scribe.checkpoint(scribe.step(STREAMS))
        writer.commit()
    return scribe


def trim_after_an_idle_time(scribe: Scribe) -> None:
    while scribe.writer.trim(scribe.now + 10_000_000):
        pass


def test_the_checkpoint_that_the_history_begins_with_stays(by_age: Scribe) -> None:
    position = by_age.step(STREAMS)
    by_age.writer.commit()
    trim_after_an_idle_time(by_age)
    assert by_age.writer.trimmed.position == 8, "of the newest checkpoint"
    by_age.checkpoint(position)
    by_age.writer.commit()
    by_age.writer.close()
    assert inspect(by_age.writer.path).frames == len(STREAMS)


def test_a_checkpoint_whose_states_were_replaced_is_no_beginning(by_age: Scribe) -> None:
    position = by_age.step(STREAMS)
    by_age.checkpoint(position, only=STREAMS[:2], is_part=True)
    by_age.writer.commit()
    by_age.writer.abandon()
    by_age.writer = RecordingWriter.resume(by_age.writer.path, by_age.writer.header, retention=by_age.writer.retention)
    by_age.writer.commit()
    trim_after_an_idle_time(by_age)
    assert by_age.writer.trimmed.position == 5, "of the one before, which has all its states"
    by_age.writer.close()
    with RecordingReader(by_age.writer.path) as reader:
        begun = {state.stream: state.seq for state in reader.states() if state.position <= reader.trimmed.position}
    assert begun == dict.fromkeys(STREAMS, 1)


@pytest.mark.parametrize("is_part", [False, True])
def test_states_that_are_written_between_the_decision_and_the_first_portion_replace_none_that_count(
    by_age: Scribe, is_part: bool
) -> None:
    position = by_age.step(STREAMS)
    by_age.writer.commit()
    assert by_age.writer.trim(by_age.now + 10_000_000), "it is decided"
    by_age.checkpoint(position, only=STREAMS[:2] if is_part else None, is_part=is_part)
    by_age.writer.commit()
    check_that_it_goes_on_after_trimming(by_age)
    assert by_age.writer.trimmed.position >= 8


def check_that_it_goes_on_after_trimming(scribe: Scribe) -> None:
    trim_after_an_idle_time(scribe)
    scribe.writer.close()
    inspect(scribe.writer.path)
    with Recovered(scribe.writer.path) as recovered:
        replayed = replay(recovered, step)
    assert replayed.seqs == {stream: scribe.seqs[stream] for stream in scribe.states}


def close_many(scribe: Scribe) -> None:
    """Close two of the streams, and so many others that their states are deleted before the next checkpoint."""
    numbers = np.arange(100, 5000)
    names, zeros = [f"n{number}" for number in numbers], numbers * 0
    scribe.close(1)
    scribe.close(2)
    scribe.writer.open_streams(scribe.now, numbers, names, np.ones(len(numbers), np.uint64), zeros, None)
    states = np.zeros((len(numbers), scribe.writer.header.state_spec.row_bytes), np.uint8)
    scribe.writer.close_streams(scribe.now, numbers, "closed", zeros, states, zeros > 0)


def test_a_checkpoint_whose_streams_have_closed_is_no_beginning(by_age: Scribe, tmp_path: Path) -> None:
    by_age.step(STREAMS)
    close_many(by_age)
    by_age.writer.commit()
    position = by_age.writer.position
    by_age.writer.commit()
    cut_out(by_age.writer.path, tmp_path / "cut.rec", position - 1)
    check_that_it_goes_on_after_trimming(by_age)


@pytest.mark.parametrize("close_them", [False, True])
@pytest.mark.parametrize("retention", [Retention(keep_ns=800_000), Retention(keep_ns=1000)])
def test_a_restart_does_not_know_what_the_newest_checkpoint_lacks(
    by_age: Scribe, close_them: bool, retention: Retention
) -> None:
    position = by_age.step(STREAMS)
    by_age.checkpoint(position, only=STREAMS[:2], is_part=True)
    if close_them:
        close_many(by_age)
    by_age.writer.commit()
    by_age.writer.abandon()
    by_age.writer = RecordingWriter.resume(by_age.writer.path, by_age.writer.header, retention=retention)
    by_age.writer.commit()
    check_that_it_goes_on_after_trimming(by_age)


@pytest.mark.parametrize("streams", [2_000, 20_000])
def test_no_portion_of_trimming_takes_long_however_many_streams_are_open(tmp_path: Path, streams: int) -> None:
    path, numbers = tmp_path / "a.rec", np.arange(1, streams + 1)
    zeros, closed = numbers * 0, numbers[::2]
    states = StateRows(numbers, zeros, np.zeros((streams, 32), np.uint8), zeros, *np.zeros((2, 0, 3), np.float32))
    writer = RecordingWriter.create(path, make_header(gru_description(GRU)), Retention(keep_ns=1))
    writer.open_streams(1, numbers, [str(number) for number in numbers], np.ones(streams, np.uint64), zeros, None)
    for time_ns in (2, 3):
        writer.stream_events(time_ns, "owner", numbers, numbers, ["held 1, goes on at 0"] * streams)
        writer.checkpoint(time_ns, writer.position, states)
    writer.close_streams(4, closed, "closed", zeros[::2], states.states[::2], closed < 0)
    writer.commit()
    position = writer.position
    writer.close()
    work, most = 0, 0

    def count() -> int:
        nonlocal work
        work += 1
        return 0

    with closing(sqlite3.connect(path)) as database:
        database.set_progress_handler(count, 1000)
        events = 0
        for count_of_some in counts_of_events(database, position):
            events, most, work = events + count_of_some, max(most, work), 0
        for portion in deletions(database, position, LIMITS.deleted_at_once):
            for statement, rows in portion:
                database.executemany(statement, rows)
            most, work = max(most, work), 0
        left = [database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("openings", "states")]
    assert [events, *left] == [streams // 2] * 3
    assert most < 100, "in thousands of SQLite's instructions"
