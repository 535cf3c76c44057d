"""Which kind of file it is, told by its content."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from instep_tools.formats.columns import Choice
from instep_tools.formats.read import holds_lines, read_sequences
from instep_tools.formats.write import check_output_path
from instep_tools.problems import BadFile, CommandProblem


def make_strangers(folder: Path) -> dict[str, str]:
    """Files that cannot be read, and what is said of each."""
    torch.save({"w": torch.zeros(2)}, folder / "net.pt")
    torch.save({"w": torch.zeros(2)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file({"w": torch.zeros(2)}, folder / "net.safetensors")
    (folder / "x.pkl").write_bytes(pickle.dumps([1, 2]))
    with gzip.open(folder / "x.csv.gz", "w") as file:
        file.write(b"1 2")
    with zipfile.ZipFile(folder / "x.xlsx", "w") as archive:
        archive.writestr("sheet.xml", "x")
    (folder / "x.bin").write_bytes(bytes(range(256)))
    (folder / "utf16.csv").write_text("1 2", encoding="utf-16")
    (folder / "latin.csv").write_bytes("é 1".encode("latin-1"))
    (folder / "empty.npz").touch()
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 cut off")
    (folder / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (folder / "cut.parquet").write_bytes(b"PAR1 cut off")
    (folder / "cut.mcap").write_bytes(b"\x89MCAP0\r\n\x01 cut off")
    return {
        "net.pt": "is a PyTorch file: save its frames with numpy.savez",
        "old.pt": "is a pickle",
        "net.safetensors": "is a safetensors file",
        "x.pkl": "is a pickle",
        "x.csv.gz": "is compressed by gzip",
        "x.xlsx": "is a zip archive, but no NPZ",
        "x.bin": "is a binary file of another kind",
        "utf16.csv": "is text in UTF-16",
        "latin.csv": "is not UTF-8 text",
        "empty.npz": "is empty",
        "cut.npz": "cannot be read",
        "cut.npy": "cannot be read",
        "cut.parquet": "cannot be read",
        "cut.mcap": "cannot be read",
        "absent.csv": "cannot be read: No such file or directory",
    }


def test_files_that_cannot_be_read_are_a_sentence_each(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pytest.importorskip("mcap", reason="mcap is not installed")
    for name, why in make_strangers(tmp_path).items():
        with pytest.raises(BadFile) as failure:
            read_sequences(tmp_path / name)
        assert str(failure.value).startswith(f"{tmp_path / name} {why}")
        assert len(str(failure.value).splitlines()) == 1
        if why.startswith("is a"):
            assert "recordings, CSV and other text, NPZ, NPY, Parquet and MCAP can be read" in str(failure.value)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((1, 2)))
    shutil.copy(tmp_path / "a.npy", tmp_path / "b.csv")
    (tmp_path / "c.npy").write_text("1 1\n")
    for name in ("a.npy", "b.csv", "c.npy"):
        assert read_sequences(tmp_path / name).frames.tolist() == [[1, 1]]
        assert holds_lines(tmp_path / name) == (name == "c.npy")


@pytest.mark.parametrize(("start", "library"), [(b"PAR1", "pyarrow"), (b"\x89MCAP0\r\n", "mcap.reader")])
def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, library: str) -> None:
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "x").write_bytes(start)
    with pytest.raises(
        CommandProblem, match=rf'needs the library {library}, which is not installed.*"instep\[export\]"'
    ):
        read_sequences(tmp_path / "x")


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    columns = {
        "stream": pa.array(["b", "a", "b"]).dictionary_encode(),
        "left": pa.array([1, 2, 3], pa.int16()),
        "right": pa.array([0.5, 0.25, 1.0], pa.float64()),
        "time": pa.array([1, 2, 3], pa.timestamp("us")),
        "label": pa.array(["x", "y", "z"]),
        "gaps": pa.array([1.0, None, 3.0]),
        "day": pa.array([1.5, 2, 3]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    read = read_sequences(tmp_path / "p.parquet", Choice(columns=("right", "left")))
    assert (read.names, read.lengths.tolist()) == (("b", "a"), [2, 1])
    assert read.frames.tolist() == [[0.5, 1], [1, 3], [0.25, 2]]
    assert read.times_ns is not None
    assert read.times_ns.tolist() == [1000, 3000, 2000]
    by_day = read_sequences(tmp_path / "p.parquet", Choice(columns=("left",), time="day", only="a"))
    assert by_day.times_ns is not None
    assert by_day.times_ns.tolist() == [2 * 10**9]
    for choice, why in (
        (Choice(), "the column 'label' must be numbers and have no gaps, it is string; name the frame's columns"),
        (Choice(columns=("gaps",)), "frame 0 of 'a' is not finite"),
        (Choice(columns=("left",), time="label"), "the column 'label' must be times or numbers"),
        (Choice(columns=("leftt",)), "there is no column 'leftt'; did you mean 'left'"),
    ):
        with pytest.raises(CommandProblem) as failure:
            read_sequences(tmp_path / "p.parquet", choice)
        assert why in str(failure.value)
    devices = pa.table({"device": pa.array(["left", "right", "left"]), "stream": [7, 8, 9], "f0": [1, 2, 3]})
    parquet.write_table(devices, tmp_path / "devices.parquet")
    for choice in (Choice(named=True), Choice(named=True, columns=("f0",))):
        named = read_sequences(tmp_path / "devices.parquet", choice)
        assert (named.names, named.frames.tolist()) == (("left", "right"), [[1], [3], [2]])
    parquet.write_table(pa.table({"a": [1.0, 2.0]}), tmp_path / "one.parquet")
    assert read_sequences(tmp_path / "one.parquet").names == ("one",)


def test_where_nothing_can_be_written_is_found_out_before_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, why in (
        ("y.txt", "must end in .csv, .npz, .parquet or .mcap"),
        ("absent/y.npz", f"cannot be written: there is no folder {tmp_path / 'absent'}"),
        ("folder.csv", "cannot be written: it is a folder"),
    ):
        with pytest.raises(BadFile) as failure:
            check_output_path(tmp_path / name)
        assert why in str(failure.value)
    assert check_output_path(tmp_path / "y.CSV") == "csv"
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]
    with pytest.raises(BadFile, match="cannot be written: File name too long"):
        check_output_path(tmp_path / f"{'y' * 300}.csv")
    (tmp_path / "circle.csv").symlink_to("circle.csv")
    assert check_output_path(tmp_path / "circle.csv") == "csv"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(BadFile, match=r"y.csv cannot be written: you have no permission to make a file in its folder"):
        check_output_path(tmp_path / "y.csv")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "folder.csv")
    (tmp_path / "folder.csv").rmdir()
    with pytest.raises(BadFile, match=r"^y.csv cannot be written: No such file or directory"):
        check_output_path(Path("y.csv"))
