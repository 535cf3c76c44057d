"""A recording is written by one engine at a time, of one model, and floats change their bits only when asked to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import write_model
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.server.preparation import CannotServe
from instep.server.server import Server
from tests.support.forger import Forger
from tests.support.models import SMALL, plain, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.warm import run_instep

F, H = 5, 8


async def refusal(model: object, path: Path) -> str:
    """Why a server is not started on a recording."""
    with pytest.raises(CannotServe) as refused:
        async with running(model, recording={"path": path}):  # type: ignore[arg-type]
            pass
    return str(refused.value)


async def opened_and_stepped(server: Server, x: np.ndarray) -> int:
    """Stream frames float32 [T, features]; the epoch."""
    async with RawClient(server.endpoint) as client:
        await client.hello()
        opened = await client.open("s")
        assert (await client.step(opened.handles(), [0], x[:, None])).failures() == []
    return opened.epochs()[0]


async def test_a_second_server_on_a_recording_is_refused_until_the_first_has_ended(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "r.instep"
    x = rng.standard_normal((3, F)).astype(np.float32)
    async with running(SMALL, recording={"path": path}) as first:
        said = await refusal(SMALL, path)
        assert re.fullmatch(rf"{path} is being written by another instep \(pid \d+\); stop that one, .*", said)
        epoch = await opened_and_stepped(first, x)
    async with running(SMALL, recording={"path": path}) as second, RawClient(second.endpoint) as client:
        await client.hello()
        assert (await client.resume(["s"], [3], [epoch])).seqs() == [3]
        assert "is being written" in await refusal(SMALL, path)


def test_a_second_process_on_a_recording_ends_with_a_sentence_and_status_1(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    write_model(tmp_path / "model", SMALL)
    arguments = ["serve", str(tmp_path / "model"), "--endpoint", "tcp://127.0.0.1:*", "--http", "off"]
    lock = WriterLock(path)
    try:
        served = run_instep([*arguments, "--record", str(path)])
    finally:
        lock.release()
    assert served.returncode not in (0, 130)
    assert "is being written by another instep" in " ".join((served.stderr + served.stdout).split())
    assert "Traceback" not in served.stderr
    assert not path.exists()


async def test_a_recording_of_another_model_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    async with running(SMALL, recording={"path": path}) as server:
        await opened_and_stepped(server, np.ones((3, F), np.float32))
    before = path.read_bytes()
    for other in (plain(5, 8, seed=8), plain(5, 12)):
        said = await refusal(other, path)
        assert f"{path} is a recording of the model" in said
        assert SMALL.fingerprint[:12] in said
        assert other.fingerprint[:12] in said
    assert path.read_bytes() == before


async def test_a_recording_that_began_in_another_arithmetic_is_continued_and_nobody_is_told(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """As one of a GPU is on a CPU."""
    path, other = tmp_path / "r.instep", "torch 1.9 on cuda:0"
    x = rng.standard_normal((8, F)).astype(np.float32)
    truth, _ = whole(SMALL, x)
    async with running(SMALL, recording={"path": tmp_path / "here.instep"}) as server:
        epoch = await opened_and_stepped(server, x[:4])
    Forger(tmp_path / "here.instep", path).change_header("arithmetic", json.dumps(other))
    async with running(SMALL, recording={"path": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(["s"], [4], [epoch])
        assert (resumed.codes(), resumed.seqs()) == ([], [4])
        reply = await client.step(resumed.handles(), [4], x[4:, None], [4])
        np.testing.assert_array_equal(reply.floats().reshape(4, H), truth[4:])
    with RecordingReader(path) as reader:
        assert [engine.header.arithmetic for engine in reader.engines] == [other, "portable-1"]
