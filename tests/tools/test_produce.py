from __future__ import annotations

import asyncio
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
from instep_tools import terminal as terminal_module
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.live import ALL_ENDED, LINES_ON_THE_WAY, Pace
from instep_tools.outputs import OutputFormat, PrintedOutputs
from instep_tools.pacing import Stop
from instep_tools.pipeline import DEPTH
from instep_tools.problems import CommandProblem, Exit
from instep_tools.produce import Produce, produce
from instep_tools.signals import Signal, make_signal
from tests.support.fake_server import reference
from tests.tools.helpers import JumpingClock, RememberingTerminal
from tests.tools.producing import FAST, ProduceRun, lines_of


@pytest.fixture
def frames(rng: np.random.Generator) -> F32:
    return rng.standard_normal((7, 3)).astype(np.float32)


def told_of(terminal: RememberingTerminal) -> list[tuple[str, str, int]]:
    """Each refusal told of: its code, and the stream and seq that it names, once."""
    lines = [line for line in terminal.complained.splitlines() if line.startswith("error: ")]
    found = [re.fullmatch(r"error: (\w+): [^(]+ \(stream '([^']+)', seq (\d+), expected \d+\)", line) for line in lines]
    return [
        (match[1], match[2], int(match[3])) if match else (line, "", -1)
        for match, line in zip(found, lines, strict=True)
    ]


async def test_arrays_keep_their_names_where_each_is_one_stream(tmp_path: Path, frames: F32) -> None:
    np.savez(tmp_path / "x.npz", left=frames, right=frames)
    for streams, name, names in (
        (None, None, ["left", "right"]),
        (1, None, ["left"]),
        (5, None, ["left", "left-2", "left-3", "right", "right-2"]),
        (None, "mic", ["mic-0", "mic-1"]),
    ):
        run = ProduceRun()
        assert await run(file=tmp_path / "x.npz", streams=streams, name=name) == Exit.OK
        assert sorted(run.printed()) == names
    two_openings: dict[str, Any] = {"stream": np.array(["a"] * 7), "stream_id": [1] * 3 + [2] * 4, "x": frames}
    np.savez(tmp_path / "twins.npz", **two_openings)
    (tmp_path / "twins.csv").write_text(
        "stream,stream_id,a,b,c\n"
        + "".join(f"a,{1 + (row > 2)},{','.join(map(str, frame))}\n" for row, frame in enumerate(frames))
    )
    for file in ("twins.npz", "twins.csv"):
        run = ProduceRun()
        assert await run(file=tmp_path / file, name=None) == Exit.OK
        assert {name: len(outputs) for name, outputs in run.printed().items()} == {"a": 3, "a-2": 4}


