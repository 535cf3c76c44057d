"""`produce` with files, which are read before the first frame is sent."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import F32
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.live import ALL_ENDED, LINES_ON_THE_WAY, Pace
from instep_tools.outputs import OutputFormat, PrintedOutputs
from instep_tools.pacing import Stop
from instep_tools.pipeline import DEPTH
from instep_tools.problems import CommandProblem, Exit
from instep_tools.produce import Produce, produce
from tests.support.fake_server import reference
from tests.tools.helpers import JumpingClock, RememberingTerminal
from tests.tools.producing import FAST, ProduceRun, end_at_block, lines_of


@pytest.fixture
def frames(rng: np.random.Generator) -> F32:
    return rng.standard_normal((7, 3)).astype(np.float32)


@pytest.fixture
def three(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, F32]:
    """A file of three streams of 30 frames, float32 [3, 30, 3]."""
    x = rng.standard_normal((3, 30, 3)).astype(np.float32)
    np.save(tmp_path / "three.npy", x)
    return tmp_path / "three.npy", x


async def test_streams_have_their_names_in_the_file(tmp_path: Path, frames: F32) -> None:
    np.savez(tmp_path / "x.npz", left=frames, right=frames)
    for name, names in ((None, ["left", "right"]), ("mic", ["mic-0", "mic-1"])):
        run = ProduceRun()
        assert await run(file=tmp_path / "x.npz", name=name) == Exit.OK
        assert sorted(run.printed()) == names
    (tmp_path / "twins.csv").write_text(
        "stream,stream_id,a,b,c\n"
        + "".join(f"a,{1 + (row > 2)},{','.join(map(str, frame))}\n" for row, frame in enumerate(frames))
    )
    run = ProduceRun()
    assert await run(file=tmp_path / "twins.csv", name=None) == Exit.OK
    assert {name: len(outputs) for name, outputs in run.printed().items()} == {"a": 3, "a-2": 4}


async def test_outputs_are_saved(tmp_path: Path, three: tuple[Path, F32]) -> None:
    file, x = three
    run = ProduceRun(as_json=True)
    assert await run(file=file, save=tmp_path / "y.npz") == Exit.OK
    saved = read_sequences(tmp_path / "y.npz")
    assert (saved.names, saved.lengths.tolist()) == (("produce-0", "produce-1", "produce-2"), [30] * 3)
    np.testing.assert_array_equal(saved.frames, np.concatenate(x))
    assert saved.outputs is not None
    np.testing.assert_array_equal(saved.outputs, np.concatenate([reference(each)[0] for each in x]))
    assert (saved.fingerprint, saved.answered) == ("00", None)
    counts = {"streams": 3, "frames": 90, "refused_frames": 0, "bad_lines": 0, "seconds": 0.0}
    ending = {"saved": str(tmp_path / "y.npz"), "stopped": False, "all_streams_ended": False}
    assert run.terminal.json() == counts | ending


async def test_frames_are_sent_at_a_rate_and_no_more_than_asked_for(three: tuple[Path, F32]) -> None:
    file, x = three
    run = ProduceRun()
    assert await run(file=file, pace=Pace(5.0, 12)) == Exit.OK
    for stream, outputs in enumerate(run.printed().values()):
        np.testing.assert_array_equal(outputs, reference(x[stream, :12])[0])
    assert run.clock.now() == pytest.approx(1000 + 11 / 5)
    assert run.server.rules.blocks == [(1, 3)] * 12


async def test_a_stop_drains_and_closes(tmp_path: Path, three: tuple[Path, F32]) -> None:
    run = ProduceRun()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1001 else None
    assert await run(file=three[0], pace=Pace(10.0, None), save=tmp_path / "y.csv") == Exit.OK
    assert read_sequences(tmp_path / "y.csv").lengths.tolist() == [11] * 3
    unread = ProduceRun()
    unread.terminal.readers = False
    assert await unread(file=three[0]) == Exit.OK
    assert unread.stop.requested


def test_printed_lines_give_every_bit_back(rng: np.random.Generator) -> None:
    y = rng.integers(0, 0x7F800000, (50, 2), np.uint32).view(np.float32)
    y[0] = [np.nan, -np.inf]
    texts: list[str] = []
    PrintedOutputs(texts.append, OutputFormat.CSV, ["up", "down"]).add("a,b\tc", 7, np.zeros((50, 1), np.float32), y)
    head, *lines = csv.reader(io.StringIO("".join(texts)))
    assert head == ["stream", "seq", "up", "down"]
    assert [line[:2] for line in lines] == [["a,b\tc", str(7 + step)] for step in range(50)]
    np.testing.assert_array_equal(np.array([line[2:] for line in lines], np.float32), y)
    texts = []
    PrintedOutputs(texts.append, OutputFormat.JSONL, []).add('"', 0, y[::-1, :1], y)
    first, *rest = map(json.loads, "".join(texts).splitlines())
    assert first == {"stream": '"', "seq": 0, "x": [float(str(y[-1, 0]))], "y": [None, -math.inf]}
    np.testing.assert_array_equal(np.array([value["y"] for value in rest], np.float32), y[1:])


async def test_a_server_that_ends_every_stream_is_sent_nothing_more(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(1000 * lines_of(frames))
    np.save(tmp_path / "x.npy", np.ones((1000, 3)))
    for what, on_the_way in (({"stdin": tmp_path / "in"}, LINES_ON_THE_WAY), ({"file": tmp_path / "x.npy"}, DEPTH)):
        run = ProduceRun()
        end_at_block(run.server, 3, handle=1, code=Code.UNKNOWN_STREAM)
        assert await run(pace=Pace(10.0, None), **what) == Exit.FOUND_PROBLEMS
        assert len(run.printed()["produce"]) == 2
        assert run.clock.now() < 1000 + (on_the_way + 10) / 10  # however late the server's answer is read
        assert run.terminal.complained.count(f"error: {ALL_ENDED}\n") == 1


async def test_lines_and_files_are_sent_at_their_times(tmp_path: Path, frames: F32) -> None:
    times = [5.0, 5.1, 5.1, 5.4, 5.5, 5.6, 5.9]
    rows = zip(times, lines_of(frames).splitlines(), strict=True)
    text = "at,a,b,c\n" + "".join(f"{at},{line.replace(' ', ',')}\n" for at, line in rows)
    (tmp_path / "in.csv").write_text(text)
    for source in ("stdin", "file"):
        for speed, rate, last_s in ((None, None, 0.9), (2.0, None, 0.45), (math.inf, None, 0.0), (None, 10.0, 0.6)):
            run = ProduceRun()
            what: dict[str, Any] = {source: tmp_path / "in.csv", "choice": Choice(time="at")}
            assert await run(**what, pace=Pace(rate, None, speed)) == Exit.OK
            assert run.clock.now() - 1000 == pytest.approx(last_s)
            np.testing.assert_array_equal(run.printed()["produce"], reference(frames)[0])


async def test_streams_that_the_server_ends_are_told_of_once(three: tuple[Path, F32]) -> None:
    file, x = three
    run = ProduceRun()
    end_at_block(run.server, 3, handle=2, code=Code.STATE_LOST)
    assert await run(file=file, pace=Pace(10.0, None)) == Exit.FOUND_PROBLEMS
    for stream, frames in ((0, x[0]), (1, x[1, :2]), (2, x[2])):
        np.testing.assert_array_equal(run.printed()[f"produce-{stream}"], reference(frames)[0])
    told = re.findall(r"^error: (\w+): .*\(stream '(.+?)'", run.terminal.complained, re.M)
    assert told
    assert len(told) == len(set(told))  # it ended, and so it is unknown to what was under way
    assert set(told) <= {("STATE_LOST", "produce-1"), ("UNKNOWN_STREAM", "produce-1")}


@pytest.mark.parametrize(
    "what", [{"file": Path("absent")}, {"format": OutputFormat.CSV, "save": Path("x.csv")}, {"save": Path("x.txt")}]
)
async def test_what_cannot_be_is_told_before_connecting(what: dict[str, Any]) -> None:
    nowhere = Produce(Target("tcp://127.0.0.1:1"), FAST, **what)
    with pytest.raises(CommandProblem, match=r"absent|--format|x\.txt"):
        await produce(nowhere, RememberingTerminal(), Stop(), JumpingClock())
