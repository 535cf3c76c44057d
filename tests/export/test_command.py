from __future__ import annotations

import io
import json
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from instep.cli import app
from instep.export.command import Export, run
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedBatch
from instep_client import AsyncClient
from instep_tools.formats.write import WRITERS, Format
from tests.support.models import with_head
from tests.support.running import running
from tests.support.written import Written, write_recording


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_recording(tmp_path)


def export(path: Path, **options: Any) -> tuple[int, str]:
    file = io.StringIO()
    status = run(Export(path, **options), Console(file=file, width=80))
    return status, file.getvalue()


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_one_line_says_what_was_written(written: Written) -> None:
    status, text = export(written.path, format="csv")
    output = written.path.with_name("a.csv")
    assert status == 0
    assert text == (
        f"{output}: {len(written.rows)} frames of 5 streams, 3 inputs and 2 outputs each, "
        f"{output.stat().st_size:,} bytes\n"
    )
    assert len(output.read_text().splitlines()) > len(written.rows)
    assert names(written.path.parent) == {"a.rec", "a.csv"}


async def test_columns_have_the_names_that_the_served_model_gives_its_outputs(tmp_path: Path) -> None:
    model = replace(with_head(3, 4, 2), output_names=("speech", "silence"))
    recording = {"file": tmp_path / "a.instep"}
    async with running(model, recording=recording) as server, AsyncClient(server.endpoint) as client:
        y = await (await client.open("mic")).step(np.ones(3))
    with RecordingReader(tmp_path / "a.instep") as reader:
        assert reader.header.output_names == ("speech", "silence")
    assert export(tmp_path / "a.instep", format="csv")[0] == 0
    header, row = ((tmp_path / "a.csv").read_text().splitlines())[-2:]
    assert header.split(",")[-2:] == ["speech", "silence"]
    assert [np.float32(cell) for cell in row.split(",")[-2:]] == y.tolist()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"format": "npz"}, "a.npz"),
        ({"output": "b.CSV"}, "b.CSV"),
        ({"output": "b.npz"}, "b.npz"),
        ({"output": "b.NPZ", "format": "npz"}, "b.NPZ"),
        ({"output": "b.data", "format": "npz"}, "b.data"),
        ({"output": "b", "format": "npz"}, "b"),
    ],
)
def test_name_and_format(written: Written, options: dict[str, Any], name: str) -> None:
    if "output" in options:
        options = {**options, "output": written.path.with_name(options["output"])}
    assert export(written.path, **options)[0] == 0
    assert names(written.path.parent) == {"a.rec", name}
    is_npz = (written.path.with_name(name)).read_bytes()[:2] == b"PK"
    assert is_npz == ("npz" in (options.get("format"), name[-3:]))


def test_a_name_that_says_another_format(written: Written) -> None:
    status, text = export(written.path, output=written.path.with_name("k.CSV"), format="npz")
    assert status == 2
    assert text == "not exported: the name 'k.CSV' says another format than --format npz: leave one of them out\n"
    assert names(written.path.parent) == {"a.rec"}


def test_parquet_when_nothing_is_said(written: Written) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    assert export(written.path)[0] == 0
    assert written.path.with_name("a.parquet").read_bytes()[:4] == b"PAR1"


def test_a_name_that_says_no_format(written: Written) -> None:
    status, text = export(written.path, output=written.path.with_name("out.txt"))
    assert status == 2
    assert text == (
        "not exported: the name 'out.txt' says no format: let it end in .parquet, .npz, .csv or .mcap, "
        "or give --format\n"
    )


def test_what_is_not_recorded_is_said(tmp_path: Path) -> None:
    written = write_recording(tmp_path, unanswered=1, finish=False)
    status, text = export(written.path, format="npz")
    assert status == 0
    assert text.startswith(f"{tmp_path / 'a.npz'}: {len(written.rows)} frames of 5 streams, ")
    assert text.endswith(
        f"; the outputs of {written.unanswered} frames are not recorded, and NaN here; the recording was not closed: "
        "exported up to its last commit\n"
    )
    with np.load(tmp_path / "a.npz") as file:
        assert len(file["seq"]) == len(written.rows)


def test_one_of_anything_is_not_many(written: Written) -> None:
    assert ": 0 frames of 1 stream, 3 inputs" in export(written.path, format="csv", streams=["5"])[1]