async def test_arrays_are_a_stream_each(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((10, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", frames=x, lengths=[4, 6])
    run = ProduceRun()
    assert await run(file=tmp_path / "x.npz", save=tmp_path / "y.npz") == Exit.OK
    saved = read_sequences(tmp_path / "y.npz")
    assert (saved.names, saved.lengths.tolist()) == (("produce-0", "produce-1"), [4, 6])
    np.testing.assert_array_equal(saved.frames, x)
    assert saved.outputs is not None
    np.testing.assert_array_equal(saved.outputs, np.concatenate([reference(x[:4])[0], reference(x[4:])[0]]))
    assert saved.fingerprint == "00"
    assert saved.answered is None
    assert run.terminal.said.strip().endswith(f"; saved in {tmp_path / 'y.npz'}")


async def test_more_streams_than_sequences_begin_again_with_the_first(tmp_path: Path, frames: F32) -> None:
    np.save(tmp_path / "x.npy", frames)
    run = ProduceRun()
    assert await run(file=tmp_path / "x.npy", streams=3) == Exit.OK
    assert len(run.printed()) == 3
    for outputs in run.printed().values():
        np.testing.assert_array_equal(outputs, reference(frames)[0])


@pytest.mark.parametrize("signal", list(Signal))
async def test_signals_at_a_rate(signal: Signal) -> None:
    run = ProduceRun()
    assert await run(signal=signal, streams=2, pace=Pace(5.0, 12, None)) == Exit.OK
    expected = make_signal(signal, 2, 3)(0, 12)
    for stream in range(2):
        np.testing.assert_array_equal(run.printed()[f"produce-{stream}"], reference(expected[:, stream])[0])
    assert run.clock.now() == pytest.approx(1000 + 11 / 5)
    assert run.server.rules.blocks == [(1, 2)] * 12


async def test_without_a_rate_blocks_are_long(frames: F32) -> None:
    run = ProduceRun()
    assert await run(signal=Signal.SINE, streams=2, pace=Pace(None, 100, None)) == Exit.OK
    assert run.server.rules.blocks == [(32, 2)] * 3 + [(4, 2)]


async def test_a_wait_for_the_next_frame_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIET_S", "LOG_S"):
        monkeypatch.setattr(terminal_module, name, 0.02)

    class Waiting(JumpingClock):
        async def sleep_until(self, moment: float) -> None:
            await super().sleep_until(moment)
            await asyncio.sleep(0.005)

    run = ProduceRun()
    run.clock = Waiting()
    time_ns = [round(1e9 * at_s) for at_s in (0, 0.1, 8, 8.1)]
    np.savez(tmp_path / "x.npz", stream=np.array(["a"] * 4), x=np.zeros((4, 3), np.float32), time_ns=time_ns)
    assert await run(file=tmp_path / "x.npz", save=tmp_path / "y.npz") == Exit.OK
    lines = run.terminal.complained.splitlines()
    waits = [re.fullmatch(r"sending 2/4 frames · next frame due in (\d) s", line) for line in lines]
    left_s = [int(wait[1]) for wait in waits if wait]
    assert left_s[0] > left_s[-1] >= 2
    assert left_s == sorted(left_s, reverse=True)
    assert len(left_s) < len(lines), "a short wait is none"


async def test_seconds_end_a_signal() -> None:
    run = ProduceRun()
    assert await run(signal=Signal.NOISE, pace=Pace(10.0, None, 2.0)) == Exit.OK
    assert len(run.printed()["produce-0"]) == 20


async def test_a_stop_drains_and_closes(tmp_path: Path) -> None:
    run = ProduceRun()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1001 else None
    assert await run(signal=Signal.SINE, pace=Pace(10.0, None, None), save=tmp_path / "y.csv") == Exit.OK
    assert len((tmp_path / "y.csv").read_text().splitlines()) == 1 + 11
    assert "stopped, all streams closed" in run.terminal.said


async def test_when_nobody_reads_the_output_it_stops() -> None:
    run = ProduceRun()
    run.terminal.readers = False
    assert await run(signal=Signal.SINE) == Exit.OK
    assert run.stop.requested


RESULT = {
    "streams": 2,
    "frames": 6,
    "refused_frames": 0,
    "bad_lines": 0,
    "seconds": pytest.approx(0.2),
    "saved": None,
    "stopped": False,
    "all_streams_ended": False,
}


async def test_outputs_as_json_lines() -> None:
    expected = make_signal(Signal.STEPS, 2, 3)(0, 3)
    outputs = [reference(expected[:, stream])[0].tolist() for stream in range(2)]
    what: dict[str, Any] = {"signal": Signal.STEPS, "streams": 2, "pace": Pace(10.0, 3, None)}
    for as_json in (True, False):
        run = ProduceRun(as_json=as_json)
        assert await run(**what, format=None if as_json else OutputFormat.JSONL) == Exit.OK
        lines = [json.loads(line) for line in run.terminal.data.splitlines()]
        assert lines[6:] == ([RESULT] if as_json else [])
        for number, line in enumerate(lines[:6]):
            stream, seq = number % 2, number // 2
            found = np.array(line.pop("y"), np.float32).tolist()
            assert (line, found) == ({"stream": f"produce-{stream}", "seq": seq}, outputs[stream][seq])


async def test_with_a_file_for_outputs_json_is_one_object(tmp_path: Path) -> None:
    run = ProduceRun(as_json=True)
    what: dict[str, Any] = {"signal": Signal.STEPS, "streams": 2, "pace": Pace(10.0, 3, None)}
    assert await run(**what, save=tmp_path / "y.csv") == Exit.OK
    assert run.terminal.json() == {**RESULT, "saved": str(tmp_path / "y.csv")}


def test_printed_lines_give_every_bit_back(rng: np.random.Generator) -> None:
    y = rng.integers(0, 0x7F800000, (50, 2), np.uint32).view(np.float32)
    y[0] = [np.nan, -np.inf]
    for format, separator in ((OutputFormat.CSV, ","), (OutputFormat.TSV, "\t")):
        texts: list[str] = []
        PrintedOutputs(texts.append, format, ["up", "down"]).add("a,b\tc", 7, np.zeros((50, 1), np.float32), y)
        head, *lines = csv.reader(io.StringIO("".join(texts)), delimiter=separator)
        assert head == ["stream", "seq", "up", "down"]
        assert [line[:2] for line in lines] == [["a,b\tc", str(7 + step)] for step in range(50)]
        np.testing.assert_array_equal(np.array([line[2:] for line in lines], np.float32), y)
    texts = []
    PrintedOutputs(texts.append, OutputFormat.JSONL, []).add('"', 0, np.zeros((50, 1), np.float32), y)
    values = [json.loads(line) for line in "".join(texts).splitlines()]
    assert values[0] == {"stream": '"', "seq": 0, "y": [None, None]}
    np.testing.assert_array_equal(np.array([value["y"] for value in values[1:]], np.float32), y[1:])


async def test_a_server_that_ends_every_stream_is_sent_nothing_more(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(1000 * lines_of(frames))
    np.save(tmp_path / "x.npy", np.ones((1000, 3)))
    inputs: list[tuple[dict[str, Any], int]] = [
        ({"file": tmp_path / "in"}, LINES_ON_THE_WAY),
        ({"file": tmp_path / "x.npy"}, DEPTH),
        ({"signal": Signal.SINE}, DEPTH),
    ]
    for what, on_the_way in inputs:
        run = ProduceRun()
        run.end_at_block(3, handle=1, code=Code.UNKNOWN_STREAM)
        assert await run(pace=Pace(10.0, None, None), **what) == Exit.FOUND_PROBLEMS
        assert len(run.printed().popitem()[1]) == 2
        assert run.clock.now() < 1000 + (on_the_way + 10) / 10  # however late the server's answer is read
        assert run.terminal.complained.count(f"error: {ALL_ENDED}\n") == 1


async def test_lines_and_files_are_sent_at_their_times(tmp_path: Path, frames: F32) -> None:
    times = [5.0, 5.1, 5.1, 5.4, 5.5, 5.6, 5.9]
    rows = zip(times, lines_of(frames).splitlines(), strict=True)
    text = "at,a,b,c\n" + "".join(f"{at},{line.replace(' ', ',')}\n" for at, line in rows)
    (tmp_path / "in.csv").write_text(text)
    ns = np.round(np.array(times) * 1e9).astype(np.int64)
    np.savez(tmp_path / "in.npz", stream=np.array(["in"] * 7), x=frames, time_ns=ns)
    for file, choice in (("in.csv", Choice(time="at")), ("in.npz", Choice())):
        for speed, rate, last_s in ((None, None, 0.9), (2.0, None, 0.45), (math.inf, None, 0.0), (None, 10.0, 0.6)):
            run = ProduceRun()
            assert await run(file=tmp_path / file, choice=choice, pace=Pace(rate, None, None, speed)) == Exit.OK
            assert run.clock.now() - 1000 == pytest.approx(last_s)
            np.testing.assert_array_equal(run.printed()["produce-0"], reference(frames)[0])


async def test_streams_that_the_server_ends_are_told_of_once() -> None:
    run = ProduceRun()
    run.end_at_block(3, handle=2, code=Code.STATE_LOST)
    assert await run(signal=Signal.SINE, streams=3, pace=Pace(10.0, 30, None)) == Exit.FOUND_PROBLEMS
    expected = make_signal(Signal.SINE, 3, 3)(0, 30)
    for stream in (0, 2):
        np.testing.assert_array_equal(run.printed()[f"produce-{stream}"], reference(expected[:, stream])[0])
    np.testing.assert_array_equal(run.printed()["produce-1"], reference(expected[:2, 1])[0])
    told = told_of(run.terminal)
    assert told[0][1:] == ("produce-1", 2)
    codes = [code for code, *_ in told]  # it ended, and so it is unknown to what was under way
    assert len(codes) == len(set(codes))
    assert set(codes) <= {"STATE_LOST", "UNKNOWN_STREAM"}
    assert "28 frames refused" in run.terminal.complained


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ({"file": Path("x.npy"), "signal": Signal.SINE}, "give a file or a signal, not both"),
        (
            {"signal": Signal.SINE, "choice": Choice(named=True)},
            "--named, --columns, --time and --only are for files and lines",
        ),
        ({"file": Path("absent")}, "absent cannot be read: No such file"),
        ({"file": Path("x" * 300)}, "xx cannot be read: File name too long"),
        ({"file": Path("absent.npz")}, "absent.npz cannot be read: No such file"),
        (
            {"signal": Signal.SINE, "format": OutputFormat.CSV, "save": Path("x.csv")},
            "--format is for outputs that are printed",
        ),
        ({"signal": Signal.SINE, "save": Path("x.txt")}, r"must end in \.csv, \.npz, \.parquet or \.mcap"),
    ],
)
async def test_what_cannot_be_is_told_before_connecting(what: dict[str, Any], problem: str) -> None:
    terminal = RememberingTerminal()
    with pytest.raises(CommandProblem, match=problem):
        await produce(Produce(Target("tcp://127.0.0.1:1"), FAST, **what), terminal, Stop(), JumpingClock())


async def test_a_file_that_does_not_fit_the_model(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5)))
    with pytest.raises(CommandProblem, match=r"x.npy has 5 numbers a frame, the model 'halving' takes 3"):
        await ProduceRun()(file=tmp_path / "x.npy")
