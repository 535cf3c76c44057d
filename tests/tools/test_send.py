from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import F32, Kind
from instep_tools.comparison import compare
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.outputs import OutputFormat, PrintedOutputs
from instep_tools.pacing import Pace, Stop
from instep_tools.pipeline import DEPTH
from instep_tools.problems import CommandProblem, Exit
from instep_tools.send import ALL_ENDED, SendJob, send
from instep_tools.sequences import RecordedSequences
from instep_tools.standard_input import LINES_ON_THE_WAY
from tests.support.fake_server import error, reference
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table
from tests.tools.sending import SendRun, end_at_block, lines_of

LENGTHS = [4, 1, 6, 3]
NAMES = ("mic-1", "mic-2", "tap-1", "tap-2")


def json_run(**info: Any) -> SendRun:
    return SendRun(as_json=True, **info)


def truth(frames: F32, states: dict[int, F32] | None = None) -> F32:
    parts = np.split(frames, np.cumsum(LENGTHS)[:-1])
    return np.concatenate([reference(x, (states or {}).get(row))[0] for row, x in enumerate(parts)])


@pytest.fixture
def recorded(rng: np.random.Generator) -> RecordedSequences:
    frames = rng.integers(-5, 6, (sum(LENGTHS), 3)).astype(np.float32)
    return RecordedSequences(NAMES, np.array(LENGTHS), frames, outputs=truth(frames), fingerprint="00")


@pytest.fixture
def file(tmp_path: Path, recorded: RecordedSequences) -> Path:
    save_table(tmp_path / "recorded.npz", recorded)
    return tmp_path / "recorded.npz"


async def test_outputs_are_saved(tmp_path: Path, file: Path, recorded: RecordedSequences) -> None:
    run = json_run()
    assert await run(file=file, output=tmp_path / "again.npz") == Exit.OK
    again = read_sequences(tmp_path / "again.npz")
    assert recorded.outputs is not None
    assert again.outputs is not None
    np.testing.assert_array_equal(again.outputs, recorded.outputs)
    np.testing.assert_array_equal(again.frames, recorded.frames)
    assert again.names == NAMES
    assert sum(steps * streams for steps, streams in run.server.rules.blocks) == 14
    counts = {"streams": 4, "frames": 14, "answered_frames": 14, "refused_frames": 0, "bad_lines": 0, "seconds": 0.0}
    ending = {"saved": str(tmp_path / "again.npz"), "stopped": False, "all_streams_ended": False, "check": None}
    ending["exactness"] = "exact"
    assert run.terminal.json() == counts | ending


async def test_streams_keep_their_names_and_get_a_suffix_where_one_is_in_use(file: Path) -> None:
    run = SendRun()
    run.server.rules.occupy("tap-1")
    run.keeps = {"tap-1"}
    assert await run(file=file, check=True) == Exit.OK
    names = list(run.opened)
    assert set(names) - {names[3]} == set(NAMES)
    assert names[3].startswith("tap-1~")
    assert "all 14 equal those in the file, bit for bit" in run.terminal.said


async def test_a_flipped_bit_is_found(tmp_path: Path, recorded: RecordedSequences) -> None:
    assert recorded.outputs is not None
    recorded.outputs.view(np.uint32)[7, 1] ^= 1
    save_table(tmp_path / "r.npz", recorded)
    run = json_run()
    assert await run(file=tmp_path / "r.npz", check=True) == Exit.FOUND_PROBLEMS
    first = run.terminal.json()["check"]["first"]
    assert (run.compared, first["stream"], first["frame"], first["element"]) == ((14, 1), "tap-1", 2, 1)
    run = SendRun()
    assert await run(file=tmp_path / "r.npz", check=True) == Exit.FOUND_PROBLEMS
    assert "stream 'tap-1', frame 2, element 1" in run.terminal.said


