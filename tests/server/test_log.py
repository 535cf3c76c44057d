"""The log on a terminal and in a file."""

from __future__ import annotations

import json
import os
import pty
import re
from pathlib import Path

import pytest

from instep.config import LogConfig
from instep.server.log import make_log


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_the_log_on_a_terminal_is_coloured_unless_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch, no_color: str | None, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal, program = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen, os.fdopen(program, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        make_log(LogConfig()).info("hello", values=(1, 2), nothing=None, text="a b")
        shown = screen.read(200).decode()
    assert ("\x1b" in shown) is coloured
    assert re.sub(r"\x1b\[\d+m", "", shown).endswith(' info hello values=1,2 nothing=none text="a b"\r\n')


def test_a_log_in_a_file_follows_its_name_when_it_is_rotated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, moved = tmp_path / "log", tmp_path / "log.1"
    config = LogConfig(file=file, format="json")
    log = make_log(config)
    log.info("first")
    file.rename(moved)
    log.info("second")
    log.info("third")
    file.unlink()
    log.warning("fourth")
    make_log(config).info("fifth")
    events = [[json.loads(line)["event"] for line in each.read_text().splitlines()] for each in (moved, file)]
    assert events == [["first"], ["fourth", "fifth"]]
    make_log(LogConfig(file=file)).info("recording", file=os.fsdecode(b"\xff.instep"))
    assert file.read_text().endswith("info recording file=\\udcff.instep\n")
    assert capsys.readouterr() == ("", "")
