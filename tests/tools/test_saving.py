"""Files of answers that are saved: complete or not at all, and never at the price of an older file."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_tools.connect import Target
from instep_tools.formats.read import read_sequences
from instep_tools.formats.write import WRITERS, Format
from instep_tools.live import Pace
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.replay import ReplayJob, replay
from instep_tools.sequences import RecordedSequences
from instep_tools.signals import Signal
from tests.support.fake_server import FakeServer, reference
from tests.support.small_files import files_of_at_most
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table
from tests.tools.producing import ProduceRun

LIBRARIES = {"parquet": "pyarrow", "mcap": "mcap"}


@pytest.fixture(params=WRITERS)
def format(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    if found in LIBRARIES:
        pytest.importorskip(LIBRARIES[found], reason=f"{LIBRARIES[found]} is not installed")
    return found


async def test_a_producer_keeps_the_older_file_until_the_new_one_is_complete(tmp_path: Path, format: Format) -> None:
    file, link = tmp_path / f"keep.{format}", tmp_path / f"link.{format}"
    link.symlink_to(file)
    file.write_text("older")
    what: dict[str, Any] = {"signal": Signal.NOISE, "streams": 4, "pace": Pace(None, 640, None), "save": link}
    run = ProduceRun(as_json=True)
    with files_of_at_most(30_000):
        assert await run(**what) == Exit.COULD_NOT_RUN
    assert f"error: {link} cannot be written: File too large" in run.terminal.complained
    summary = run.terminal.complained.splitlines()[-1]
    early = "; stopped, all streams closed" if format == "csv" else ""  # others are written at the end
    assert re.match(rf"[\d,]+ frames of 4 streams sent and answered in [^;]+{early}; .+ not written", summary)
    assert run.terminal.json()["stopped"] == (format == "csv")
    assert run.terminal.json()["saved"] is None
    assert (file.read_text(), len(os.listdir(tmp_path))) == ("older", 2)
    assert await ProduceRun()(**what) == Exit.OK
    assert read_sequences(file).lengths.tolist() == [640] * 4
    assert (link.is_symlink(), len(os.listdir(tmp_path))) == (True, 2)


async def test_a_new_csv_can_be_watched_and_keeps_what_fits(tmp_path: Path) -> None:
    run, file, sizes = ProduceRun(), tmp_path / "y.csv", [0]
    run.clock.on_sleep = lambda moment: sizes.append(file.stat().st_size)
    with files_of_at_most(4000):
        assert await run(signal=Signal.NOISE, pace=Pace(10.0, 100, None), save=file) == Exit.COULD_NOT_RUN
    assert len({*sizes}) > 2, "it did not grow"
    assert run.terminal.said.strip().endswith(f"; {file} is incomplete")
    assert file.read_text().count("\n") > 5


async def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "y.csv")
    with ThreadPoolExecutor() as threads:
        reading = threads.submit((tmp_path / "y.csv").read_text)
        assert await ProduceRun()(signal=Signal.NOISE, pace=Pace(None, 50, None), save=tmp_path / "y.csv") == Exit.OK
        assert len(reading.result().splitlines()) == 51


async def test_a_replay_keeps_older_files_and_its_result(
    tmp_path: Path, rng: np.random.Generator, format: Format
) -> None:
    x = rng.integers(-5, 6, (14, 3)).astype(np.float32)
    recorded = RecordedSequences(("a", "b"), np.array([6, 8]), x, np.vstack([reference(x[:6])[0], reference(x[6:])[0]]))
    save_table(tmp_path / "recorded.npz", recorded)
    terminal, keep, picture = RememberingTerminal(), tmp_path / f"keep.{format}", tmp_path / "keep.png"
    for file in (keep, picture):
        file.write_text("older")
    with FakeServer() as server, files_of_at_most(100):
        wanted = ReplayJob(Target(server.endpoint), tmp_path / "recorded.npz", check=True, save=keep, plot=picture)
        assert await replay(wanted, terminal, Stop(), JumpingClock()) == Exit.COULD_NOT_RUN
    assert terminal.complained.splitlines()[-2:] == [
        f"error: {file} cannot be written: File too large" for file in (keep, picture)
    ]
    (summary,) = terminal.said.splitlines()
    assert summary.startswith("14 frames of 2 streams in ")
    assert summary.endswith(f"; all 14 equal the recording, bit for bit; {keep} not written; {picture} not written")
    assert (keep.read_text(), picture.read_text(), len(os.listdir(tmp_path))) == ("older", "older", 3)
