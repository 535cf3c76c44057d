"""The page on data: its commands and programs are run, and its tables are those of the files that come out."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from instep.models.folder import make_model, write_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep_client import Client
from instep_tools.app import app as client_app
from instep_tools.formats.mcap_file import frame_schema
from instep_tools.formats.write import WRITERS
from tests.docs.support.page import Page
from tests.docs.support.shell import TypedServer, commands, run
from tests.tools.formats.test_messages import IMU, imu, write

pytestmark = pytest.mark.heavy

PAGE = Page("export.md")
FRAMES = {"mic-7": 5, "mic-8": 4}

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("mcap", reason="mcap is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the commands are typed: a recording that a server still writes, and a bag."""
    folder = tmp_path_factory.mktemp("data")
    description = GruDescription(features=3, gru=GruLayers(hidden_size=4))
    write_model(folder / "small", make_model(description, "random", name="small"))
    channels = {"/imu": ("cdr", "sensor_msgs/msg/Imu", "ros2msg", IMU.encode())}
    write(folder / "bag.mcap", channels, [("/imu", 1, imu("<", range(17)))])
    with TypedServer(["instep", "serve", "small", "--record", "today.instep"], folder) as server:
        with Client(server.endpoint) as client, pytest.MonkeyPatch.context() as environ:
            for name, frames in FRAMES.items():
                stream = client.open(name)
                stream.step(np.arange(3 * frames).reshape(frames, 3))
                stream.close()
            environ.setenv("INSTEP_ENDPOINT", server.endpoint)
            yield folder


def test_its_commands_run_as_written(folder: Path) -> None:
    first, (bag,) = (commands(text) for _, text in PAGE.blocks("sh"))
    said = []
    for command in first:
        done = run(command, folder)
        assert (done.returncode, done.stderr) == (0, ""), command
        said.append(done.stdout)
    assert "9 frames of 2 streams, 3 inputs and 4 outputs each" in said[0]
    assert "all 9 equal the recording, bit for bit" in said[3]
    done = run([*bag[:-1], "angular_velocity"], folder)  # this bag has no acceleration
    assert done.returncode == 0, done.stderr
    assert "1 frame of 1 stream" in done.stdout


def test_its_programs_print_what_they_should(folder: Path) -> None:
    for kind in ("parquet", "npz"):
        if not (folder / f"today.{kind}").exists():
            assert run(["instep", "export", "today.instep", "--output", f"today.{kind}"], folder).returncode == 0
    metadata, recording = (code for _, code in PAGE.blocks("python"))
    for code, printed in (
        (metadata, "small\nportable-1\n"),
        (recording, "['mic-7', 'mic-8'] small\n(5, 3) (5, 4) float32 4 5\n"),
    ):
        (folder / "program.py").write_text(code)
        done = run(["python", "-W", "error", "program.py"], folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(printed)


def test_its_tables_are_those_of_the_code(folder: Path) -> None:
    assert {*PAGE.table("The table", "format").column("format")} == WRITERS.keys()
    run(["instep", "export", "today.instep", "--output", "columns.csv"], folder)
    with (folder / "columns.csv").open(newline="") as file:
        head = next(csv.reader(file))
    documented = [cell.split("`")[0] for cell in PAGE.table("The table", "column").column("column")]
    assert [name for name in head if name in ("stream", "stream_id", "seq", "x0", "y0")] == [
        name for name in documented if name != "time"
    ]
    help_text = {
        name: CliRunner().invoke(client_app, [name, "--help"], env={"COLUMNS": "200"}).stdout
        for name in ("produce", "replay")
    }
    for cell in PAGE.table("Reading files: produce and replay", "option").column("option"):
        option = cell.split()[0].strip("`")
        assert all(option in text for text in help_text.values()), option
    ((_, proto),) = PAGE.blocks("proto")
    for field in frame_schema().file[0].message_type[0].field:
        assert f"{field.name} = {field.number};" in proto