def test_json_is_one_object_on_standard_output_and_nothing_else(
    written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    output = written.path.with_name("b.csv")
    assert export(written.path, output=output, streams=["mic-1"], json=True) == (0, "")
    assert json.loads(capsys.readouterr().out) == {
        "file": str(written.path),
        "exported": True,
        "output": str(output),
        "format": "csv",
        "frames": len(written.of(1, 3)),
        "streams": 2,
        "features": 3,
        "outputs": 2,
        "unanswered": 0,
        "states": 0,
        "finished": True,
        "bytes": output.stat().st_size,
        "plot": None,
    }


def test_json_of_what_could_not_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "no.rec", format="csv", json=True) == (2, "")
    fields = json.loads(capsys.readouterr().out)
    assert fields.pop("error").startswith("cannot read the recording")
    assert fields == {"file": str(tmp_path / "no.rec"), "exported": False}
    assert names(tmp_path) == set()


def test_a_stream_that_is_not_there(written: Written) -> None:
    status, text = export(written.path, format="csv", streams=["mik-2"])
    assert status == 2
    assert text == "not exported: the recording has no stream 'mik-2'; did you mean 'mic-2' or 'mic-1'?\n"
    assert names(written.path.parent) == {"a.rec"}


def test_the_recording_is_not_written_over(written: Written) -> None:
    before = written.path.read_bytes()
    status, text = export(written.path, output=written.path, format="csv")
    assert status == 2
    assert "exists already and is not written over" in text
    assert written.path.read_bytes() == before


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
    status, text = export(written.path, format="csv")
    assert (status, output.read_text()) == (2, "theirs")
    assert "exists already and is not written over" in text
    assert names(written.path.parent) == {"a.rec", "a.csv"}


def test_a_library_that_is_missing(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, text = export(written.path)
    assert status == 2
    assert 'pip install "instep[export]"' in text
    assert len(text.splitlines()) == 1
    assert names(written.path.parent) == {"a.rec"}


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    for library in {"parquet": ["pyarrow"], "mcap": ["mcap", "google.protobuf"]}.get(found, []):
        pytest.importorskip(library, reason=f"{library} is not installed")
    return found


def test_nothing_is_left_after_ctrl_c(written: Written, format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = RecordingReader.batches

    def interrupted(self: RecordingReader, first: int = 1, last: int | None = None) -> Iterator[RecordedBatch]:
        for batch in batches(self, first, last):
            if batch.position > 30:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(RecordingReader, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(written.path, format=format, chunk_frames=8)
    assert names(written.path.parent) == {"a.rec"}


def test_nothing_is_left_of_a_damaged_recording(written: Written, format: Format) -> None:
    content = bytearray(written.path.read_bytes())
    at = content.rindex(np.array(written.rows[-1].x, "<f4").tobytes())
    content[at] ^= 1
    written.path.write_bytes(content)
    status, text = export(written.path, format=format, chunk_frames=8)
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
        "DELETE FROM outputs",
        "DELETE FROM outputs WHERE batch >= 40",
        "DELETE FROM batches WHERE position >= 40",
        "DELETE FROM batches WHERE position >= 40 AND position <= 44",
        "DELETE FROM openings WHERE stream = 5",
        "DELETE FROM events",
    ],
)
def test_rows_that_are_missing_are_damage_and_nothing_is_written(written: Written, query: str) -> None:
    lost(written.path, query)
    status, text = export(written.path, format="csv")
    assert status == 2
    assert f"{written.path} is damaged: " in text
    assert "instep recordings repair" in text
    assert names(written.path.parent) == {"a.rec"}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX systems do")
def test_nothing_is_left_when_there_is_no_room(written: Written, format: Format) -> None:
    longest_name = written.path.with_name("r" * 255)
    assert export(written.path, format=format, output=longest_name)[0] == 0
    longest_name.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        status, text = export(written.path, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert text == f"not exported: cannot write {written.path.with_name(f'a.{format}')}: File too large\n"
    assert names(written.path.parent) == {"a.rec"}


def test_the_command_line(written: Written) -> None:
    output = written.path.with_name("b.out")
    arguments = ["export", str(written.path), "--format", "csv", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--stream", "1", "--stream", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == len(written.of(1, 4))
    assert output.exists()
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_torch_is_not_needed(written: Written) -> None:
    script = "import sys; sys.modules['torch'] = None; from instep.cli import main; main()"
    command = [sys.executable, "-c", script, "export", str(written.path), "--format", "csv"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
