from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_tools.files import is_numpy, read_sequences, save_sequences
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences


def parts(sequences: RecordedSequences) -> dict[str, list[list[float]]]:
    ends = np.cumsum(sequences.lengths)
    return {
        name: sequences.frames[start:end].tolist()
        for name, start, end in zip(sequences.names, sequences.starts, ends, strict=True)
    }


def test_npz_of_frames_and_lengths(tmp_path: Path, rng: np.random.Generator) -> None:
    frames = rng.standard_normal((9, 2)).astype(np.float32)
    np.savez(tmp_path / "mics.npz", frames=frames, lengths=np.array([4, 0, 5], np.int32), speaker=np.array([1, 2, 3]))
    sequences = read_sequences(tmp_path / "mics.npz")
    assert parts(sequences) == {"mics-0": frames[:4].tolist(), "mics-2": frames[4:].tolist()}
    assert sequences.frames.dtype == np.float32
    assert sequences.features == 2
    assert len(sequences) == 2
    assert sequences.outputs is None
    assert sequences.times_s is None
    assert sequences.fingerprint is None


def test_npz_of_one_array_a_stream(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", left=np.arange(4).reshape(2, 2), right=np.arange(6.0).reshape(3, 2))
    assert parts(read_sequences(tmp_path / "a.npz")) == {"left": [[0, 1], [2, 3]], "right": [[0, 1], [2, 3], [4, 5]]}


def test_arrays_of_two_and_of_three_dimensions(tmp_path: Path) -> None:
    block = np.arange(12, dtype=np.float64).reshape(2, 3, 2)
    np.save(tmp_path / "b.npy", block)
    np.savez(tmp_path / "b.npz", block)
    np.save(tmp_path / "c.npy", np.asfortranarray(block[1]))
    assert parts(read_sequences(tmp_path / "b.npy")) == {"b-0": block[0].tolist(), "b-1": block[1].tolist()}
    assert list(parts(read_sequences(tmp_path / "b.npz"))) == ["arr_0-0", "arr_0-1"]
    whole = read_sequences(tmp_path / "c.npy")
    assert parts(whole) == {"c": block[1].tolist()}
    assert whole.frames.flags.c_contiguous


def test_many_sequences_are_numbered_so_that_they_sort(tmp_path: Path) -> None:
    np.save(tmp_path / "n.npy", np.zeros((11, 1, 1)))
    names = read_sequences(tmp_path / "n.npy").names
    assert names[0] == "n-00"
    assert list(names) == sorted(names)


def test_lines_of_one_and_of_many_streams(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("\ufeff# two numbers\n1,2\n3 4\n", encoding="utf-8")
    (tmp_path / "many.txt").write_text("stream,time_s,x\na,0,1\nb,0.5,2\na,1,3\n")
    assert parts(read_sequences(tmp_path / "one.csv")) == {"one": [[1, 2], [3, 4]]}
    many = read_sequences(tmp_path / "many.txt")
    assert parts(many) == {"a": [[1], [3]], "b": [[2]]}
    assert many.times_s is not None
    assert many.times_s.tolist() == [0, 1, 0.5]


def test_what_is_saved_is_read_again(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = RecordedSequences(
        names=("x", "y"),
        lengths=np.array([2, 1]),
        frames=rng.standard_normal((3, 2), np.float32),
        outputs=rng.standard_normal((3, 4), np.float32),
        times_s=np.array([0.5, 1.5, 0.25]),
        initial_states={1: rng.standard_normal((1, 4), np.float32)},
        fingerprint="abc",
    )
    save_sequences(tmp_path / "s.npz", saved)
    read = read_sequences(tmp_path / "s.npz")
    assert (read.names, read.lengths.tolist(), read.fingerprint) == (("x", "y"), [2, 1], "abc")
    for one, other in [(read.frames, saved.frames), (read.outputs, saved.outputs), (read.times_s, saved.times_s)]:
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one, other)
    assert list(read.initial_states) == [1]
    np.testing.assert_array_equal(read.initial_states[1], saved.initial_states[1])
    plain = replace(saved, outputs=None, times_s=None, initial_states={}, fingerprint=None)
    save_sequences(tmp_path / "p.npz", plain)
    with np.load(tmp_path / "p.npz") as archive:
        assert sorted(archive.files) == ["frames", "lengths", "names"]


F32 = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({}, "holds no frames"),
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
        ({"frames": F32, "lengths": np.array([[3]])}, "'lengths' must be integers [*]"),
        ({"frames": F32, "lengths": [3], "names": np.array(["a", "b"])}, "'names' must be text [1], it is <U1 [2]"),
        ({"frames": F32, "lengths": [3], "names": np.array([1])}, "'names' must be text"),
        ({"frames": F32, "lengths": [3], "outputs": np.zeros((3, 1))}, "'outputs' must be float32 [3, *]"),
        ({"frames": F32, "lengths": [3], "outputs": np.zeros((2, 1), np.float32)}, "it is float32 [2, 1]"),
        ({"frames": F32, "lengths": [3], "times_s": np.zeros(2)}, "'times_s' must be numbers [3]"),
        ({"frames": F32, "lengths": [3], "times_s": np.array([0, 2, 1])}, "never go back"),
        ({"frames": F32, "lengths": [3], "times_s": np.array([0, 1, np.inf])}, "must be finite"),
        (
            {"frames": F32, "lengths": [3], "initial_states": np.zeros((2, 2), np.float32)},
            "one state for each of the 1",
        ),
        ({"frames": F32, "lengths": [3], "initial_states.h": np.float32(1)}, "one state for each of the 1"),
        ({"frames": F32, "lengths": [3], "fingerprint": np.array([1])}, "'fingerprint' must be text []"),
    ],
)
def test_bad_npz_says_what_is_wrong(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadFile) as failure:
        read_sequences(tmp_path / "bad.npz")
    assert why in str(failure.value)
    assert str(tmp_path / "bad.npz") in str(failure.value)


