"""`send` with lines as they arrive."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import F32
from instep_tools.formats.columns import Choice
from instep_tools.pacing import Pace
from instep_tools.problems import BadFile, CommandProblem, Exit
from tests.support.fake_server import reference
from tests.tools.sending import SendRun, lines_of


@pytest.fixture
def frames(rng: np.random.Generator) -> F32:
    return rng.standard_normal((7, 3)).astype(np.float32)


@pytest.fixture
def lines(tmp_path: Path, frames: F32) -> Path:
    (tmp_path / "in").write_text(lines_of(frames))
    return tmp_path / "in"


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


async def test_a_pipe_by_its_name(tmp_path: Path, frames: F32) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(descriptor, lines_of(frames).encode())
    run = SendRun()
    assert await run(file=tmp_path / "pipe", pace=Pace(frames=6), name="mic") == Exit.OK  # nobody closes it
    os.close(descriptor)
    np.testing.assert_array_equal(run.printed()["mic"], reference(frames[:6])[0])


async def test_a_bad_line_costs_one_frame_and_many_are_told_of_shortly(lines: Path, frames: F32) -> None:
    texts = lines_of(frames).splitlines()
    bad = ["\udcff 2 3", "1 nan 3", *["oh"] * 18]
    write(lines, "\n".join(["1 2 oh", *texts[:3], "", *bad, *texts[3:], "1"]))
    run = SendRun()
    assert await run(lines, name="mic") == Exit.FOUND_PROBLEMS
    np.testing.assert_array_equal(run.printed()["mic"], reference(frames)[0])
    named = re.findall(r"^error: line (\d+): ", run.terminal.complained, re.M)
    assert named == ["1", "6", "7", "8", "9", "10", "30"]
    assert "22 bad lines" in run.terminal.complained.splitlines()[-1]


async def test_an_input_without_frames_is_an_error(lines: Path) -> None:
    write(lines, "# nothing\n\n")
    run, stopped = SendRun(), SendRun()
    with pytest.raises(BadFile):
        await run(lines)
    assert run.terminal.data == ""
    stopped.stop.request()
    assert await stopped(lines) == Exit.OK


async def test_the_first_column_names_the_stream(lines: Path, frames: F32) -> None:
    names = ["left", "right", "left", "left", "right", "left", "middle"]
    texts = zip(names, lines_of(frames).splitlines(), strict=True)
    write(lines, "".join(f"{name} {line}\n" for name, line in texts))
    run = SendRun()
    assert await run(lines, choice=Choice(named=True, streams="*t")) == Exit.OK
    assert set(run.printed()) == {"left", "right"}
    for name, outputs in run.printed().items():
        mine = [index for index, other in enumerate(names) if other == name]
        np.testing.assert_array_equal(outputs, reference(frames[mine])[0])


@pytest.mark.parametrize(
    ("what", "error"),
    [({"name": "a" * 300}, InvalidInput), ({"choice": Choice(streams="mic-*")}, CommandProblem)],
)
async def test_names_that_no_stream_may_have_or_no_line_has(
    lines: Path, what: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await SendRun()(lines, **what)


async def test_a_stream_that_cannot_be_opened_is_left_out(lines: Path) -> None:
    write(lines, "".join(f"{name} 1 2 3\n" for name in ("a", "b", "a", "b", "b")))
    run = SendRun()
    run.server.rules.occupy("b")
    run.keeps = {"b"}
    assert await run(lines, choice=Choice(named=True)) == Exit.FOUND_PROBLEMS
    assert {name: len(values) for name, values in run.printed().items()} == {"a": 2}
    assert run.terminal.complained.count("error: NAME_IN_USE: ") == 1


@pytest.mark.parametrize("source", ["stdin", "file"])
async def test_a_name_in_use_is_answered_with_what_helps_on_the_command_line(lines: Path, source: str) -> None:
    run = SendRun()
    run.server.rules.occupy("it's")
    run.keeps = {"it's"}
    try:
        await run(**{source: lines}, name="it's")
        said = run.terminal.complained
    except CommandProblem as problem:
        said = str(problem)
    assert "--name" in said
    (closing,) = re.findall(r"instep (streams close '.+s')", said)
    assert shlex.split(closing) == ["streams", "close", "it's"]
