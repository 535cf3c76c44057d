"""Damage in the WAL of a killed writer, which SQLite drops together with what comes after it, is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.recording.wal import lost_tail
from instep.recording.writer import RecordingWriter
from tests.support.recordings import gru_description, make_gru, make_header
from tests.support.rows import open_stream

HEADER = make_header(gru_description(make_gru(3, 4)))
FRAME_BYTES = 24 + 16_384
LAST = 25


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a writer left that was killed: a WAL that was begun again once, with older frames at its end."""
    monkeypatch.setattr("instep.recording.rows.WAL_BYTES", 0)
    writer = RecordingWriter.create(tmp_path / "a.rec", HEADER)
    for stream in range(1, 21):
        open_stream(writer, stream, f"s{stream}", stream, 0, 1, None)
        writer.commit()
    writer.copy_wal()
    for stream in range(21, LAST + 1):
        open_stream(writer, stream, f"s{stream}", stream, 0, 1, None)
        writer.commit()
    for suffix in ("", "-wal"):
        shutil.copy(f"{writer.path}{suffix}", tmp_path / f"k.rec{suffix}")
    writer.abandon()
    return tmp_path / "k.rec"


def position(path: Path) -> int:
    with RecordingReader(path) as reader:
        return reader.last_position


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


def frames(path: Path) -> int:
    """How many frames hold what was committed last: a commit writes the same pages each time."""
    wal = path.read_bytes()
    salts = wal[16:24]
    return sum(wal[at + 8 : at + 16] == salts for at in range(32, len(wal), FRAME_BYTES))


def test_nothing_is_said_of_a_wal_without_damage(killed: Path) -> None:
    wal = Path(f"{killed}-wal")
    assert 32 + frames(wal) * FRAME_BYTES < wal.stat().st_size, "older frames are there"
    assert lost_tail(killed) == ""
    assert position(killed) == LAST


def test_damage_before_other_frames_is_said_with_how_far_it_reaches(killed: Path) -> None:
    wal, rng = Path(f"{killed}-wal"), np.random.default_rng(0)
    whole, count = wal.read_bytes(), frames(wal)
    for _ in range(20):
        wal.write_bytes(whole)
        bad = int(rng.integers(count - 1))
        change(wal, 32 + bad * FRAME_BYTES + int(rng.integers(FRAME_BYTES)))
        assert f"its WAL is damaged after {bad} of {count} pages: what was committed after that" in lost_tail(killed)
        reached = position(killed)
        assert reached < LAST
        found = inspect(killed, lambda _: None)
        assert found.positions == reached
        assert f"not closed: its engine ended without closing it; its WAL is damaged after {bad}" in found.ending


def test_a_damaged_header_is_said(killed: Path) -> None:
    change(Path(f"{killed}-wal"), 17)
    assert "the header of its WAL is damaged" in lost_tail(killed)
    assert position(killed) == 20


@pytest.mark.parametrize("cut", [0, 31, 40, FRAME_BYTES])
def test_a_transaction_that_was_not_complete_is_not_missing(killed: Path, cut: int) -> None:
    wal = Path(f"{killed}-wal")
    end = 32 + frames(wal) * FRAME_BYTES
    wal.write_bytes(wal.read_bytes()[: end - cut] if cut > 31 else wal.read_bytes()[:cut])
    assert lost_tail(killed) == ""


def test_a_recording_without_a_wal(tmp_path: Path) -> None:
    RecordingWriter.create(tmp_path / "a.rec", HEADER).close()
    assert lost_tail(tmp_path / "a.rec") == ""
