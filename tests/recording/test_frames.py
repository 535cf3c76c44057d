from __future__ import annotations

import gc
import re
import resource
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from instep.recording.errors import RecordingError
from instep.recording.frames import FrameStore

RNG = np.random.default_rng(0)


def filled(
    store: FrameStore, most: int, groups: int = 40, stretches: int = 9
) -> dict[int, list[tuple[F32, F32 | None]]]:
    """What was put in, by stretch and in order; every fifth group has no outputs."""
    known: dict[int, list[tuple[F32, F32 | None]]] = {}
    for group in range(40):
        of = RNG.integers(0, stretches, RNG.integers(1, most))
        x, y = (RNG.standard_normal((len(of), width)).astype(np.float32) for width in (3, 2))
        has_outputs = group % 5 != 2
        store.append(of, x, y if has_outputs else None)
        for at, stretch in enumerate(of.tolist()):
            known.setdefault(stretch, []).append((x[at], y[at] if has_outputs else None))
    return known


@pytest.mark.parametrize(("in_memory_bytes", "most"), [(0, 30), (500, 30), (2000, 30), (2**20, 30), (2**20, 8000)])
def test_each_stretch_has_its_frames_in_order_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory_bytes: int, most: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = FrameStore(Path("a.instep"), 3, 2, in_memory_bytes)
    known = filled(store, most)
    lengths = np.array([len(known[stretch]) for stretch in range(9)])
    rows = np.array([8, 2, 0, 5])
    found = store.sequences(rows, lengths)
    assert found.lengths.tolist() == lengths[rows].tolist()
    assert len(found.x) == lengths.sum()
    for at, stretch in enumerate(rows.tolist()):
        places = found.places(at)
        x, y = zip(*known[stretch], strict=True)
        assert found.x[places].tobytes() == np.stack(x).tobytes()
        assert found.answered[places].tolist() == [outputs is not None for outputs in y]
        for place, outputs in zip(places, y, strict=True):
            assert found.y[place].tobytes() == (bytes(8) if outputs is None else outputs.tobytes())
    assert list(tmp_path.iterdir()) == [], "its files have no names"


def test_what_is_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = FrameStore(Path("a.instep"), 64, 64, 2**20)
    x = np.ones((2**11, 64), np.float32)  # half of that
    with most_file_bytes(2**18):
        store.append(np.zeros(2**11, np.int64), x, x)
        store.append(np.zeros(2**11, np.int64), x, x)
        with pytest.raises(RecordingError):
            store.append(np.zeros(2**11, np.int64), x, x)


def test_what_lies_in_a_file_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tracemalloc.start()
    try:
        store = FrameStore(Path("a.instep"), 64, 64, 2**20)
        x = np.ones((2**11, 64), np.float32)
        for _ in range(4):
            store.append(np.zeros(2**11, np.int64), x, x)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < x.nbytes + 3 * 2**20 + 2**16, "what is not of x and y is small, and still in memory"


def test_nothing_at_all() -> None:
    found = FrameStore(Path("a.instep"), 3, 2).sequences(np.array([1]), np.zeros(2, np.int64))
    assert (found.x.shape, found.y.shape, found.answered.shape) == ((0, 3), (0, 2), (0,))
    assert found.places(0).tolist() == []


def test_without_room_for_the_temporary_file_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sentence = f"the frames of a.instep are put in order in {tmp_path}, and there is no room for them (File too large)"
    with most_file_bytes(100):
        store = FrameStore(Path("a.instep"), 3, 2, 0)
        with pytest.raises(RecordingError, match=re.escape(sentence) + ".*set TMPDIR"):
            store.append(np.zeros(20, np.int64), np.ones((20, 3), np.float32), None)
        del store
        gc.collect()  # its files are closed without a word


@contextmanager
def most_file_bytes(limit: int) -> Iterator[None]:
    """No file may be larger meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
