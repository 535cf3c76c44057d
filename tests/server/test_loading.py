"""Models that a reload loads into a running server and unloads from it, while streams of others go on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.models.folder import load_model, write_model
from instep.models.model import Model
from instep_client import AsyncClient, ConnectionFailed, Refused, StreamEvicted
from instep_client.protocol.wire import Code
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import plain, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.swapping import reload_models

EARS = replace(plain(5, 8), name="ears")
VOWELS = replace(plain(3, 16, seed=9), name="vowels")
EXACT = {"max_batch_size": 16}


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
    recording = {"path": tmp_path / "recordings"}
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


async def test_a_model_that_cannot_be_loaded_changes_nothing_and_leaves_nothing_open(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "vowels.instep").write_bytes(b"not a recording")
    async with running(EARS, recording={"path": tmp_path}, engine=EXACT) as server:
        open_files = []
        for _ in range(3):
            assert await reload_models(server, with_ears(folder))
            open_files.append(len(os.listdir("/proc/self/fd")))
        assert [service.name for service in server.services] == ["ears"]
        assert len(set(open_files)) == 1, "the pipe of the executor that was made for it is closed"


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


async def test_streams_of_an_unloaded_model_that_no_recording_keeps_end_and_their_owners_are_told(
    folder: Path,
) -> None:
    async with running(EARS, engine=EXACT) as server:
        assert not await reload_models(server, with_ears(folder))
        async with AsyncClient(server.endpoint, model="vowels", reconnect_s=1) as client:
            stream = await client.open("v")
            await stream.step(np.zeros(3, np.float32))
            assert not await reload_models(server, folder.parent / "ears")
            with pytest.raises(StreamEvicted) as ended:
                await stream.step(np.zeros(3, np.float32))
            assert ended.value.code is Code.UNLOADED


async def test_a_step_that_hangs_while_its_model_is_unloaded_holds_nobody_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr("instep.server.services.Stepper", gate.bare_stepper)
    async with running(EARS, engine=EXACT, shutdown={"drain_timeout_s": 0.3}) as server:
        assert not await reload_models(server, with_ears(folder))
        async with RawClient(server.endpoint) as raw, AsyncClient(server.endpoint) as busy:
            await raw.hello("vowels")
            handles = (await raw.open("v")).handles()
            await raw.send(*raw.step_message(handles, [0], np.full((1, 1, 3), GATE_VALUE, np.float32)))
            while not server.services[1].engine.is_running:
                await asyncio.sleep(0.001)
            try:
                ears = await busy.open("s")
                unloading = asyncio.create_task(reload_models(server, folder.parent / "ears"))
                while not unloading.done():
                    await ears.step(np.zeros(5, np.float32))
                assert not await unloading
            finally:
                gate.open()