def test_the_same_nan_is_equal_and_zeros_have_signs(recorded: RecordedSequences) -> None:
    y = np.array([[0.0, np.nan]] * 14, np.float32)
    answered = np.ones(14, np.bool_)
    for now, different in ((y.copy(), 0), (np.copysign(y, np.array([[-1, 1]], np.float32)), 14)):
        assert compare(replace(recorded, outputs=y), now, answered).different == different


@pytest.mark.parametrize(("speed", "last_s"), [(None, 0.5), (2.0, 0.25), (math.inf, 0.0)])
async def test_a_rate_is_kept_in_real_time(file: Path, speed: float | None, last_s: float) -> None:
    run = json_run()
    assert await run(file=file, pace=Pace(10.0, speed=speed), check=True) == Exit.OK
    assert run.clock.now() - 1000 == pytest.approx(last_s)
    assert run.compared == (14, 0)


@pytest.mark.parametrize("rate_hz", [None, 10.0])
async def test_more_sequences_than_the_server_keeps(file: Path, rate_hz: float | None) -> None:
    run = json_run(max_streams=3)
    assert await run(file=file, check=True, pace=Pace(rate_hz)) == Exit.OK
    assert (run.most_open, run.compared) == (3, (14, 0))


def without_the_first_frame(lines: list[str]) -> list[str]:
    return [line.rsplit(",", 2)[0] + ",123,123" for line in lines[1:]]


def with_outputs_of_nan(lines: list[str]) -> list[str]:
    return [line.rsplit(",", 2)[0] + ",nan,nan" for line in lines]


@pytest.mark.parametrize(
    ("damage", "compared", "named"),
    [(without_the_first_frame, 8, "'tap-1'"), (with_outputs_of_nan, 8, "6 frames")],
)
@pytest.mark.parametrize("differs", [False, True])
async def test_frames_that_cannot_be_compared_are_no_success(
    tmp_path: Path, file: Path, damage: Callable[[list[str]], list[str]], compared: int, named: str, differs: bool
) -> None:
    assert await json_run()(file=file, output=tmp_path / "t.csv") == Exit.OK
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    one = [row for row in rows if row.startswith('"tap-1",')]
    others = [row for row in rows if row not in one]
    if differs:
        others[0] = others[0].rsplit(",", 1)[0] + ",123"
    (tmp_path / "t.csv").write_text("\n".join([header, *damage(one), *others, ""]))
    run = json_run()
    assert await run(file=tmp_path / "t.csv", check=True) == (Exit.FOUND_PROBLEMS if differs else Exit.COULD_NOT_RUN)
    assert run.compared == (compared, differs)
    assert named in run.terminal.complained
    chosen = json_run()
    assert await chosen(file=tmp_path / "t.csv", check=True, choice=Choice(streams="tap-2")) == Exit.OK
    assert len(chosen.terminal.complained.splitlines()) == 1


@pytest.mark.parametrize(("speed", "last_s"), [(None, 1.4), (2.0, 0.7), (math.inf, 0.0)])
async def test_streams_of_one_name_are_sent_at_their_times_with_their_states(
    tmp_path: Path, recorded: RecordedSequences, speed: float | None, last_s: float
) -> None:
    state = np.full((2, 2), 3, np.float32)
    times_ns = np.arange(14) * 10**8 + np.repeat(np.arange(4), LENGTHS) * 3 * 10**7
    again = replace(recorded, names=("mic",) * 4, times_ns=times_ns, initial_states={1: {"h": state}})
    save_table(tmp_path / "r.npz", replace(again, outputs=truth(recorded.frames, {1: state})))
    run = json_run(max_streams=4 if speed == math.inf else 2)
    assert (
        await run(file=tmp_path / "r.npz", pace=Pace(speed=speed), check=True, output=tmp_path / "again.npz") == Exit.OK
    )
    assert run.clock.now() - 1000 == pytest.approx(last_s, abs=0.011)
    assert run.compared == (14, 0)
    assert list(run.opened) == ["mic", "mic-2", "mic-3", "mic-4"]
    run = json_run()
    assert await run(file=tmp_path / "again.npz", pace=Pace(speed=math.inf), check=True) == Exit.OK
    assert run.compared == (14, 0)


