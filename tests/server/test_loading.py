"""Models that a reload loads into a running server and unloads from it, while streams of others go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest

from instep.models.folder import load_model, write_model
from instep.models.model import Model
from instep_client import AsyncClient, ConnectionFailed, Refused
from instep_client.protocol.wire import Code
from tests.support.models import plain, whole
from tests.support.running import running
from tests.support.swapping import reload_models

EARS = replace(plain(5, 8), name="ears")
VOWELS = replace(plain(3, 16, seed=9), name="vowels")
EXACT = {"max_batch_size": 16}
LOAD_FOREVER = """
import torch
from instep import __main__
from instep.server import preparation

load = preparation.load_model
def load_forever(folder):
    if folder.name != "vowels":
        return load(folder)
    print("loading", flush=True)
    while True:
        torch.ones(9, 9) @ torch.ones(9, 9)

preparation.load_model = load_forever
__main__.main()
"""
"""`instep`, where loading the model "vowels" never ends."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model that is loaded."""
    write_model(tmp_path / "ears", EARS)
    write_model(tmp_path / "vowels", VOWELS)
    return tmp_path / "vowels"


def with_ears(folder: Path) -> dict[str, Path]:
    """The model that is loaded and the one that is served."""
    return {"ears": folder.parent / "ears", "vowels": folder}


async def test_a_model_comes_and_goes_and_comes_back_with_its_streams_while_another_is_served(
    folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((30, 3)).astype(np.float32)
    other = rng.standard_normal((2000, 5)).astype(np.float32)
    told: list[dict[str, Any]] = []
    (tmp_path / "recordings").mkdir()
    recording = {"file": tmp_path / "recordings"}
    async with running(EARS, told=told, recording=recording, engine=EXACT) as server:
        async with AsyncClient(server.endpoint) as busy:
            ears = await busy.open("s")
            served: list[Any] = []

            async def serve() -> None:
                while len(served) < len(other):
                    served.append(await ears.step(other[len(served)]))

            serving = asyncio.create_task(serve())
            before = len(served)
            assert not await reload_models(server, with_ears(folder))
            assert [each.name for each in await busy.list_models()] == ["ears", "vowels"]
            assert len(served) > before, "frames are stepped while another model is compiled"
            client = AsyncClient(server.endpoint, model="vowels")
            await client.connect()
            unused = AsyncClient(server.endpoint, model="vowels", reconnect_s=0)
            await unused.connect()
            stream = await client.open("v")
            first = await stream.step(x[:10])
            assert not await reload_models(server, tmp_path / "ears")
            assert [each.name for each in await busy.list_models()] == ["ears"]
            stepping = asyncio.create_task(stream.step(x[10:]))
            with pytest.raises(ConnectionFailed, match="'vowels'"):
                await unused.ping()
            await unused.close()
            with pytest.raises(Refused) as refused:
                await AsyncClient(server.endpoint, model="vowels").connect()
            assert refused.value.code is Code.UNKNOWN_MODEL
            assert not await reload_models(server, with_ears(folder))
            second = await stepping  # the client has asked for its model until it was there again
            await client.close()
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
    truth, _ = whole(VOWELS, x)
    np.testing.assert_array_equal(np.concatenate([first, second]), truth)
    np.testing.assert_array_equal(np.array(served), whole(EARS, other[: len(served)])[0])
    events = [line["event"] for line in told if line.get("model") == "vowels"]
    assert [event for event in events if event in ("loaded", "unloaded", "recovered")] == [
        "loaded",
        "unloaded",
        "recovered",
        "loaded",
    ]


async def test_a_model_that_cannot_be_loaded_changes_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    pipe = tmp_path / "pipe"
    write_model(pipe, VOWELS)
    (pipe / "weights.safetensors").unlink()
    os.mkfifo(pipe / "weights.safetensors")
    (tmp_path / "vowels.instep").write_bytes(b"not a recording")
    async with running(EARS, recording={"file": tmp_path}, engine=EXACT) as server:
        open_files = []
        for path, words in (
            (tmp_path / "broken", "is not a model folder"),
            (pipe, "is not a regular file"),
            *[(folder, "is not a recording")] * 3,
        ):
            assert words in await reload_models(server, with_ears(path))
            open_files.append(len(os.listdir("/proc/self/fd")))
        assert [service.name for service in server.services] == ["ears"]
        assert len(set(open_files[2:])) == 1, "the pipe of the executor that was made for it is closed"
    async with running(EARS, recording={"file": tmp_path / "r.instep"}, engine=EXACT) as server:
        assert "each of several models" in await reload_models(server, with_ears(folder))


class Reading:
    """No model folder is read before it `may_begin`."""

    def __init__(self) -> None:
        self.is_due = threading.Event()
        self.may_begin = threading.Event()

    def load(self, folder: Path) -> Model:
        """Instead of the function of the server."""
        self.is_due.set()
        assert self.may_begin.wait(60)
        return load_model(folder)

    async def until_due(self) -> None:
        """Wait until the server has taken a request to load a model."""
        while not self.is_due.is_set():
            await asyncio.sleep(0.001)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reading]:
    """Of the folders of models that are loaded."""
    reading = Reading()
    monkeypatch.setattr("instep.server.preparation.load_model", reading.load)
    yield reading
    reading.may_begin.set()
    for thread in threading.enumerate():
        if thread.name == "instep-loader":
            thread.join()  # a thread that calls torch while the interpreter ends aborts the process


async def test_the_end_of_the_server_does_not_wait_for_a_model_that_is_being_loaded(
    folder: Path, reading: Reading
) -> None:
    told: list[dict[str, Any]] = []
    async with running(EARS, told=told, engine=EXACT, shutdown={"drain_timeout_s": 5.0}) as server:
        loading = asyncio.create_task(reload_models(server, with_ears(folder)))
        await reading.until_due()
        server.stop()
    loading.cancel()
    assert [line for line in told if line["level"] == "error"] == [], "and that is no failure"
    assert not reading.may_begin.is_set()


def test_a_thread_that_still_loads_a_model_does_not_abort_the_process_at_its_end(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{folder: {tmp_path / 'ears'}}}")
    command = [sys.executable, "-c", LOAD_FOREVER, "serve", "--config", str(file)]
    command += ["--endpoint", "tcp://127.0.0.1:*", "--http", "off", "--set", "log.format=json"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            lines = map(json.loads, process.stderr)
            assert any(line["event"] == "serving" for line in lines)
            file.write_text(f"model: {{folder: [{tmp_path / 'ears'}, {folder}]}}")
            process.send_signal(signal.SIGHUP)
            assert process.stdout.readline() == "loading\n"
            process.terminate()
            said = process.stderr.read().splitlines()
            assert (json.loads(said[-1])["event"], process.wait()) == ("stopped", 0)
        finally:
            process.kill()
