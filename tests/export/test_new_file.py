from __future__ import annotations

from pathlib import Path

import pytest

from instep.export.errors import CannotExport
from instep.export.new_file import new_file


def test_it_has_its_name_only_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with new_file(path) as file:
        file.write(b"all")
        assert not path.exists()
        assert [each.parent for each in tmp_path.iterdir()] == [tmp_path]
    assert [each.name for each in tmp_path.iterdir()] == ["a.csv"]
    assert path.read_bytes() == b"all"


def test_it_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with new_file(tmp_path / "a.csv"):
        pass
    assert (tmp_path / "a.csv").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError()])
def test_nothing_is_left_of_what_is_not_complete(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with new_file(tmp_path / "a.csv") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_write_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CannotExport, match=r"cannot write .*a\.csv: No space left"), new_file(tmp_path / "a.csv"):
        raise OSError(28, "No space left on device")
    with pytest.raises(CannotExport, match=r"cannot write .*a\.csv: odd"), new_file(tmp_path / "a.csv"):
        raise OSError("odd")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CannotExport, match=r"cannot write .*a\.csv: No such file or directory"):
        new_file(tmp_path / "no" / "a.csv").__enter__()


@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_over(tmp_path: Path, dangling: bool) -> None:
    path = tmp_path / "a.csv"
    if dangling:
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("mine")
    with pytest.raises(CannotExport, match=r"a\.csv exists already and is not written over: move it, or name another"):
        new_file(path).__enter__()
    assert list(tmp_path.iterdir()) == [path]


def test_nor_what_came_in_the_meantime(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(CannotExport, match="exists already"), new_file(path):
        path.write_text("mine")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "mine"
