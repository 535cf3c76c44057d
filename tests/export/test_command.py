from __future__ import annotations

import io
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.export.command import Export, run
from instep.program import app
from instep.recording.errors import RecordingError, with_advice
from instep.recording.reader import RecordingReader
from instep_client import AsyncClient
from instep_tools.formats.write import WRITERS, Format
from instep_tools.problems import CommandProblem
from tests.support.models import with_head
from tests.support.running import running
from tests.support.written import Written, write_recording


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_recording(tmp_path)


def export(path: Path, kind: str = "csv", **options: Any) -> tuple[int, str]:
    file = io.StringIO()
    options = {"output": path.with_name(f"a.{kind}"), **options}
    try:
        run(Export(path, **options), Console(file=file, width=80))
    except (CommandProblem, RecordingError) as error:
        return 2, f"{with_advice(error)}\n"
    return 0, file.getvalue()


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_one_line_says_what_was_written(written: Written) -> None:
    assert export(written.path, streams=["1", "2"]) == (
        0,
        f"{written.path.with_name('a.csv')}: {len(written.of(1, 4))} frames of 2 streams, 3 inputs and 2 outputs "
        "each\n",
    )
    assert names(written.path.parent) == {"a.rec", "a.csv"}


def test_the_name_says_the_format(written: Written) -> None:
    for name in ("b.CSV", "b.npz"):
        assert export(written.path, output=written.path.with_name(name))[0] == 0
        assert (written.path.with_name(name).read_bytes()[:2] == b"PK") == (name == "b.npz")
    status, text = export(written.path, output=written.path.with_name("out.txt"))
    assert (status, "must end in" in text) == (2, True)
    assert names(written.path.parent) == {"a.rec", "b.CSV", "b.npz"}


def test_parquet_when_nothing_is_said(written: Written) -> None:
    assert CliRunner().invoke(app, ["export", str(written.path)]).exit_code == 0
    assert written.path.with_name("a.parquet").read_bytes()[:4] == b"PAR1"


async def test_columns_have_the_names_that_the_served_model_gives_its_outputs(tmp_path: Path) -> None:
    model = replace(with_head(3, 4, 2), output_names=("speech", "silence"))
    recording = {"path": tmp_path / "a.instep"}
    async with running(model, recording=recording) as server, AsyncClient(server.endpoint) as client:
        y = await (await client.open("mic")).step(np.ones(3))
    with RecordingReader(tmp_path / "a.instep") as reader:
        assert reader.header.output_names == ("speech", "silence")
    assert export(tmp_path / "a.instep")[0] == 0
    header, row = ((tmp_path / "a.csv").read_text().splitlines())[-2:]
    assert header.split(",")[-2:] == ['"speech"', '"silence"']
    assert [np.float32(cell) for cell in row.split(",")[-2:]] == y.tolist()


def test_what_is_not_recorded_is_said(tmp_path: Path) -> None:
    written = write_recording(tmp_path, unanswered=1, finish=False)
    status, text = export(written.path, "npz")
    assert status == 0
    assert text.startswith(f"{tmp_path / 'a.npz'}: {len(written.rows)} frames of 5 streams, ")
    assert text.endswith(
        f"; the outputs of {written.unanswered} frames are not recorded, and NaN here; the recording was not closed: "
        "exported up to its last commit\n"
    )
    with np.load(tmp_path / "a.npz") as file:
        assert len(file["seq"]) == len(written.rows)


def test_the_recording_is_not_written_over(written: Written) -> None:
    before, path = written.path.read_bytes(), written.path.with_name("a.csv")
    status, text = export(written.path.rename(written.path.with_name("a.csv")))
    assert status == 2
    assert "exists already and is not written over" in text
    assert path.read_bytes() == before


def test_a_file_that_is_made_at_the_last_moment_is_not_written_over(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = written.path.with_name("a.csv")

    def after_theirs(give_name: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        def give_it(path: Path, other: Path) -> object:
            output.write_text("theirs")
            return give_name(path, other)

        return give_it

    for name in ("rename", "hardlink_to"):
        monkeypatch.setattr(Path, name, after_theirs(getattr(Path, name)))
    status, text = export(written.path)
    assert (status, output.read_text()) == (2, "theirs")
    assert "exists already and is not written over" in text
    assert names(written.path.parent) == {"a.rec", "a.csv"}


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


def test_nothing_is_left_of_a_damaged_recording(written: Written, format: Format) -> None:
    content = bytearray(written.path.read_bytes())
    at = content.rindex(np.array(written.rows[-1].x, "<f4").tobytes())
    content[at] ^= 1
    written.path.write_bytes(content)
    status, text = export(written.path, format, part_frames=8)
    assert status == 2
    assert "does not match its CRC" in text
    assert text.endswith(f"; what comes before the damage is saved by: instep recordings repair {written.path}\n")
    assert names(written.path.parent) == {"a.rec"}


def lost(path: Path, query: str) -> None:
    """Rows go as damage to a page takes them: without a trace."""
    database = sqlite3.connect(path, isolation_level=None)
    assert database.execute(query).rowcount > 0
    database.close()


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM batches WHERE position >= 40 AND position <= 44",
        "DELETE FROM events",
    ],
)
def test_rows_that_are_missing_are_damage_and_nothing_is_written(written: Written, query: str) -> None:
    lost(written.path, query)
    status, text = export(written.path)
    assert status == 2
    assert f"{written.path} is damaged: " in text
    assert "instep recordings repair" in text
    assert names(written.path.parent) == {"a.rec"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX systems do")
def test_nothing_is_left_when_there_is_no_room(written: Written, format: Format) -> None:
    longest_name = written.path.with_name(f"{'r' * (254 - len(format))}.{format}")
    assert export(written.path, output=longest_name)[0] == 0
    longest_name.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        status, text = export(written.path, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert text == f"{written.path.with_name(f'a.{format}')} cannot be written: File too large\n"
    assert names(written.path.parent) == {"a.rec"}


def test_torch_is_not_needed(written: Written) -> None:
    script = "import sys; sys.modules['torch'] = None; from instep.program import main; main()"
    command = [
        sys.executable,
        "-c",
        script,
        "export",
        str(written.path),
        "--output",
        str(written.path.with_suffix(".csv")),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
