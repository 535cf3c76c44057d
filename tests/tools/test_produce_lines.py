"""`produce` with lines as they arrive."""

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
from instep_tools.formats.columns import Choice
from instep_tools.live import ALL_ENDED, Pace
from instep_tools.problems import BadFile, CommandProblem, Exit
from tests.support.fake_server import reference
from tests.tools.producing import ProduceRun, end_at_block, lines_of


@pytest.fixture
def frames(rng: np.random.Generator) -> F32:
    return rng.standard_normal((7, 3)).astype(np.float32)


@pytest.fixture
def lines(tmp_path: Path, frames: F32) -> Path:
    (tmp_path / "in").write_text(lines_of(frames))
    return tmp_path / "in"


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


async def test_lines_of_standard_input(lines: Path, frames: F32) -> None:
    run = ProduceRun()
    assert await run(lines) == Exit.OK
    np.testing.assert_array_equal(run.printed()["produce"], reference(frames)[0])


async def test_a_pipe_by_its_name(tmp_path: Path, frames: F32) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(descriptor, lines_of(frames).encode())
    run = ProduceRun()
    assert await run(file=tmp_path / "pipe", pace=Pace(None, 6)) == Exit.OK  # nobody closes it
    os.close(descriptor)
    np.testing.assert_array_equal(run.printed()["produce"], reference(frames[:6])[0])


async def test_a_bad_line_costs_one_frame(tmp_path: Path, lines: Path, frames: F32) -> None:
    texts = lines_of(frames).splitlines()
    texts[3] = "1 2 oh"
    write(lines, "\n".join(texts) + "\n\udcff 2 3\n1 nan 3\n\n")
    run = ProduceRun()
    assert await run(lines) == Exit.FOUND_PROBLEMS
    np.testing.assert_array_equal(run.printed()["produce"], reference(frames[[0, 1, 2, 4, 5, 6]])[0])
    assert re.findall(r"^error: line (\d+): ", run.terminal.complained, re.M) == ["4", "8", "9"]


async def test_many_bad_lines_are_told_of_shortly_and_with_what_to_do(lines: Path) -> None:
    write(lines, 20 * "mic 1 2 3\n" + "1 2 3\n" + "mic 1 2 3\n")
    run = ProduceRun()
    assert await run(lines) == Exit.FOUND_PROBLEMS
    told = run.terminal.complained.splitlines()
    assert re.findall(r"^error: line (\d+): ", run.terminal.complained, re.M) == ["1", "2", "3", "4", "5", "22"]
    assert all("--named" in line for line in told[:5])
    assert "21 bad lines" in told[-1]


async def test_an_input_without_frames_is_an_error(lines: Path) -> None:
    write(lines, "# nothing\n\n")
    run = ProduceRun()
    with pytest.raises(BadFile):
        await run(lines)
    assert run.terminal.data == ""
    stopped = ProduceRun()
    stopped.stop.request()
    assert await stopped(lines) == Exit.OK


async def test_the_first_column_names_the_stream(lines: Path, frames: F32) -> None:
    names = ["left", "right", "left", "left", "right", "left", "middle"]
    texts = zip(names, lines_of(frames).splitlines(), strict=True)
    write(lines, "".join(f"{name} {line}\n" for name, line in texts))
    run = ProduceRun()
    assert await run(lines, choice=Choice(named=True)) == Exit.OK
    for name in set(names):
        mine = [index for index, other in enumerate(names) if other == name]
        np.testing.assert_array_equal(run.printed()[name], reference(frames[mine])[0])
    chosen = ProduceRun()
    assert await chosen(lines, choice=Choice(named=True, only="l*")) == Exit.OK
    assert set(chosen.printed()) == {"left"}


async def test_a_name_that_no_stream_may_have_is_said(lines: Path) -> None:
    with pytest.raises(InvalidInput, match=r"302 bytes|300 bytes"):
        await ProduceRun()(lines, name="a" * 300)
    write(lines, "stream,a,b,c\nleft,1,2,3\nri\u00adght,1,2,3\n")
    run = ProduceRun()
    assert await run(lines) == Exit.FOUND_PROBLEMS
    assert run.terminal.complained.startswith(r"error: line 3: 'ri\xadght' ")


async def test_names_cannot_choose_among_lines_without_names(lines: Path) -> None:
    with pytest.raises(CommandProblem, match="--only"):
        await ProduceRun()(lines, choice=Choice(only="mic-*"))


async def test_a_stream_that_cannot_be_opened_is_left_out(lines: Path) -> None:
    write(lines, "".join(f"{name} 1 2 3\n" for name in ("a", "b", "a", "b", "b")))
    run = ProduceRun()
    run.server.rules.names["b"] = 999
    run.keeps = {"b"}
    assert await run(lines, choice=Choice(named=True)) == Exit.FOUND_PROBLEMS
    assert {name: len(values) for name, values in run.printed().items()} == {"a": 2}
    assert run.terminal.complained.count("error: NAME_IN_USE: ") == 1


@pytest.mark.parametrize("source", ["stdin", "file"])
async def test_a_name_in_use_is_answered_with_what_helps_on_the_command_line(lines: Path, source: str) -> None:
    run = ProduceRun()
    run.server.rules.names["it's"] = 999
    run.keeps = {"it's"}
    what: dict[str, Any] = {source: lines}
    try:
        await run(**what, name="it's")
        said = run.terminal.complained
    except CommandProblem as problem:
        said = str(problem)
    assert "NAME_IN_USE" in said
    assert "--name" in said
    (closing,) = re.findall(r"instep-client (streams close '.+s')", said)
    assert shlex.split(closing) == ["streams", "close", "it's"]


async def test_lines_at_a_rate(lines: Path) -> None:
    run = ProduceRun()
    assert await run(lines, pace=Pace(10.0, None)) == Exit.OK
    assert sorted(set(run.clock.slept)) == pytest.approx([1000 + number / 10 for number in range(1, 7)])


async def test_a_line_stream_that_the_server_ends(lines: Path, frames: F32) -> None:
    run = ProduceRun()
    end_at_block(run.server, 3, handle=1, code=Code.IDLE)
    assert await run(lines, pace=Pace(10.0, None)) == Exit.FOUND_PROBLEMS
    np.testing.assert_array_equal(run.printed()["produce"], reference(frames[:2])[0])
    told = [line for line in run.terminal.complained.splitlines() if line.startswith("error: ")]
    codes = [line.split(": ")[1] for line in told if line != f"error: {ALL_ENDED}"]  # it may have sent all by then
    assert codes
    assert len(codes) == len(set(codes))
    assert set(codes) <= {"IDLE", "UNKNOWN_STREAM"}
