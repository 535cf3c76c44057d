from __future__ import annotations

import os
from pathlib import Path

import pytest

from instep.runtime import cores
from instep.runtime.cores import usable_cores


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 cores, 8 of them for this process, which is in the group `a/b`."""
    root = tmp_path / "groups"
    (root / "a" / "b").mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("1:name=systemd:/elsewhere\n0::/a/b\n")
    monkeypatch.setattr(cores, "MEMBERSHIP", membership)
    monkeypatch.setattr(cores, "GROUPS", root)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return root


def test_cores_that_the_process_may_not_run_on_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("max 100000", "max 100000", 8),
        ("max 100000", "200000 100000", 2),
        ("300000 100000", "max 100000", 3),
        ("300000 100000", "400000 100000", 3),
        ("max 100000", "199999 100000", 1),
        ("max 100000", "50000 100000", 1),
        ("max 100000", "1600000 100000", 8),
    ],
)
def test_a_group_may_have_less_time_than_its_cores_give(groups: Path, outer: str, inner: str, expected: int) -> None:
    (groups / "a" / "cpu.max").write_text(outer + "\n")
    (groups / "a" / "b" / "cpu.max").write_text(inner + "\n")
    assert usable_cores() == expected


def test_the_groups_of_a_container_begin_at_the_root(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores.MEMBERSHIP.write_text("0::/\n")
    (groups / "cpu.max").write_text("200000 100000\n")
    assert usable_cores() == 2
    monkeypatch.setattr(cores, "MEMBERSHIP", groups / "no such file")
    assert usable_cores() == 8
