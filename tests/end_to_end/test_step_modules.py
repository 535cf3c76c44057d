"""Steps of users' own, served, recorded and verified; the truth is the module itself in eager torch."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from instep.core.typing import F32
from instep.models.model import Model
from instep.recording.reader import RecordingReader
from instep.replay import command, verifier
from instep.replay.recorded_model import recorded_model
from instep_client import AsyncClient
from tests.support.running import prepared, running
from tests.support.steps import FEATURES, STEPS, eager, exported, exported_folder
from tests.support.streaming import step, streaming

STREAMS, FRAMES = 6, 25


def check(name: str, y: F32, x: F32, state: Any = None) -> None:
    """Compare one stream's outputs, and its final state, with the definition, and with the module itself."""
    network = prepared(exported(name)).network
    definition, initial = network.definition(), network.state.unpack(network.state.initial(1))
    assert definition is not None
    bits, after = definition.run(x[:, None], initial, np.ones(len(x), np.int64))
    expected, leaves = eager(name, x, 1)
    np.testing.assert_array_equal(y, bits[:, 0])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    found = list(state.values()) if isinstance(state, dict) else [state] * (state is not None)
    for leaf, same, values in zip(leaves, after.values(), found, strict=state is not None):
        np.testing.assert_array_equal(values, same[0])
        np.testing.assert_allclose(values, leaf.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
async def test_it_is_served_recorded_and_verified(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((STREAMS, FRAMES, FEATURES)).astype(np.float32)
    recording = {"path": tmp_path / "r.instep"}
    folder = exported_folder(name)
    async with (
        running(exported(name), recording=recording, folder=folder) as server,
        AsyncClient(server.endpoint) as client,
    ):
        assert client.info.state == exported(name).description.state
        streams = [await client.open(f"s{at}") for at in range(STREAMS)]
        found = await asyncio.gather(*(stream.step(frames) for stream, frames in zip(streams, x, strict=True)))
        for at, stream in enumerate(streams):
            check(name, found[at], x[at], await stream.close())
        await (await client.open("without frames")).close()
        parked = await client.open("parked")
        first = await parked.step(x[0, :10])
        await client.close(park=True)
    async with (
        running(exported(name), recording=recording, folder=folder) as server,
        AsyncClient(server.endpoint) as client,
    ):
        parked = await client.resume("parked", 10, take_over=True)
        rest = await parked.step(x[0, 10:])
        check(name, np.concatenate([first, rest]), x[0], await parked.close())
    with RecordingReader(tmp_path / "r.instep") as reader:
        report = verifier.verify(reader, recorded_model(reader.header, None), [], lambda share: None)
    assert report.verified, report.streams
    assert (report.reference, report.verdict, report.notes) == ("same graph", "exact", ())


@pytest.mark.parametrize("name", ["layer_norm_gru", "counting"])
async def test_it_is_served_in_process(name: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((FRAMES, STREAMS, FEATURES)).astype(np.float32)
    async with streaming(inline=True, model=exported(name)) as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open([f"s{at}" for at in range(STREAMS)])).handles
        parts = [(await step(origin, handles, [at] * STREAMS, x[at : at + 5], at)).y for at in range(0, FRAMES, 5)]
        y = np.concatenate(parts)
    for at in range(STREAMS):
        check(name, y[:, at], x[:, at])


async def test_a_report_says_that_the_reference_shares_the_graph_and_tampering_is_found(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "r.instep", exported_folder("min_gru")
    async with (
        running(exported("min_gru"), recording={"path": file}, folder=folder) as server,
        AsyncClient(server.endpoint) as client,
    ):
        stream = await client.open("s")
        await stream.step(rng.standard_normal((5, FEATURES)).astype(np.float32))
        await stream.close()
    console = Console(width=80, record=True, force_terminal=False)
    assert command.run([file], None, [], console) == 0
    told = " ".join(console.export_text().split())
    assert "the float64 reference computes the graph in the model folder: a mistake in that does not show" in told
    capsys.readouterr()
    assert command.run([file], None, [], console, json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["reference"] == "same graph"
    model = exported("min_gru")
    weights = {**model.weights, "head.bias": model.weights["head.bias"] + 1e-3}
    with RecordingReader(file) as reader:
        report = verifier.verify(reader, Model("other", model.description, weights), [], lambda share: None)
    assert report.mismatches == 1
    assert "stepped" in report.streams[0].problems[0]