@pytest.mark.parametrize(("last_s", "speed", "said"), [(7200, None, True), (7200, 1.0, False), (50, None, False)])
async def test_a_long_file_says_that_it_keeps_real_time(
    tmp_path: Path, last_s: int, speed: float | None, said: bool
) -> None:
    (tmp_path / "day.csv").write_text(f"at_s,x0,x1,x2\n0,1,2,3\n{last_s},4,5,6\n")
    run = json_run()
    assert await run(file=tmp_path / "day.csv", pace=Pace(speed=speed), choice=Choice(time="at_s")) == Exit.OK
    assert ("120 minutes" in run.terminal.complained) == said


async def test_a_stop_drains_closes_and_saves_what_there_is(tmp_path: Path, file: Path) -> None:
    run = json_run()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1000.25 else None
    assert await run(file=file, pace=Pace(10.0), output=tmp_path / "part.npz", check=True) == Exit.COULD_NOT_RUN
    assert read_sequences(tmp_path / "part.npz").lengths.tolist() == [3, 1, 3, 3]
    assert (run.compared, run.terminal.json()["stopped"]) == ((10, 0), True)


@pytest.mark.parametrize("check", [True, False])
async def test_streams_that_the_server_ends(file: Path, check: bool) -> None:
    run = json_run()
    end_at_block(run.server, 3, handle=3, code=Code.STATE_LOST)
    ending = await run(file=file, pace=Pace(10.0), check=check)
    assert ending == (Exit.COULD_NOT_RUN if check else Exit.FOUND_PROBLEMS)
    assert "(stream 'tap-1'" in run.terminal.complained
    assert run.terminal.json()["answered_frames"] == 10


