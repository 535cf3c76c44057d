"""The cache of object code."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.models.portable import machine
from instep.models.portable.machine import cached, host


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CACHE_FOLDER", str(tmp_path))
    return tmp_path


def test_code_is_made_once(folder: Path) -> None:
    made = iter([b"first", b"second", b"third"])
    assert [cached("key", host(), lambda: next(made)) for _ in range(2)] == [b"first", b"first"]
    assert cached("another key", host(), lambda: next(made)) == b"second"


@pytest.mark.parametrize("damage", [lambda code: b"", lambda code: code[:-1], lambda code: code[:-2] + bytes(2)])
def test_damaged_code_is_made_again(folder: Path, damage: object) -> None:
    assert callable(damage)
    cached("key", host(), lambda: b"the code")
    (file,) = folder.glob("*.o")
    file.write_bytes(damage(file.read_bytes()))
    assert cached("key", host(), lambda: b"made again") == b"made again"
    assert cached("key", host(), lambda: b"never") == b"made again"


def test_without_a_folder_code_is_made_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CACHE_FOLDER", "")
    assert [cached("key", host(), lambda: code) for code in (b"a", b"b")] == [b"a", b"b"]  # noqa: B023
