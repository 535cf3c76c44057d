"""LSTMs and RNNs over sockets: recorded, killed, continued, verified, and their states read by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.registry import parse_description
from instep_client import AsyncClient, StreamSnapshot
from tests.chaos.victim import Victim
from tests.support.forger import Forger
from tests.support.torch_network import TorchNetwork
from tests.support.warm import run_instep

STREAMS, FRAMES, FEATURES = 9, 14, 5
AROUND = {
    "before": [{"size": 12}, {"layer_norm": True, "activation": "relu"}],
    "after": [{"layer_norm": True, "eps": 1e-3}, {"size": 3, "activation": "softmax"}],
}


def described(kind: str, around: dict[str, Any], **recurrent: Any) -> Model:
    fields = {"kind": kind, "features": FEATURES, kind: recurrent, **around}
    return make_model(parse_description(fields), "random", name=kind, seed=4)


MODELS = {
    "lstm with frame layers": described("lstm", AROUND, hidden_size=20, num_layers=2),
    "lstm": described("lstm", {}, hidden_size=32, num_layers=2),
    "rnn": described("rnn", AROUND, hidden_size=16, nonlinearity="relu"),
    "gru": described("gru", AROUND, hidden_size=16, num_layers=2),
}


@pytest.mark.heavy
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
async def test_a_killed_server_continues_and_everything_is_verified(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    spec = model.description.state
    x = np.random.default_rng(1).standard_normal((FRAMES, STREAMS, FEATURES)).astype(np.float32)
    truth, rows = TorchNetwork(model).run(x, spec.initial(STREAMS), torch.float64)
    states, names = spec.unpack(rows), [f"stream-{number}" for number in range(STREAMS)]
    y = np.zeros(truth.shape, np.float32)
    with contextlib.closing(Victim(tmp_path, "commit", model=model)) as victim:
        await victim.start()
        async with AsyncClient(victim.endpoint) as client:
            assert client.info.state == spec
            group = await client.open_group(names)
            y[:6] = await group.step(x[:6])
            epochs = group.epochs
            await client.close(park=True)
        victim.kill()
        await victim.start()
        async with AsyncClient(victim.endpoint) as client:
            group = await client.resume_group(names, have=np.full(STREAMS, 6), epochs=epochs)
            y[6:] = await group.step(x[6:])
            seq, first = await client.read_state(names[0])
            (await client.snapshot(names[0])).save(tmp_path / "first.safetensors")
            copy = await client.restore(StreamSnapshot.load(tmp_path / "first.safetensors"), name="copy")
            again = await client.open("again", first, seq)
            frame = x[0, 0]
            answers = [await each.step(frame) for each in (copy, again)]
            assert answers[0].tobytes() == answers[1].tobytes()
            final = await group.close()
            await client.close()
        victim.stop()
    np.testing.assert_allclose(y, truth, rtol=1e-4, atol=1e-5)
    assert list(final) == list(first) == [leaf.name for leaf in spec.leaves]
    for leaf in spec.leaves:
        np.testing.assert_allclose(final[leaf.name], states[leaf.name], rtol=1e-4, atol=1e-5)
        assert first[leaf.name].tobytes() == np.ascontiguousarray(final[leaf.name][0]).tobytes()
    verified = run_instep(["verify", str(victim.recording)])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert ", 0 mismatches" in verified.stdout
    forger = Forger(victim.recording, tmp_path / "forged.db")
    batch, at = forger.find_frame(4, 9)
    outputs = forger.column(batch, "y")
    outputs[at] += np.float32(1e-4)
    forger.change_batch(batch, y=outputs)
    assert run_instep(["verify", str(forger.path)]).returncode == 1
