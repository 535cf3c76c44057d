"""Files of answers that are saved: complete or not at all, and never at the price of an older file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.wire import F32
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.formats.table import CHUNK_FRAMES
from instep_tools.formats.write import WRITERS, Format, SavedOutputs
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile, CommandProblem, Exit
from instep_tools.send import SendJob, send
from instep_tools.sequences import RecordedSequences
from tests.support.fake_server import INFO, FakeServer, reference
from tests.support.small_files import files_of_at_most
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table
from tests.tools.sending import SendRun, lines_of


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


async def test_lines_keep_the_older_file_until_the_new_one_is_complete(
    tmp_path: Path, rng: np.random.Generator, format: Format
) -> None:
    (tmp_path / "out").mkdir()
    file, link = tmp_path / "out" / f"keep.{format}", tmp_path / "out" / f"link.{format}"
    link.symlink_to(file)
    file.write_text("older")
    x = rng.standard_normal((2560, 3)).astype(np.float32)
    (tmp_path / "in").write_text(
        "".join(f"{'abcd'[row % 4]} {line}" for row, line in enumerate(lines_of(x).splitlines(True)))
    )
    lines: dict[str, Any] = {"stdin": tmp_path / "in", "choice": Choice(named=True), "output": link}
    with files_of_at_most(30_000), pytest.raises(BadFile, match="File too large"):
        await SendRun()(**lines)
    assert (file.read_text(), len(os.listdir(tmp_path / "out"))) == ("older", 2)
    assert await SendRun()(**lines) == Exit.OK
    assert read_sequences(file).lengths.tolist() == [640] * 4
    assert (link.is_symlink(), len(os.listdir(tmp_path / "out"))) == (True, 2)


def save(path: Path, *blocks: F32 | Exception) -> None:
    with SavedOutputs(path, INFO) as saved:
        for number, block in enumerate(blocks):
            if isinstance(block, Exception):
                raise block
            saved.add("a", number * len(block), block, block[:, :2])


def test_a_file_whose_disk_fills_up_midway_is_not_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((CHUNK_FRAMES, 3)).astype(np.float32)
    (tmp_path / "y.csv").write_text("older")
    with files_of_at_most(30_000), pytest.raises(BadFile, match="File too large"):
        save(tmp_path / "y.csv", x, x, x)
    assert (os.listdir(tmp_path), (tmp_path / "y.csv").read_text()) == (["y.csv"], "older")


def test_what_has_come_until_a_failure_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        save(tmp_path / "y.csv", np.ones((2, 3), np.float32), ConnectionError())
    assert read_sequences(tmp_path / "y.csv").frames.tolist() == [[1, 1, 1]] * 2


def test_without_any_answer_the_older_file_stays(tmp_path: Path) -> None:
    (tmp_path / "y.csv").write_text("older")
    with pytest.raises(ConnectionError):
        save(tmp_path / "y.csv", ConnectionError())
    save(tmp_path / "y.csv")
    assert (os.listdir(tmp_path), (tmp_path / "y.csv").read_text()) == (["y.csv"], "older")


async def test_the_file_that_is_sent_is_not_replaced(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 3)))
    with pytest.raises(CommandProblem):
        await SendRun()(file=tmp_path / "x.npy", output=tmp_path / "x.npy")


async def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "y.csv")
    np.save(tmp_path / "x.npy", np.ones((50, 3)))
    with ThreadPoolExecutor() as threads:
        reading = threads.submit((tmp_path / "y.csv").read_text)
        assert await SendRun()(file=tmp_path / "x.npy", output=tmp_path / "y.csv") == Exit.OK
        assert len(reading.result().splitlines()) == 51


async def test_a_file_keeps_older_files_and_its_result(tmp_path: Path, format: Format) -> None:
    x = np.ones((14, 3), np.float32)
    save_table(tmp_path / "in.npz", RecordedSequences(("a",), np.array([14]), x, reference(x)[0]))
    terminal, keep = RememberingTerminal(as_json=True), tmp_path / f"keep.{format}"
    keep.write_text("older")
    with FakeServer() as server, files_of_at_most(100):
        wanted = SendJob(Target(server.endpoint), file=tmp_path / "in.npz", check=True, output=keep)
        assert await send(wanted, terminal, Stop(), JumpingClock()) == Exit.COULD_NOT_RUN
    values = terminal.json()
    assert (values["saved"], values["check"]["frames"], values["check"]["different"]) == (None, 14, 0)
    assert (keep.read_text(), len(os.listdir(tmp_path))) == ("older", 2)