def test_times_may_go_back_from_one_stream_to_the_next(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", frames=F32, lengths=[2, 1], times_s=np.array([5, 6, 0]))
    times_s = read_sequences(tmp_path / "t.npz").times_s
    assert times_s is not None
    assert times_s.tolist() == [5, 6, 0]


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.npz", b"", "cannot be read"),
        ("a.npz", b"PK\x03\x04 cut off", "cannot be read"),
        ("a.npy", b"\x93NUMPY\x01\x00", "cannot be read"),
        ("a.npy", b"something else", "cannot be read"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read"),
        ("a.csv", b"", "holds no frames"),
        ("a.csv", b"x,y\n", "holds no frames"),
        ("a.csv", b"1 2\n3\n4 x\n5 6\n", "line 2: it has 1 number, a frame has 2; line 3: 'x' is not a number"),
        ("a.csv", b"1 2\n" + b"x\n" * 9, "line 6: it has 1 number, a frame has 2; and 4 more"),
        ("a.csv", b"time_s,x\n2,0\n1,0\n", "never go back"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadFile) as failure:
        read_sequences(tmp_path / name)
    assert why in str(failure.value)


@pytest.mark.parametrize("name", ["absent.npz", "absent.csv"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadFile, match="cannot be read: No such file"):
        read_sequences(tmp_path / name)


def test_what_holds_arrays_is_told_by_the_name() -> None:
    assert is_numpy(Path("a.NPZ"))
    assert is_numpy(Path("a.npy"))
    assert not is_numpy(Path("npy"))


def test_selecting_and_keeping(rng: np.random.Generator) -> None:
    frames = rng.standard_normal((6, 1), np.float32)
    sequences = RecordedSequences(
        names=("a", "b", "c"),
        lengths=np.array([1, 2, 3]),
        frames=frames,
        outputs=frames * 2,
        times_s=np.arange(6.0),
        opened_s=np.array([7.0, 8.0, 9.0]),
        initial_states={2: np.ones((1, 1), np.float32)},
    )
    chosen = sequences.select([2, 0])
    assert parts(chosen) == {"c": frames[3:].tolist(), "a": frames[:1].tolist()}
    assert chosen.outputs is not None
    np.testing.assert_array_equal(chosen.outputs, chosen.frames * 2)
    assert chosen.times_s is not None
    assert chosen.opened_s is not None
    assert (chosen.times_s.tolist(), chosen.opened_s.tolist()) == ([3, 4, 5, 0], [9, 7])
    assert list(chosen.initial_states) == [0]
    kept = sequences.keep(np.array([0, 1, 0, 1, 1, 0], np.bool_))
    assert parts(kept) == {"b": frames[1:2].tolist(), "c": frames[3:5].tolist()}
    assert kept.times_s is not None
    assert kept.times_s.tolist() == [1, 3, 4]
    assert list(kept.initial_states) == [1]
    assert len(sequences.keep(np.zeros(6, np.bool_))) == 0
