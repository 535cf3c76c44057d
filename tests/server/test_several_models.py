"""Several models in one server: each with its own connections, its own streams and its own recording."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from instep.config import Config, load_config
from instep.core.typing import F32
from instep.models.folder import write_model
from instep.server.checks import rehearse
from instep.server.preparation import CannotServe, prepare
from instep_client import AsyncClient, Client, Refused
from instep_client.protocol.wire import Code
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import plain, whole
from tests.support.running import config, log_into, running
from tests.support.served import serving
from tests.support.warm import run_instep

EARS = replace(plain(5, 8), name="ears")
VOWELS = replace(plain(3, 16, seed=9), name="vowels")
FEATURES = {"ears": 5, "vowels": 3}
MODELS = {model.name: model for model in (EARS, VOWELS)}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The two models on disk."""
    for name, model in MODELS.items():
        write_model(tmp_path / name, model)
    return [tmp_path / name for name in MODELS]


def frames_of(rng: np.random.Generator, name: str, count: int) -> F32:
    """float32 [count, features]."""
    return rng.standard_normal((count, FEATURES[name])).astype(np.float32)


def test_each_client_gets_the_outputs_of_its_model_through_a_crash_and_each_recording_verifies(
    folders: list[Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    x = {name: frames_of(rng, name, 60) for name in MODELS}
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    arguments = [str(folders[1]), "--restart", "--record", str(tmp_path / "recordings")]
    with serving(folders[0], *arguments, endpoint=endpoint, start_new_session=True) as served:
        served.until("serving")
        with Client(endpoint, model="vowels") as vowels, Client(endpoint) as ears:
            streams = {"ears": ears.open("s"), "vowels": vowels.open("s")}
            outputs = {name: [stream.step(x[name][:30])] for name, stream in streams.items()}
            (child,) = psutil.Process(served.process.pid).children()
            child.kill()
            for name, stream in streams.items():
                outputs[name].append(stream.step(x[name][30:]))
        served.process.terminate()
        served.end()
        assert served.process.returncode == 0
    for name, model in MODELS.items():
        np.testing.assert_array_equal(np.concatenate(outputs[name]), whole(model, x[name])[0])
        verified = run_instep(["verify", str(tmp_path / "recordings" / f"{name}.instep")])
        assert verified.returncode == 0, verified.stdout + verified.stderr


async def test_a_connection_sees_the_streams_the_numbers_and_the_limits_of_its_model_alone(
    rng: np.random.Generator,
) -> None:
    x = frames_of(rng, "ears", 4)
    limits = {"max_connections": 3}
    async with running(EARS, VOWELS, engine={"max_streams": 1}, limits=limits) as server:
        async with (
            AsyncClient(server.endpoint, model="ears") as ears,
            AsyncClient(server.endpoint, model="vowels") as vowels,
        ):
            stream = await ears.open("s")
            await stream.step(x)
            assert [each.name for each in await ears.list_streams()] == ["s"]
            assert await vowels.list_streams() == []
            await vowels.open("s")  # neither the name nor the room is taken
            numbers = await ears.stats(), await vowels.stats()
            assert [each["frames_total"] for each in numbers] == [4, 0]
            assert [each["connections"] for each in numbers] == [1, 1]
            assert await vowels.list_models() == [("ears", 5, 8, 1, 1, 4), ("vowels", 3, 16, 1, 1, 0)]
            async with AsyncClient(server.endpoint):
                with pytest.raises(Refused, match="3 connections") as refused:
                    await AsyncClient(server.endpoint, model="vowels").connect()
                assert refused.value.code is Code.BUSY


async def test_a_model_whose_steps_hang_does_not_keep_the_other_one_waiting(rng: np.random.Generator) -> None:
    x, gate = frames_of(rng, "vowels", 100), Gate()
    async with (
        running(EARS, VOWELS, stepper=gate.stepper) as server,
        AsyncClient(server.endpoint, model="ears") as stuck,
        AsyncClient(server.endpoint, model="vowels") as client,
    ):
        hanging, stream = await stuck.open("hangs"), await client.open("s")
        waiting = asyncio.create_task(hanging.step(np.full(5, GATE_VALUE, np.float32)))
        try:
            while not server.default.engine.is_running:
                await asyncio.sleep(0.001)
            outputs = [await stream.step(frame) for frame in x]
            assert not waiting.done()
        finally:
            gate.open()
        await waiting
    np.testing.assert_array_equal(np.array(outputs), whole(VOWELS, x)[0])


def several(folders: object, **sections: dict[str, object]) -> Config:
    return config(model={"folder": folders}, engine={"max_batch_size": 8}, **sections)


def test_models_of_one_name_are_refused_until_the_configuration_names_them(folders: list[Path], tmp_path: Path) -> None:
    quiet = log_into([])
    write_model(tmp_path / "newer", replace(plain(5, 8, seed=8), name="ears"))
    with pytest.raises(CannotServe, match=r"'ears': .*/ears and .*/newer"):
        prepare(several([folders[0], tmp_path / "newer"]), quiet)
    (tmp_path / "c.yaml").write_text("model: {folder: {old: ears, new: newer}}\n")
    named = prepare(load_config(tmp_path / "c.yaml"), quiet)
    assert [(each.model.name, each.model_path.name) for each in named] == [("old", "ears"), ("new", "newer")]
    with pytest.raises(CannotServe, match="name"):
        prepare(several({"": folders[0]}), quiet)


def test_several_models_are_recorded_in_a_folder(folders: list[Path], tmp_path: Path) -> None:
    quiet = log_into([])
    for name in ("a/b", "a@2"):
        with pytest.raises(CannotServe, match=f"'{name}'"):
            rehearse(several({name: folders[0], "c": folders[1]}, recording={"path": tmp_path}), quiet)
    rehearse(several(folders, recording={"path": tmp_path}), quiet)
    rehearse(several(folders[0], recording={"path": tmp_path}), quiet)
