from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instep_client.protocol.wire import F32
from instep_tools.files import read_sequences
from instep_tools.outputs import NoOutputs, PrintedOutputs, check_output_path, open_outputs, save_outputs
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences


def f32(*rows: list[float]) -> F32:
    return np.array(rows, np.float32)


def test_printed_lines_give_every_bit_back(rng: np.random.Generator) -> None:
    y = rng.integers(0, 0x7F800000, (50, 3), np.uint32).view(np.float32)
    texts: list[str] = []
    outputs = PrintedOutputs(texts.append)
    outputs.add("mic", 7, np.zeros((50, 1), np.float32), y)
    lines = "".join(texts).splitlines()
    assert [line.split()[:2] for line in lines] == [["mic", str(7 + step)] for step in range(50)]
    np.testing.assert_array_equal(np.array([line.split()[2:] for line in lines], np.float32), y)
    assert outputs.finish("") == ""


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "y.csv"
    outputs = open_outputs(path)
    outputs.add("a,b", 0, f32([0], [0]), f32([1, 0.1], [2, 3]))
    outputs.add("c", 5, f32([0]), f32([-1e-9, 4]))
    assert outputs.finish("") == f"; saved in {path}"
    assert path.read_text().splitlines() == ["stream,seq,y0,y1", '"a,b",0,1.0,0.1', '"a,b",1,2.0,3.0', "c,5,-1e-09,4.0"]


def test_npz_holds_what_a_check_needs(tmp_path: Path) -> None:
    path = tmp_path / "y.npz"
    outputs = open_outputs(path)
    outputs.add("a", 0, f32([1]), f32([10, 11]))
    outputs.add("b", 0, f32([2], [3]), f32([20, 21], [30, 31]))
    outputs.add("a", 1, f32([4]), f32([40, 41]))
    assert str(path) in outputs.finish("the model")
    read = read_sequences(path)
    assert (read.names, read.lengths.tolist(), read.fingerprint) == (("a", "b"), [2, 2], "the model")
    assert read.frames.ravel().tolist() == [1, 4, 2, 3]
    assert read.outputs is not None
    assert read.outputs[:, 0].tolist() == [10, 40, 20, 30]


def test_nothing_to_save(tmp_path: Path) -> None:
    assert "nothing to save" in open_outputs(tmp_path / "y.npz").finish("")


def test_whole_sequences(tmp_path: Path) -> None:
    sequences = RecordedSequences(("a", "b"), np.array([1, 2]), f32([1], [2], [3]), outputs=f32([10], [20], [30]))
    save_outputs(tmp_path / "s.csv", sequences)
    assert (tmp_path / "s.csv").read_text().split() == ["stream,seq,y0", "a,0,10.0", "b,0,20.0", "b,1,30.0"]
    save_outputs(tmp_path / "s.npz", sequences)
    assert read_sequences(tmp_path / "s.npz").names == ("a", "b")
    with pytest.raises(ValueError, match="no outputs"):
        save_outputs(tmp_path / "s.csv", RecordedSequences(("a",), np.array([1]), f32([1])))


def test_no_outputs() -> None:
    outputs = NoOutputs()
    outputs.add("a", 0, f32([1]), f32([2]))
    assert outputs.finish("") == ""


@pytest.mark.parametrize(
    ("name", "why"), [("y.txt", "must end in .npz or .csv"), ("absent/y.npz", "cannot be written")]
)
def test_bad_paths_are_found_before_the_work(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(BadFile, match=why):
        check_output_path(tmp_path / name)
    with pytest.raises(BadFile, match=why):
        open_outputs(tmp_path / name)
