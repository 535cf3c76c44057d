"""Past values in front of each frame: the truth is the network over the windows of whole signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from instep.core.typing import F32
from instep.models.base import step_frames
from instep.models.errors import ModelError
from instep.models.folder import load_model, write_model
from instep.models.model import Model
from instep.models.network import PortableNetwork
from instep.models.registry import parse_description
from tests.support.pipelines import CONTEXT, HOP, LISTENS, listens, whole_signal
from tests.support.steps import FEATURES, exported
from tests.support.torch_network import check_bits


def learned(**changes: Any) -> dict[str, Any]:
    """A network whose streams begin with a learned state, which covers more than one frame of context."""
    layers = {"hidden_size": 6, "num_layers": 2}
    inside = {"kind": "lstm", "features": 13, "lstm": layers, "initial_state": "learned"}
    return {"kind": "pipeline", "features": 3, "context": 10, "network": inside, **changes}


def stepped(network: PortableNetwork, x: F32) -> F32:
    """Frames [T, R, features] one after another, from the initial state."""
    return step_frames(network, x, network.state.initial(x.shape[1]))[0]


def test_overlapping_windows_are_those_of_the_whole_signal(rng: np.random.Generator) -> None:
    model = listens()
    x = rng.standard_normal((30, 6, HOP)).astype(np.float32)
    y = stepped(PortableNetwork(model), x)
    for row in (0, 5):
        np.testing.assert_allclose(y[:, row], whole_signal(model, x[:, row]), atol=2e-6)


@pytest.mark.parametrize("description", [LISTENS, learned()], ids=["gru", "learned lstm"])
def test_bits_are_those_of_the_definition_and_values_those_of_torch_and_of_float64(
    description: dict[str, Any], rng: np.random.Generator
) -> None:
    network = PortableNetwork(listens(description))
    x, rows = rng.standard_normal((9, 40, network.description.features)).astype(np.float32), network.state.initial(40)
    y, after = check_bits(network, x, rows)
    whole, reference = network.sequence(x, rows), network.reference(np.float64)
    assert whole is not None
    assert reference is not None
    assert reference.independent
    wide = {name: leaf.astype(np.float64) for name, leaf in network.state.unpack(rows).items()}
    truth, final = reference.run(x.astype(np.float64), wide, np.full(9, 40))
    assert truth.dtype == np.float64
    for outputs, states in ((y, after), whole):
        np.testing.assert_allclose(outputs, truth, rtol=1e-4, atol=2e-5)
        for leaf, values in network.state.unpack(states).items():
            np.testing.assert_allclose(values, final[leaf], rtol=1e-4, atol=2e-5)


def test_the_reference_knows_rows_of_different_lengths(rng: np.random.Generator) -> None:
    model = listens()
    reference = PortableNetwork(model).reference(np.float64)
    assert reference is not None
    x = rng.standard_normal((12, 2, HOP)).astype(np.float32)
    state = {name: leaf.copy() for name, leaf in model.state.unpack(model.state.initial(2)).items()}
    y, after = reference.run(x.astype(np.float64), state, np.array([2] * 7 + [1] * 5))
    np.testing.assert_allclose(y[:, 0], whole_signal(model, x[:, 0]), atol=2e-6)
    np.testing.assert_allclose(y[:7, 1], whole_signal(model, x[:7, 1]), atol=2e-6)
    np.testing.assert_array_equal(after["context"], [x[:, 0].ravel()[-CONTEXT:], x[:7, 1].ravel()[-CONTEXT:]])


def test_it_may_hold_a_step_module(tmp_path: Path, rng: np.random.Generator) -> None:
    inside = exported("layer_norm_gru")
    fields = {"kind": "pipeline", "features": 1, "context": FEATURES - 1, "network": inside.description.as_json()}
    write_model(tmp_path / "p", Model("p", parse_description(fields), inside.weights))
    written = yaml.safe_load((tmp_path / "p" / "model.yaml").read_text())["network"]
    assert (written["form"], written["graph"]) == ("normal.json", "graph.json")
    found = load_model(tmp_path / "p")
    x = rng.standard_normal((6, 4, 1)).astype(np.float32)
    signals = np.concatenate([np.zeros((FEATURES - 1, 4), np.float32), x[:, :, 0]])
    frames = np.stack([signals[at : at + FEATURES].T for at in range(6)])
    np.testing.assert_array_equal(stepped(PortableNetwork(found), x), stepped(PortableNetwork(inside), frames))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context": 9}, "9"),
        ({"context": 0}, "context"),
        ({"network": {"features": 13}}, "network: gru"),
        ({"network": learned()}, "network"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_description(learned(**changes))
