from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.problems import BadFile, CommandProblem
from instep_tools.sequences import RecordedSequences


def parts(sequences: RecordedSequences) -> dict[str, list[list[float]]]:
    ends = np.cumsum(sequences.lengths)
    return {
        name: sequences.frames[start:end].tolist()
        for name, start, end in zip(sequences.names, sequences.starts, ends, strict=True)
    }


def test_sequences_end_to_end(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = rng.standard_normal((9, 2)).astype(np.float32)
    np.savez(tmp_path / "mics.npz", frames=frames, lengths=np.array([4, 0, 5], np.int32), speaker=np.array([1, 2, 3]))
    sequences = read_sequences(tmp_path / "mics.npz")
    assert parts(sequences) == {"mics-0": frames[:4].tolist(), "mics-2": frames[4:].tolist()}
    assert (sequences.outputs, sequences.times_ns, sequences.fingerprint) == (None, None, None)
    chosen = read_sequences(tmp_path / "mics.npz", Choice(columns=("x1",), only="*-2"))
    assert parts(chosen) == {"mics-2": frames[4:, 1:].tolist()}


def test_arrays_of_any_name(tmp_path: Path) -> None:
    block = np.arange(12, dtype=np.float64).reshape(2, 3, 2)
    np.savez(tmp_path / "a.npz", left=np.arange(4).reshape(2, 2), right=np.arange(6.0).reshape(3, 2))
    np.save(tmp_path / "b.npy", block)
    np.savez(tmp_path / "b.npz", block)
    np.save(tmp_path / "c", np.asfortranarray(block[1]))
    (tmp_path / "c.npy").rename(tmp_path / "no suffix")
    assert parts(read_sequences(tmp_path / "a.npz")) == {"left": [[0, 1], [2, 3]], "right": [[0, 1], [2, 3], [4, 5]]}
    assert parts(read_sequences(tmp_path / "b.npy")) == {"b-0": block[0].tolist(), "b-1": block[1].tolist()}
    assert list(parts(read_sequences(tmp_path / "b.npz"))) == ["arr_0-0", "arr_0-1"]
    whole = read_sequences(tmp_path / "no suffix")
    assert parts(whole) == {"no suffix": block[1].tolist()}
    assert whole.frames.flags.c_contiguous
    np.save(tmp_path / "n.npy", np.zeros((11, 1, 1)))
    names = list(read_sequences(tmp_path / "n.npy").names)
    assert names[0] == "n-00"
    assert names == sorted(names)


def test_a_table_by_hand(tmp_path: Path) -> None:
    """Only `stream` and `x` must be there."""
    stream, x = np.array(["b", "a", "b"]), np.array([[1], [2], [3]])
    np.savez(tmp_path / "t.npz", stream=stream, x=x)
    assert parts(read_sequences(tmp_path / "t.npz")) == {"b": [[1], [3]], "a": [[2]]}
    y = np.array([[5, 6], [7, 8], [np.nan, np.nan]], np.float32)
    np.savez(tmp_path / "u.npz", stream=stream, x=x, y=y, seq=[1, 0, 0], stream_id=[3, 3, 3], time_ns=[9, 0, 8])
    read = read_sequences(tmp_path / "u.npz")
    assert parts(read) == {"b": [[3], [1]], "a": [[2]]}
    assert read.answered is not None
    assert read.times_ns is not None
    assert (read.answered.tolist(), read.times_ns.tolist()) == ([False, True, True], [8, 9, 0])
    swapped = read_sequences(tmp_path / "u.npz", Choice(columns=("y1", "x0"), only="a"))
    assert parts(swapped) == {"a": [[8, 2]]}


F32 = np.zeros((3, 2), np.float32)
TABLE = {"stream": np.array(["a"] * 3), "x": F32}


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"a": np.zeros((0, 2))}, "holds no frames"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}, "different widths"),
        ({"a": np.zeros(3)}, "'a' must be numbers [T, features]"),
        ({"a": np.zeros((3, 0))}, "it is float64 [3, 0]"),
        ({"a": np.array([["x"]])}, "it is <U1 [1, 1]"),
        ({"a": np.zeros((1, 2), complex)}, "it is complex128"),
        ({"a": np.array([[None]])}, "allow_pickle"),
        ({"a": np.array([[0.0, np.nan]])}, "frame 0 of 'a' is not finite"),
        ({"a": np.zeros((1, 1)), "b": np.array([[0], [1e39]])}, "frame 1 of 'b' is not finite in float32"),
        ({"frames": F32, "lengths": np.array([1, 1])}, "must add up to the 3 rows of 'frames', not 2"),
        ({"frames": F32, "lengths": np.array([4, -1])}, "must add up"),
        ({"frames": F32, "lengths": np.array([3.0])}, "'lengths' must be integers [*], it is float64 [1]"),
        ({**TABLE, "stream": np.array(["a", "b"])}, "'stream' must be text [3], it is <U1 [2]"),
        ({**TABLE, "stream": np.zeros(3)}, "'stream' must be text"),
        ({**TABLE, "y": np.zeros((3, 1))}, "'y' must be float32 [3, *]"),
        ({**TABLE, "y": np.zeros((2, 1), np.float32)}, "it is float32 [2, 1]"),
        ({**TABLE, "time_ns": np.zeros(3)}, "'time_ns' must be integers [3]"),
        ({**TABLE, "time_ns": np.array([0, 2, 1])}, "never go back"),
        ({**TABLE, "seq": np.array([0, 1, 3])}, "stream 'a' has frame 3 where frame 2 belongs"),
        ({**TABLE, "metadata": np.array(b"{")}, "cannot be read"),
        ({**TABLE, "metadata": np.array(b'{"inputs": 1}')}, "its metadata is damaged"),
        ({**TABLE, "metadata": np.array(b"[1]")}, "its metadata is damaged"),
        ({**TABLE, "metadata": np.array(b'{"states": "[[1, 0, null]]", "state": "[]"}')}, "cannot be read"),
    ],
)
def test_bad_arrays_say_what_is_wrong(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadFile) as failure:
        read_sequences(tmp_path / "bad.npz")
    assert why in str(failure.value)
    assert str(tmp_path / "bad.npz") in str(failure.value)


