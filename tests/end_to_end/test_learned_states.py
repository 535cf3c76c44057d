"""Networks whose streams begin with a learned state, served, recorded, restarted and verified.

The truth is torch's module over the whole sequence, from that state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from instep.core.typing import F32
from instep.models import export_step, save_model
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.handover.layers import RECURRENT
from instep.models.onnx.importer import import_onnx
from instep.recording.reader import RecordingReader
from instep.replay.verifier import verify
from instep_client import AsyncClient
from instep_tools.connect import Target
from instep_tools.formats.read import read_sequences
from instep_tools.pacing import Pace, Stop
from instep_tools.problems import Exit
from instep_tools.send import SendJob, send
from instep_tools.sequences import RecordedSequences
from tests.support.onnx_graphs import gru_step
from tests.support.running import running
from tests.support.swapping import reload_models
from tests.support.verifying import ignore_progress
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table

FEATURES, HIDDEN, FRAMES = 5, 24, 12


class Network(nn.Module):
    """As it was trained: a GRU, LSTM or RNN that begins with a parameter, or with two."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gru, self.head = RECURRENT.get(kind, nn.GRU)(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3)
        self.h0 = nn.Parameter(torch.linspace(-1, 1, HIDDEN))
        self.c0 = nn.Parameter(torch.linspace(2, -1, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h0, c0 = (each.expand(1, *x.shape[1:-1], HIDDEN) for each in (self.h0, self.c0))
        y, _ = self.gru(x, (h0, c0) if isinstance(self.gru, nn.LSTM) else h0)
        return self.head(y)  # type: ignore[no-any-return]


class Step(nn.Module):
    """One frame of it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(FEATURES, HIDDEN), network.head
        self.cell.load_state_dict({name[:-3]: each for name, each in network.gru.state_dict().items()})

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        h = self.cell(x, state["h"])
        return self.head(h), {"h": h}


def trained(kind: str = "gru") -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Network(kind).eval()


def make_folder(kind: str, folder: Path) -> None:
    network = trained(kind)
    if kind in RECURRENT:
        save_model(folder, network)
        return
    assert isinstance(network.gru, nn.GRU)
    if kind == "onnx":
        file = folder.with_suffix(".onnx")
        file.write_bytes(gru_step(network.gru, network.head).SerializeToString())
        import_onnx(file, folder)
        tensors = load_file(folder / "weights.safetensors")
        edit(folder, lambda fields: fields["state"][0].update(initial="learned"))
        save_file(tensors | {"initial_state.h": network.h0.detach()[None]}, folder / "weights.safetensors")
        return
    export_step(Step(network), torch.zeros(1, FEATURES), {"h": network.h0[None]}, folder, initial_state="example")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.yaml"
    fields = yaml.safe_load(file.read_text())
    change(fields)
    file.write_text(yaml.safe_dump(fields))


@torch.inference_mode()
def truth(kind: str, x: F32, first: F32 | None = None) -> F32:
    network = trained(kind)
    if first is not None:
        network.h0.copy_(torch.from_numpy(first))
    y: F32 = network(torch.from_numpy(x)).numpy()
    return y


@pytest.mark.parametrize("kind", ["module", "onnx", *RECURRENT])
async def test_streams_begin_with_what_the_model_has_learned(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = tmp_path / "net"
    sections: dict[str, Any] = {"recording": {"path": tmp_path / "r.instep"}, "engine": {"max_batch_size": 32}}
    make_folder(kind, folder)
    model = load_model(folder)
    first = trained().h0.detach().numpy()
    x = rng.standard_normal((FRAMES, FEATURES)).astype(np.float32)
    async with running(model, folder=folder, **sections) as server, AsyncClient(server.endpoint) as client:
        assert client.info.state.leaves[0].initial is None
        await (await client.open("without frames")).close()
        stream = await client.open("s")
        _, state = await client.read_state("s")
        h = state["h"] if isinstance(state, dict) else state
        assert h.tobytes() == first.tobytes()
        if kind == "lstm":
            assert state["c"].tobytes() == trained(kind).c0.detach().numpy().tobytes()
        y = [await stream.step(x[:5])]
        reset = await client.open("reset")
        await reset.step(x[:3])
        await reset.reset()
        np.testing.assert_allclose(await reset.step(x), truth(kind, x), rtol=1e-4, atol=1e-5)
        await client.close(park=True)
    async with running(model, folder=folder, **sections) as server, AsyncClient(server.endpoint) as client:
        stream = await client.resume("s", 5, take_over=True)
        y.append(await stream.step(x[5:]))
        await stream.close()
    np.testing.assert_allclose(np.concatenate(y), truth(kind, x), rtol=1e-4, atol=1e-5)
    with RecordingReader(tmp_path / "r.instep") as reader:
        report = verify(reader, model, [], ignore_progress)
    assert report.verified, report.streams


async def test_streams_that_move_to_another_version_keep_their_start_and_later_ones_have_its_own(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    old, new, recordings = tmp_path / "old" / "net", tmp_path / "new" / "net", tmp_path / "recordings"
    for folder in (old, new):
        folder.parent.mkdir()
        make_folder("module", folder)
    tensors = dict(load_model(new).weights)
    former, later = trained().h0.detach().numpy(), trained().h0.detach().numpy() + np.float32(0.5)
    save_file(tensors | {"initial_state.h": torch.from_numpy(later)}, new / "weights.safetensors")
    x = rng.standard_normal((FRAMES, FEATURES)).astype(np.float32)
    sections: dict[str, Any] = {"recording": {"path": recordings}, "engine": {"max_batch_size": 32}}
    async with running(load_model(old), folder=old, **sections) as server, AsyncClient(server.endpoint) as client:
        used, unused = await client.open("used"), await client.open("unused")
        y = [await used.step(x[:4])]
        assert not await reload_models(server, {"net": new}, "move")
        y.append(await used.step(x[4:]))
        np.testing.assert_allclose(np.concatenate(y), truth("module", x, former), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(await unused.step(x), truth("module", x, former), rtol=1e-4, atol=1e-5)
        await unused.reset()
        async with AsyncClient(server.endpoint) as another:
            for stream in (unused, await another.open("later")):
                np.testing.assert_allclose(await stream.step(x), truth("module", x, later), rtol=1e-4, atol=1e-5)
    (file,) = (each for each in recordings.glob("*.instep") if each.name != "net.instep")
    with RecordingReader(file) as reader:
        report = verify(reader, load_model(new), [], ignore_progress)
    assert report.verified, report.streams


async def test_a_recording_is_replayed_with_learned_states_and_others_side_by_side(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    make_folder("module", tmp_path / "net")
    frames, given = rng.standard_normal((2 * FRAMES, FEATURES), np.float32), rng.standard_normal(HIDDEN, np.float32)
    lengths = np.array([FRAMES, FRAMES])
    save_table(
        tmp_path / "spoken.npz", RecordedSequences(("a", "b"), lengths, frames, initial_states={1: {"h": given}})
    )
    async with running(load_model(tmp_path / "net"), engine={"max_batch_size": 32}) as server:
        again = SendJob(
            Target(server.endpoint), Pace(speed=math.inf), tmp_path / "spoken.npz", output=tmp_path / "outputs.npz"
        )
        assert await send(again, RememberingTerminal(), Stop(), JumpingClock()) == Exit.OK
    y = read_sequences(tmp_path / "outputs.npz").outputs
    assert y is not None
    np.testing.assert_allclose(y[:FRAMES], truth("module", frames[:FRAMES]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y[FRAMES:], truth("module", frames[FRAMES:], given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["module", "onnx", "gru"])
def test_what_was_learned_belongs_to_the_model(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    make_folder(kind, folder)
    before = load_model(folder)
    tensors = dict(before.weights)
    (name,) = (name for name in tensors if name.startswith("initial_state."))
    save_file(tensors | {name: tensors[name] + 1}, folder / "weights.safetensors")
    assert load_model(folder).fingerprint != before.fingerprint
    save_file({each: tensor for each, tensor in tensors.items() if each != name}, folder / "weights.safetensors")
    with pytest.raises(ModelError, match=r"lacks .*: tensor initial_state\.h \["):
        load_model(folder)
    save_file(tensors | {name: tensors[name][..., :-1].contiguous()}, folder / "weights.safetensors")
    with pytest.raises(ModelError, match=r"tensor initial_state\.h of .* has shape"):
        load_model(folder)
