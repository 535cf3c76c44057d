from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from instep.recording.app import app
from instep.recording.inspection import inspect
from tests.support.forger import Forger
from tests.support.written import write_recording


def repaired(*arguments: object) -> tuple[int, Any]:
    """The exit status and the object of `instep recordings repair`."""
    result = CliRunner().invoke(app, ["repair", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_what_was_saved_and_left_out(tmp_path: Path) -> None:
    forger = Forger(write_recording(tmp_path).path, tmp_path / "b.rec", fix_crc=False)
    forger.change("outputs", 15, time_ns=7)
    status, found = repaired(forger.path)
    inspected = inspect(tmp_path / "b.repaired.rec", lambda _: None)
    assert found.pop("left_out").startswith("positions 15 to ")
    assert (status, found) == (
        0,
        {
            "file": str(forger.path),
            "repaired": True,
            "whole": False,
            "output": str(tmp_path / "b.repaired.rec"),
            "positions": 14,
            "frames": inspected.frames,
            "streams": inspected.streams,
        },
    )


def test_a_recording_that_is_whole(tmp_path: Path) -> None:
    path = write_recording(tmp_path).path
    assert repaired(path) == (0, {"file": str(path), "repaired": False, "whole": True, "output": None})
    assert list(tmp_path.iterdir()) == [path]


def test_why_nothing_was_written(tmp_path: Path) -> None:
    path = tmp_path / "missing.rec"
    status, found = repaired(path, tmp_path / "new.rec")
    assert (status, found.pop("error")) == (2, f"cannot read the recording {path}: there is no such file")
    assert found == {"file": str(path), "repaired": False}
    status, found = repaired(path, "c.rec", "--output", "d.rec")
    assert (status, list(found), "given twice" in found["error"]) == (2, ["error"], True)