def test_choices_that_arrays_do_not_have(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", F32)
    for choice, why in (
        (Choice(named=True), "--named is for text and Parquet, whose first column names the stream"),
        (Choice(time="t"), "--time names a column of text or Parquet"),
        (Choice(columns=("x5",)), "there is no column 'x5'; its columns are x0, x1"),
        (Choice(only="b*"), "no stream's name fits 'b*'; the first one is called 'a'"),
    ):
        with pytest.raises(CommandProblem) as failure:
            read_sequences(tmp_path / "a.npy", choice)
        assert why in str(failure.value)


def test_selecting_and_keeping(rng: np.random.Generator) -> None:
    frames = rng.standard_normal((6, 1), np.float32)
    sequences = RecordedSequences(
        names=("a", "b", "c"),
        lengths=np.array([1, 2, 3]),
        frames=frames,
        outputs=frames * 2,
        times_ns=np.arange(6),
        opened_ns=np.array([7, 8, 9]),
        initial_states={2: np.ones((1, 1), np.float32)},
    )
    chosen = sequences.select([2, 0])
    assert parts(chosen) == {"c": frames[3:].tolist(), "a": frames[:1].tolist()}
    assert chosen.outputs is not None
    np.testing.assert_array_equal(chosen.outputs, chosen.frames * 2)
    assert chosen.times_ns is not None
    assert chosen.opened_ns is not None
    assert (chosen.times_ns.tolist(), chosen.opened_ns.tolist()) == ([3, 4, 5, 0], [9, 7])
    assert list(chosen.initial_states) == [0]
    kept = sequences.keep(np.array([0, 1, 0, 1, 1, 0], np.bool_))
    assert parts(kept) == {"b": frames[1:2].tolist(), "c": frames[3:5].tolist()}
    assert kept.times_ns is not None
    assert kept.times_ns.tolist() == [1, 3, 4]
    assert list(kept.initial_states) == [1]
    assert len(sequences.keep(np.zeros(6, np.bool_))) == 0
