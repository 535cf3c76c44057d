"""A kind of model that the engine does not have: a description, a normal form, and a line in the registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from instep.core.typing import F32
from instep.models.errors import ModelError
from instep.models.folder import load_model, write_model
from instep.models.network import PortableNetwork
from instep.models.registry import build, parse_description
from instep.recording.reader import RecordingReader
from instep_client import AsyncClient
from tests.support.leaky import by_hand, leaky, registered
from tests.support.running import CPU, running

MODEL = leaky(3)
SPEC = MODEL.description.state


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


def test_its_folder_is_read_back(tmp_path: Path) -> None:
    write_model(tmp_path, MODEL)
    found = load_model(tmp_path)
    assert (found.description, found.fingerprint) == (MODEL.description, MODEL.fingerprint)
    assert isinstance(build(found, CPU), PortableNetwork)


def test_a_network_that_does_not_come_from_torch_is_always_on_the_cpu() -> None:
    network = build(MODEL, torch.device("cuda"))
    assert (network.device, network.arithmetic) == (CPU, "portable-1")


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ModelError, match=r"there is no kind of model 'reservoir'; expected gru, .*leaky"):
        parse_description({"kind": "reservoir", "features": 3})


def test_without_a_module_of_torch_and_a_reference_the_definition_is_left() -> None:
    network, x = build(MODEL, CPU), np.ones((5, 2, 3), np.float32)
    rows = SPEC.initial(2)
    assert (network.sequence(x, rows), network.reference(np.float64)) == (None, None)
    definition = network.definition()
    assert definition is not None
    y, after = definition.run(x, SPEC.unpack(rows), np.array([2, 2, 2, 1, 1]))
    expected, level, _ = by_hand(MODEL, x[:, 0])
    np.testing.assert_array_equal(y[:, 0], expected)
    np.testing.assert_array_equal(after["level"][0], level)
    assert after["frames"].tolist() == [3 + 5, 3 + 3]


def same(found: dict[str, F32], level: F32, frames: int) -> bool:
    return found["level"].tolist() == level.tolist() and int(found["frames"]) == frames


async def test_it_is_served_recorded_and_continued(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((12, 3)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep"}
    async with running(MODEL, recording=recording) as server, AsyncClient(server.endpoint) as client:
        assert client.info.state == SPEC
        stream = await client.open("s")
        first = await stream.step(x[:5])
        expected, level, frames = by_hand(MODEL, x[:5])
        np.testing.assert_array_equal(first, expected)
        seq, state = await stream.read_state()
        assert seq == 5
        assert same(state, level, frames)
        copy = await client.open("copy", state, seq)
        np.testing.assert_array_equal(await copy.step(x[5:8]), by_hand(MODEL, x[5:8], level, frames)[0])
        await stream.reset()
        np.testing.assert_array_equal(await stream.step(x[5:8]), by_hand(MODEL, x[5:8])[0])
        assert same(await stream.close(), *by_hand(MODEL, x[5:8])[1:])
        (await copy.snapshot()).save(tmp_path / "copy.safetensors")
        await client.close(park=True)
    with RecordingReader(tmp_path / "r.instep") as reader:
        assert reader.header.state_spec == SPEC
        closed, opened = reader.streams()
        assert closed.initial_state is None
        assert closed.final_state is not None
        assert same(
            {name: leaf[0] for name, leaf in SPEC.unpack(closed.final_state[None]).items()}, *by_hand(MODEL, x[5:8])[1:]
        )
        assert opened.initial_state is not None
    async with running(MODEL, recording=recording) as server, AsyncClient(server.endpoint) as client:
        copy = await client.resume("copy", 8, take_over=True)
        y = await copy.step(x[8:])
        np.testing.assert_array_equal(y, by_hand(MODEL, x[5:], level, frames)[0][3:])
