"""The engine with a model that is not a GRU: nothing outside `models/recurrent` may know what one is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.certify import candidate_buckets, certify
from instep.models.errors import ModelError
from instep.models.folder import load_model, write_model
from instep.models.registry import build, parse_description
from instep.recording.reader import RecordingReader
from instep.runtime.stepper import Stepper
from instep_client import AsyncClient
from tests.support.leaky import SLOTS, LeakyNetwork, by_hand, leaky, registered
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
    assert isinstance(build(found, CPU), LeakyNetwork)


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ModelError, match=r"there is no kind of model 'reservoir'; expected gru, .*leaky"):
        parse_description({"kind": "reservoir", "features": 3})


def test_certification_needs_no_call_for_whole_sequences() -> None:
    network = build(MODEL, CPU)
    candidates = candidate_buckets(network, 64)
    found = certify(network, candidates)
    assert (found.exactness, found.buckets, found.max_ulp, found.whole_sequence) == ("exact", candidates, 0, False)


def test_a_leaf_that_is_no_float_is_certified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(MODEL, CPU)
    bind = network.bind

    def miscounts(rows: int) -> object:
        step = bind(rows)
        run = step.run

        def wrong() -> None:
            run()
            step.new_state["frames"][rows // 2] += 1

        step.run = wrong  # type: ignore[method-assign]
        return step

    monkeypatch.setattr(network, "bind", miscounts)
    assert certify(network, (4, 8, 16)).exactness == "tolerance"


def test_what_shows_only_in_states_that_streams_reach_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(MODEL, CPU)
    bind = network.bind

    def differs_later(rows: int) -> object:
        step = bind(rows)
        run = step.run

        def wrong() -> None:
            run()
            step.new_state["level"][step.state["frames"] > 3 + 5] += rows

        step.run = wrong  # type: ignore[method-assign]
        return step

    monkeypatch.setattr(network, "bind", differs_later)
    assert len(certify(network, (4, 8, 16)).buckets) == 1


def test_it_is_stepped_over_its_slots(rng: np.random.Generator) -> None:
    steps = Stepper(build(MODEL, CPU), (4, 8), 10, CPU)
    steps.load(SLOTS, None)
    given = SPEC.initial(1)
    SPEC.unpack(given)["level"][:] = 7
    steps.load(SLOTS[1:2], given)
    x = rng.standard_normal((6, 3, 3)).astype(np.float32)
    y = np.zeros((6, 3, 4), np.float32)
    for frames, outputs in zip(x, y, strict=True):
        steps.step(SLOTS, np.arange(3), frames, outputs)
    found = SPEC.unpack(steps.read(SLOTS))
    for stream in range(3):
        level = np.full(3, 7, np.float32) if stream == 1 else None
        expected, final, frames_count = by_hand(MODEL, x[:, stream], level)
        np.testing.assert_array_equal(y[:, stream], expected)
        np.testing.assert_array_equal(found["level"][stream], final)
        assert found["frames"][stream] == frames_count


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
