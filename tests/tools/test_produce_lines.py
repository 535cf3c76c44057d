from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import F32
from instep_tools.connect import Target
from instep_tools.formats.columns import Choice
from instep_tools.live import ALL_ENDED, Pace
from instep_tools.problems import BadFile, CommandProblem, Exit
from instep_tools.produce import Produce, produce
from instep_tools.signals import Signal
from tests.support.fake_server import reference
from tests.tools.producing import FAST, ProduceRun, lines_of


@pytest.fixture
def frames(rng: np.random.Generator) -> F32:
    return rng.standard_normal((7, 3)).astype(np.float32)


async def test_lines_of_a_file(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in.csv").write_text("a,b,c\n" + lines_of(frames))
    run = ProduceRun()
    assert await run(file=tmp_path / "in.csv") == Exit.OK
    np.testing.assert_array_equal(run.printed()["produce-0"], reference(frames)[0])
    assert "7 frames of 1 stream sent and answered" in run.terminal.complained


async def test_lines_go_to_the_streams_in_turn(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(lines_of(frames))
    run = ProduceRun()
    assert await run(file=tmp_path / "in", streams=3, name="mic") == Exit.OK
    assert sorted(run.printed()) == ["mic-0", "mic-1", "mic-2"]
    for stream in range(3):
        np.testing.assert_array_equal(run.printed()[f"mic-{stream}"], reference(frames[stream::3])[0])


async def test_a_bad_line_costs_its_stream_one_frame_and_the_others_none(tmp_path: Path, frames: F32) -> None:
    lines = lines_of(frames).splitlines()
    lines[3] = "1 2 oh"
    (tmp_path / "in").write_bytes("\n".join(lines).encode() + b"\n\xff 2 3\n1 nan 3\n\n")
    run = ProduceRun()
    assert await run(file=tmp_path / "in", streams=3) == Exit.FOUND_PROBLEMS
    np.testing.assert_array_equal(run.printed()["produce-0"], reference(frames[[0, 6]])[0])
    np.testing.assert_array_equal(run.printed()["produce-1"], reference(frames[[1, 4]])[0])
    np.testing.assert_array_equal(run.printed()["produce-2"], reference(frames[[2, 5]])[0])
    assert "error: line 4: 'oh' is not a number" in run.terminal.complained
    assert "error: line 8: it is not UTF-8" in run.terminal.complained
    assert "error: line 9: nan is not a finite number" in run.terminal.complained
    assert run.terminal.complained.splitlines()[-1].endswith("3 bad lines")


@pytest.mark.parametrize(
    ("separator", "name", "hint"),
    [
        (";", "", ": separate numbers by commas or white space, not by semicolons"),
        (" ", "mic ", ": if 'mic' names the stream, give --named"),
    ],
)
async def test_a_file_of_bad_lines_is_told_of_shortly_and_with_what_to_do(
    tmp_path: Path, separator: str, name: str, hint: str
) -> None:
    good = "1 2 3\n"
    bad = f"{name}1{separator}2{separator}3\n"
    (tmp_path / "in").write_text(20 * bad + good + bad)
    run = ProduceRun()
    assert await run(file=tmp_path / "in") == Exit.FOUND_PROBLEMS
    *told, summary = run.terminal.complained.splitlines()
    assert [line.split(":")[1] for line in told] == [
        *(f" line {number}" for number in range(1, 6)),
        " and so on",
        " line 22",
    ]
    assert all(line.endswith(f"a frame has 3{hint}") for line in [*told[:5], told[-1]])
    assert "1 frame of 1 stream sent and answered" in summary
    assert "21 bad lines" in summary


async def test_an_input_without_frames_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.csv").write_text("# nothing\n\n")
    with pytest.raises(BadFile, match=r"there are no frames in .*empty\.csv$"):
        await ProduceRun()(file=tmp_path / "empty.csv")
    with (tmp_path / "empty.csv").open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        run = ProduceRun()
        with pytest.raises(BadFile, match=r"there are no frames on standard input$"):
            await run()
        assert run.terminal.data == ""
    (tmp_path / "bad.csv").write_text("x\n")
    assert await ProduceRun()(file=tmp_path / "bad.csv") == Exit.FOUND_PROBLEMS
    stopped = ProduceRun()
    stopped.stop.request()
    assert await stopped(file=tmp_path / "empty.csv") == Exit.OK


async def test_the_first_column_names_the_stream(tmp_path: Path, frames: F32) -> None:
    names = ["left", "right", "left", "left", "right", "left", "middle"]
    text = "".join(f"{name} {line}\n" for name, line in zip(names, lines_of(frames).splitlines(), strict=True))
    (tmp_path / "in").write_text(text)
    run = ProduceRun()
    assert await run(file=tmp_path / "in", choice=Choice(named=True)) == Exit.OK
    for name in set(names):
        mine = [index for index, other in enumerate(names) if other == name]
        np.testing.assert_array_equal(run.printed()[name], reference(frames[mine])[0])
    assert "of 3 streams" in run.terminal.complained
    chosen = ProduceRun()
    assert await chosen(file=tmp_path / "in", choice=Choice(named=True, only="l*")) == Exit.OK
    assert set(chosen.printed()) == {"left"}


async def test_a_name_that_no_stream_may_have_is_said(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in.csv").write_text("stream,a,b,c\nleft,1,2,3\nri\u00adght,1,2,3\n")
    run = ProduceRun()
    assert await run(file=tmp_path / "in.csv", name=None) == Exit.FOUND_PROBLEMS
    assert run.terminal.complained.startswith(
        r"error: line 3: 'ri\xadght' is not a valid stream name: it holds '\xad'; "
    )
    with pytest.raises(InvalidInput, match=r"^'a{59}… \(name 1 of 2\) is not a valid stream name: it has 302 bytes"):
        await ProduceRun()(signal=Signal.SINE, streams=2, name="a" * 300)


async def test_names_cannot_choose_among_lines_without_names(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(lines_of(frames))
    run = ProduceRun()
    with pytest.raises(CommandProblem, match=r"^--only chooses streams by their names, and the lines have none"):
        await run(file=tmp_path / "in", choice=Choice(only="mic-*"))
    assert run.terminal.data == ""


async def test_a_stream_that_cannot_be_opened_is_left_out(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text("".join(f"{name} 1 2 3\n" for name in ("a", "b", "a", "b", "b")))
    run = ProduceRun()
    run.server.rules.names["b"] = 999
    with run.server as server:
        what = Produce(Target(server.endpoint), FAST, file=tmp_path / "in", choice=Choice(named=True))
        assert await produce(what, run.terminal, run.stop, run.clock) == Exit.FOUND_PROBLEMS
    assert {name: len(values) for name, values in run.printed().items()} == {"a": 2}
    assert run.terminal.complained.count("NAME_IN_USE") == 1
    assert run.terminal.complained.startswith(
        "error: NAME_IN_USE: a stream 'b' is open or parked: close it with instep-client streams close b; "
        "its lines are left out\n"
    )


@pytest.mark.parametrize("what", [{"signal": Signal.SINE}, {"file": Path("in.npy")}, {"file": Path("in.txt")}])
async def test_a_name_in_use_is_answered_with_what_helps_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: F32, what: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("in.npy", frames)
    np.savetxt("in.txt", frames)
    run = ProduceRun()
    run.server.rules.names["it's-0"] = 999
    with run.server as server:
        wanted = Produce(Target(server.endpoint), FAST, name="it's", **what)
        try:
            await produce(wanted, run.terminal, run.stop, run.clock)
            said = run.terminal.complained
        except CommandProblem as problem:
            said = str(problem)
    assert (
        'NAME_IN_USE: a stream "it\'s-0" is open or parked: choose another name with --name, or close it with ' in said
    )
    (closing,) = re.findall("instep-client (streams close '.+-0')", said)
    assert shlex.split(closing) == ["streams", "close", "it's-0"]


async def test_standard_input(monkeypatch: pytest.MonkeyPatch, frames: F32) -> None:
    reader, writer = os.pipe()
    os.write(writer, lines_of(frames).encode())
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        run = ProduceRun()
        assert await run() == Exit.OK
    np.testing.assert_array_equal(run.printed()["produce-0"], reference(frames)[0])


async def test_lines_at_a_rate(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(lines_of(frames))
    run = ProduceRun()
    assert await run(file=tmp_path / "in", streams=2, pace=Pace(10.0, None, None)) == Exit.OK
    assert sorted(set(run.clock.slept)) == pytest.approx([1000.1, 1000.2, 1000.3])


async def test_enough_frames_end_it_though_more_lines_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"1 2 3\n" * 5)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        run = ProduceRun()
        assert await run(streams=2, pace=Pace(None, 2, None)) == Exit.OK
        os.close(writer)
    assert {name: len(outputs) for name, outputs in run.printed().items()} == {"produce-0": 2, "produce-1": 2}


async def test_seconds_end_lines(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(lines_of(frames))
    run = ProduceRun()
    assert await run(file=tmp_path / "in", pace=Pace(10.0, None, 0.35)) == Exit.OK
    assert len(run.printed()["produce-0"]) == 4


@pytest.mark.parametrize("streams", [1, 2])
async def test_lines_beyond_the_number_of_frames_are_left_out(tmp_path: Path, frames: F32, streams: int) -> None:
    (tmp_path / "in").write_text(lines_of(frames))
    run = ProduceRun()
    assert await run(file=tmp_path / "in", streams=streams, pace=Pace(None, 2, None)) == Exit.OK
    np.testing.assert_array_equal(run.printed()["produce-0"], reference(frames[::streams][:2])[0])


async def test_a_line_stream_that_the_server_ends(tmp_path: Path, frames: F32) -> None:
    (tmp_path / "in").write_text(lines_of(frames))
    run = ProduceRun()
    run.end_at_block(3, handle=1, code=Code.IDLE)
    assert await run(file=tmp_path / "in", pace=Pace(10.0, None, None)) == Exit.FOUND_PROBLEMS
    np.testing.assert_array_equal(run.printed()["produce-0"], reference(frames[:2])[0])
    told = [line for line in run.terminal.complained.splitlines() if line.startswith("error: ")]
    codes = [line.split(": ")[1] for line in told if line != f"error: {ALL_ENDED}"]  # it may have sent all by then
    assert codes
    assert len(codes) == len(set(codes))
    assert set(codes) <= {"IDLE", "UNKNOWN_STREAM"}
    assert re.search(r"2 frames of 1 stream sent and answered .*, \d frames? refused$", run.terminal.complained)
