"""The new files of `cut` and `repair`: they get their names once they are complete, and replace nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from instep.recording import inspection
from instep.recording.copies import cut
from instep.recording.errors import RecordingError
from instep.recording.inspection import Inspection, inspect, recordings_in
from tests.support.written import write_recording


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_recording(tmp_path).path


def while_looked_through(monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], object]) -> None:
    """Let something happen to the new file when it is complete and has no name yet."""

    def look_through(path: Path) -> Inspection:
        happens(path)
        return inspect(path)

    monkeypatch.setattr(inspection, "inspect", look_through)


def has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # as FAT says it

    monkeypatch.setattr(os, "link", link)


def test_a_new_file_gets_its_name_once_it_is_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out.rec", []
    while_looked_through(monkeypatch, lambda part: seen.append((part, out.exists(), recordings_in(tmp_path))))
    cut(source, out, None, None)
    ((part, was_there, listed),) = seen
    assert part.name.startswith(".out.rec.")
    assert not was_there
    assert listed == [source], "one that is not complete is none yet"
    assert set(tmp_path.iterdir()) == {source, out}


def test_a_second_run_for_the_same_file_is_refused_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, refused = tmp_path / "out.rec", []

    def run_again(part: Path) -> None:
        with pytest.raises(RecordingError, match=r"out\.rec is being written by another instep \(pid \d+\)") as error:
            cut(source, out, None, None)
        refused.append(error)

    while_looked_through(monkeypatch, run_again)
    assert cut(source, out, None, None).frames
    assert len(refused) == 1
    assert set(tmp_path.iterdir()) == {source, out}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_made_meanwhile_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        has_no_links(monkeypatch)
    kinds: list[Callable[[Path], object]] = [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
    ]
    for at, make in enumerate(kinds):
        out = tmp_path / f"{at}.rec"
        while_looked_through(monkeypatch, lambda _: make(out))  # noqa: B023 - called in this round
        before = set(tmp_path.iterdir())
        with pytest.raises(RecordingError, match=r"\.rec already exists; a recording is never written over"):
            cut(source, out, None, None)
        assert set(tmp_path.iterdir()) == before | {out}
        assert out.is_symlink() or out.read_text() == "mine"


def test_a_file_that_is_made_at_the_last_moment_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.rec"

    def late(give_name: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def call(part: Path, path: Path) -> None:
            out.write_text("mine")
            give_name(part, path)

        return call

    for name in ("link", "rename"):
        monkeypatch.setattr(os, name, late(getattr(os, name)))
    with pytest.raises(RecordingError, match=r"out\.rec already exists; a recording is never written over"):
        cut(source, out, None, None)
    assert out.read_text() == "mine"
    assert set(tmp_path.iterdir()) == {source, out}


def test_on_a_file_system_without_hard_links(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_no_links(monkeypatch)
    found = cut(source, tmp_path / "out.rec", None, None)
    assert set(tmp_path.iterdir()) == {source, tmp_path / "out.rec"}
    assert inspect(tmp_path / "out.rec").frames == found.frames


def test_a_name_that_leads_nowhere_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[Path] = []
    while_looked_through(monkeypatch, worked.append)
    (tmp_path / "out.rec").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RecordingError, match="already exists"):
        cut(source, tmp_path / "out.rec", None, None)
    assert not worked


def test_a_failure_leaves_nothing_of_a_database(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        Path(f"{path}-journal").touch()  # SQLite leaves it where it cannot roll back
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    while_looked_through(monkeypatch, fail)
    with pytest.raises(RecordingError, match=r"cannot write the recording .*out\.rec: .*Input/output error"):
        cut(source, tmp_path / "out.rec", None, None)
    assert set(tmp_path.iterdir()) == {source}