async def test_whole_blocks_that_are_refused(file: Path) -> None:
    run = json_run()
    run.server.rules.fault = lambda header, frames: (
        [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None
    )
    assert await run(file=file) == Exit.FOUND_PROBLEMS
    assert "TOO_LARGE" in run.terminal.complained
    assert run.terminal.json()["answered_frames"] == 0


@pytest.mark.parametrize(
    "what",
    [
        {"file": Path("absent")},
        {"format": OutputFormat.CSV, "output": Path("x.csv")},
        {"output": Path("x.txt")},
        {"check": True},
    ],
)
async def test_what_cannot_be_is_told_before_connecting(what: dict[str, Any]) -> None:
    nowhere = SendJob(Target("tcp://127.0.0.1:1"), **what)
    with pytest.raises(CommandProblem, match=r"absent|--format|x\.txt|--check"):
        await send(nowhere, RememberingTerminal(), Stop(), JumpingClock())


@pytest.mark.parametrize(
    ("changes", "what", "named"),
    [
        ({"outputs": None}, {"check": True}, "r.npz"),
        ({}, {"pace": Pace(speed=2.0)}, "--rate"),
        ({"fingerprint": "ff" * 32}, {"check": True}, "ffffffffffff"),
        ({"outputs": np.zeros((14, 5), np.float32)}, {"check": True}, "5 outputs"),
        ({"frames": np.zeros((14, 2), np.float32), "fingerprint": "ff" * 32, "model": "ears"}, {}, "--model"),
        ({}, {"output": Path("y.txt")}, "y.txt"),
    ],
)
async def test_what_cannot_be_is_told(
    tmp_path: Path, recorded: RecordedSequences, changes: dict[str, Any], what: dict[str, Any], named: str
) -> None:
    save_table(tmp_path / "r.npz", replace(recorded, **changes))
    with pytest.raises(CommandProblem, match=named):
        await json_run()(file=tmp_path / "r.npz", **what)


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
        run = SendRun()
        assert await run(file=tmp_path / "x.npz", name=name) == Exit.OK
        assert sorted(run.printed()) == names
    (tmp_path / "twins.csv").write_text(
        "stream,stream_id,a,b,c\n"
        + "".join(f"a,{1 + (row > 2)},{','.join(map(str, frame))}\n" for row, frame in enumerate(frames))
    )
    run = SendRun()
    assert await run(file=tmp_path / "twins.csv", name=None) == Exit.OK
    assert {name: len(outputs) for name, outputs in run.printed().items()} == {"a": 3, "a-2": 4}


async def test_frames_are_sent_at_a_rate_and_no_more_than_asked_for(three: tuple[Path, F32]) -> None:
    file, x = three
    run = SendRun()
    assert await run(file=file, pace=Pace(5.0, 12)) == Exit.OK
    for stream, outputs in enumerate(run.printed().values()):
        np.testing.assert_array_equal(outputs, reference(x[stream, :12])[0])
    assert run.clock.now() == pytest.approx(1000 + 11 / 5)
    assert run.server.rules.blocks == [(1, 3)] * 12


async def test_a_stop_drains_and_closes(tmp_path: Path, three: tuple[Path, F32]) -> None:
    run = SendRun()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1001 else None
    assert await run(file=three[0], pace=Pace(10.0), output=tmp_path / "y.csv") == Exit.OK
    assert read_sequences(tmp_path / "y.csv").lengths.tolist() == [11] * 3
    unread = SendRun()
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
        run = SendRun()
        end_at_block(run.server, 3, handle=1, code=Code.UNKNOWN_STREAM)
        assert await run(pace=Pace(10.0), name="mic", **what) == Exit.FOUND_PROBLEMS
        assert len(run.printed()["mic"]) == 2
        assert run.clock.now() < 1000 + (on_the_way + 10) / 10  # however late the server's answer is read
        assert run.terminal.complained.count(f"error: {ALL_ENDED}\n") == 1


async def test_lines_and_files_are_sent_at_their_times(tmp_path: Path, frames: F32) -> None:
    times = [5.0, 5.1, 5.1, 5.4, 5.5, 5.6, 5.9]
    rows = zip(times, lines_of(frames).splitlines(), strict=True)
    text = "at,a,b,c\n" + "".join(f"{at},{line.replace(' ', ',')}\n" for at, line in rows)
    (tmp_path / "in.csv").write_text(text)
    for source in ("stdin", "file"):
        for speed, rate, last_s in ((None, None, 0.9), (2.0, None, 0.45), (math.inf, None, 0.0), (None, 10.0, 0.6)):
            run = SendRun()
            what: dict[str, Any] = {source: tmp_path / "in.csv", "choice": Choice(time="at")}
            assert await run(**what, name="mic", pace=Pace(rate, speed=speed)) == Exit.OK
            assert run.clock.now() - 1000 == pytest.approx(last_s)
            np.testing.assert_array_equal(run.printed()["mic"], reference(frames)[0])


async def test_streams_that_the_server_ends_are_told_of_once(three: tuple[Path, F32]) -> None:
    file, x = three
    run = SendRun()
    end_at_block(run.server, 3, handle=2, code=Code.STATE_LOST)
    assert await run(file=file, pace=Pace(10.0)) == Exit.FOUND_PROBLEMS
    for stream, frames in ((0, x[0]), (1, x[1, :2]), (2, x[2])):
        np.testing.assert_array_equal(run.printed()[f"three-{stream}"], reference(frames)[0])
    told = re.findall(r"^error: (\w+): .*\(stream '(.+?)'", run.terminal.complained, re.M)
    assert told
    assert len(told) == len(set(told))  # it ended, and so it is unknown to what was under way
    assert set(told) <= {("STATE_LOST", "three-1"), ("UNKNOWN_STREAM", "three-1")}
