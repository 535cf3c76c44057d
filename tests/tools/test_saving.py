"""Files of answers that are saved: complete or not at all, and never at the price of an older file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from instep_tools.connect import Target
from instep_tools.formats.read import read_sequences
from instep_tools.formats.table import CHUNK_FRAMES
from instep_tools.formats.write import WRITERS, Format, SavedOutputs
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile, Exit
from instep_tools.replay import ReplayJob, replay
from instep_tools.sequences import RecordedSequences
from tests.support.fake_server import INFO, FakeServer, reference
from tests.support.small_files import files_of_at_most
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table
from tests.tools.producing import ProduceRun


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


async def test_a_producer_keeps_the_older_file_until_the_new_one_is_complete(
    tmp_path: Path, rng: np.random.Generator, format: Format
) -> None:
    (tmp_path / "out").mkdir()
    file, link = tmp_path / "out" / f"keep.{format}", tmp_path / "out" / f"link.{format}"
    link.symlink_to(file)
    file.write_text("older")
    np.save(tmp_path / "x.npy", rng.standard_normal((4, 640, 3)))
    with files_of_at_most(30_000), pytest.raises(BadFile, match="File too large"):
        await ProduceRun()(file=tmp_path / "x.npy", save=link)
    assert (file.read_text(), len(os.listdir(tmp_path / "out"))) == ("older", 2)
    assert await ProduceRun()(file=tmp_path / "x.npy", save=link) == Exit.OK
    assert read_sequences(file).lengths.tolist() == [640] * 4
    assert (link.is_symlink(), len(os.listdir(tmp_path / "out"))) == (True, 2)


def test_a_file_whose_disk_fills_up_midway_is_not_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((CHUNK_FRAMES, 3)).astype(np.float32)
    (tmp_path / "y.csv").write_text("older")

    def save() -> None:
        with SavedOutputs(tmp_path / "y.csv", INFO) as saved:
            for seq in range(3):
                saved.add("a", seq * len(x), x, x[:, :2])

    with files_of_at_most(30_000), pytest.raises(BadFile, match="File too large"):
        save()
    assert (os.listdir(tmp_path), (tmp_path / "y.csv").read_text()) == (["y.csv"], "older")


def test_what_has_come_until_a_failure_is_saved(tmp_path: Path) -> None:
    x = np.ones((2, 3), np.float32)

    def save() -> None:
        with SavedOutputs(tmp_path / "y.csv", INFO) as saved:
            saved.add("a", 0, x, x[:, :2])
            raise ConnectionError

    with pytest.raises(ConnectionError):
        save()
    assert read_sequences(tmp_path / "y.csv").frames.tolist() == x.tolist()


async def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "y.csv")
    np.save(tmp_path / "x.npy", np.ones((50, 3)))
    with ThreadPoolExecutor() as threads:
        reading = threads.submit((tmp_path / "y.csv").read_text)
        assert await ProduceRun()(file=tmp_path / "x.npy", save=tmp_path / "y.csv") == Exit.OK
        assert len(reading.result().splitlines()) == 51


async def test_a_replay_keeps_older_files_and_its_result(
    tmp_path: Path, rng: np.random.Generator, format: Format
) -> None:
    x = rng.integers(-5, 6, (14, 3)).astype(np.float32)
    recorded = RecordedSequences(("a", "b"), np.array([6, 8]), x, np.vstack([reference(x[:6])[0], reference(x[6:])[0]]))
    save_table(tmp_path / "recorded.npz", recorded)
    terminal, keep = RememberingTerminal(), tmp_path / f"keep.{format}"
    keep.write_text("older")
    with FakeServer() as server, files_of_at_most(100):
        wanted = ReplayJob(Target(server.endpoint), tmp_path / "recorded.npz", check=True, save=keep)
        assert await replay(wanted, terminal, Stop(), JumpingClock()) == Exit.COULD_NOT_RUN
    assert terminal.complained == f"error: {keep} cannot be written: File too large\n"
    assert "all 14 equal those in the file, bit for bit" in terminal.said
    assert (keep.read_text(), len(os.listdir(tmp_path))) == ("older", 2)
