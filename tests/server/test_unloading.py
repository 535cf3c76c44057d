"""Models that a reload unloads: what becomes of their streams, and of a step that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from instep.core.typing import U64
from instep.models.folder import write_model
from instep.runtime.executor import ThreadExecutor
from instep.server.server import Server
from instep.streaming.service import ModelService
from instep_client import AsyncClient, StreamEvicted
from instep_client.protocol.wire import Code
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import plain
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.swapping import reload_models

EARS = replace(plain(5, 8), name="ears")
VOWELS = replace(plain(3, 16, seed=9), name="vowels")
EXACT = {"max_batch_size": 16}


class Gated(NamedTuple):
    """A server with a model whose step waits for the gate, and the model's client."""

    server: Server
    vowels: ModelService
    raw: RawClient
    handles: U64
    gate: Gate


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The model that stays, and the one that is loaded and unloaded."""
    write_model(tmp_path / "ears", EARS)
    write_model(tmp_path / "vowels", VOWELS)
    return {"ears": tmp_path / "ears", "vowels": tmp_path / "vowels"}


async def test_streams_of_an_unloaded_model_that_no_recording_keeps_end_and_their_owners_are_told(
    folders: dict[str, Path],
) -> None:
    async with running(EARS, engine=EXACT) as server:
        assert not await reload_models(server, folders)
        client = AsyncClient(server.endpoint, model="vowels", reconnect_s=1)
        await client.connect()
        stream = await client.open("v")
        await stream.step(np.zeros(3, np.float32))
        assert not await reload_models(server, folders["ears"])
        with pytest.raises(StreamEvicted) as ended:
            await stream.step(np.zeros(3, np.float32))
        assert ended.value.code is Code.UNLOADED
        await client.close()


@contextlib.asynccontextmanager
async def gated(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, **sections: Any) -> AsyncIterator[Gated]:
    """A server that has loaded the model and steps a frame of one of its streams, which waits for the gate."""
    gate = Gate()
    monkeypatch.setattr("instep.server.services.Stepper", gate.bare_stepper)
    async with running(EARS, engine=EXACT, **sections) as server:
        assert not await reload_models(server, folders)
        vowels = server.services[1]
        async with RawClient(server.endpoint) as raw:
            await raw.hello("vowels")
            handles = (await raw.open("v")).handles()
            await raw.send(*raw.step_message(handles, [0], np.full((1, 1, 3), GATE_VALUE, np.float32)))
            while not vowels.engine.is_running:
                await asyncio.sleep(0.001)
            try:
                yield Gated(server, vowels, raw, handles, gate)
            finally:
                gate.open()


async def test_a_step_that_hangs_while_its_model_is_unloaded_holds_nobody_up(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_in, stop = list[int](), ThreadExecutor.stop

    def noted(executor: ThreadExecutor, timeout_s: float | None = None) -> None:
        stopped_in.append(threading.get_ident())
        stop(executor, timeout_s)

    monkeypatch.setattr(ThreadExecutor, "stop", noted)
    async with gated(folders, monkeypatch, shutdown={"drain_timeout_s": 0.3}) as its:
        async with AsyncClient(its.server.endpoint) as busy:
            ears = await busy.open("s")
            unloading = asyncio.create_task(reload_models(its.server, folders["ears"]))
            while not unloading.done():
                await ears.step(np.zeros(5, np.float32))
            assert not await unloading
        assert stopped_in[0] != threading.get_ident(), "the loop did not wait for it"
