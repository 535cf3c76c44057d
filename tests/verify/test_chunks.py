from __future__ import annotations

import numpy as np
import pytest

from instep.core.typing import F32, I64, Bool
from instep.recording.frames import Sequences
from instep.verify.chunks import LEAST_FILL, LEAST_ROWS, Chunk, plan_chunks


def stored(rows: I64, lengths: list[int], x: F32, y: F32, answered: Bool) -> Sequences:
    """Sequences of such frames, one after another, which lie anywhere."""
    order = np.random.default_rng(0).permutation(len(x))
    by_place = np.argsort(order)
    counts: I64 = np.array(lengths, np.int64)
    return Sequences(rows, np.cumsum(counts) - counts, counts, order, x[by_place], y[by_place], answered[by_place])


def test_every_sequence_is_in_one_chunk_the_longest_first() -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 1000)
    chunks = list(plan_chunks(lengths, 64))
    assert sorted(np.concatenate(chunks).tolist()) == np.flatnonzero(lengths).tolist()
    for chunk in chunks:
        inside = lengths[chunk]
        assert (np.diff(inside) <= 0).all()
        assert len(chunk) <= 64
    full = [chunk for chunk in chunks if len(chunk) > LEAST_ROWS]
    assert all(lengths[chunk][-1] >= LEAST_FILL * lengths[chunk][0] for chunk in full)


@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [
        ([], []),
        ([0, 0], []),
        ([5], [[0]]),
        ([1, 100, *[1] * 9], [[1, 0, *range(2, 8)], [8, 9, 10]]),  # fewer rows gain nothing
        ([9000] * 65, [[*range(64)], [64]]),
    ],
)
def test_small_plans(lengths: list[int], chunks: list[list[int]]) -> None:
    plan = plan_chunks(np.array(lengths, np.int64), 64)
    assert [chunk.tolist() for chunk in plan] == chunks


def test_large_chunks_fill_vectors_where_sequences_are_left() -> None:
    plan = plan_chunks(np.full(250, 100, np.int64), 70)
    assert [len(chunk) for chunk in plan] == [64, 64, 64, 58]


@pytest.mark.parametrize(
    ("lengths", "most_frames", "blocks"),
    [
        ([9, 8, 8, 7], 100, [4]),
        ([9, 8, 8, 7] * 5, 81, [9, 10, 1]),
        ([9, *[8] * 16, 1], 5, [8, 8, 2]),  # too long for a span: then the least
        ([5] * 40, 170, [32, 8]),
        ([5] * 40, 200, [40]),
        ([5] * 40, 100, [16, 16, 8]),
    ],
)
def test_blocks_are_the_rows_of_a_chunk_as_far_as_they_fit(
    lengths: list[int], most_frames: int, blocks: list[int]
) -> None:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    x = np.arange(offsets[-1], dtype=np.float32)[:, None]
    sequences = stored(np.arange(len(lengths)), lengths, x, -x, np.ones(len(x), np.bool_))
    first_seqs = np.arange(len(lengths)) * 100
    chunk = Chunk(sequences, first_seqs, np.arange(len(lengths)), most_frames)
    found = list(chunk.blocks())
    assert [len(block.rows) for block in found] == blocks
    assert np.concatenate([block.rows for block in found]).tolist() == chunk.rows.tolist()
    for block in found:
        assert block.lengths.tolist() == [lengths[row] for row in block.rows]
        assert block.first_seqs.tolist() == first_seqs[block.rows].tolist()
        span = next(block.spans())
        assert span.x[0, :, 0].tolist() == offsets[:-1][block.rows].tolist()


def test_parts_hold_every_timestep_once() -> None:
    x = np.arange(26, dtype=np.float32).reshape(13, 2)
    sequences = stored(np.arange(2), [8, 5], x, -x, np.arange(13) != 7)
    chunk = Chunk(sequences, np.array([5, 9]), np.arange(2), 1000)
    (span,) = chunk.spans()
    parts = list(span.parts(3))
    assert [part.starts.tolist() for part in parts] == [[5, 9], [8, 12], [11, 15]]
    assert [part.active.tolist() for part in parts] == [[2, 2, 2], [2, 2, 1], [1, 1]]
    for field in ("x", "y", "valid", "answered"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert joined.tobytes() == getattr(span, field).tobytes()


@pytest.mark.parametrize("most_frames", [1, 24, 10_000])
def test_spans_hold_every_frame_once(most_frames: int) -> None:
    lengths = [3, 8, 5]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    x = np.arange(32, dtype=np.float32).reshape(16, 2)
    answered = np.arange(16) % 5 != 0
    sequences = stored(np.array([10, 11, 12]), lengths, x, -x[:, :1], answered)
    chunk = Chunk(sequences, np.array([1000, 1100, 1200]), np.array([1, 2]), most_frames)
    assert chunk.rows.tolist() == [1, 2]
    assert chunk.lengths.tolist() == [8, 5]
    seen: list[tuple[int, int, list[float], list[float], bool]] = []
    for span in chunk.spans():
        assert span.valid.sum(axis=1).tolist() == span.active.tolist()
        assert not span.x[~span.valid].any()
        assert not span.answered[~span.valid].any()
        assert span.valid.size <= max(most_frames, len(chunk.rows))
        for timestep, row in np.argwhere(span.valid).tolist():
            seq = int(span.starts[row]) + timestep
            at = (timestep, row)
            seen.append((row, seq, span.x[at].tolist(), span.y[at].tolist(), bool(span.answered[at])))
    expected = [
        (row, first_seq + frame, x[place].tolist(), (-x[place, :1]).tolist(), bool(place % 5))
        for row, at, first_seq in ((0, 1, 1100), (1, 2, 1200))
        for frame in range(lengths[at])
        for place in [int(offsets[at]) + frame]
    ]
    assert sorted(seen) == sorted(expected)
