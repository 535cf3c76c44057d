"""Recurrent networks as they are served: values are those of torch's modules, and bits those of the definition."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.base import step_frames
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.network import PortableNetwork
from instep.models.recurrent.description import ACTIVATIONS
from instep.models.registry import parse_description
from tests.support.torch_network import TorchNetwork, check_bits, random_rows


def described(kind: str, features: int, recurrent: dict[str, Any], **around: Any) -> dict[str, Any]:
    """A description; layers before and after are `(size, activation)`, with `bias` third, or keys of a layer norm."""
    for place in {"before", "after"} & around.keys():
        around[place] = [
            {"layer_norm": True, **layer}
            if isinstance(layer, dict)
            else dict(zip(("size", "activation", "bias"), layer, strict=False))
            for layer in around[place]
        ]
    return {"kind": kind, "features": features, kind: recurrent, **around}


NETWORKS: Final = {
    "seed": described("gru", 3, {"hidden_size": 4}),
    "2x256": described("gru", 256, {"hidden_size": 256, "num_layers": 2}),
    "no bias": described("gru", 5, {"hidden_size": 7, "num_layers": 3, "bias": False}),
    "lstm 3x64": described("lstm", 7, {"hidden_size": 64, "num_layers": 3}),
    "lstm no bias": described("lstm", 5, {"hidden_size": 7, "num_layers": 2, "bias": False}),
    "rnn no bias": described("rnn", 5, {"hidden_size": 7, "num_layers": 3, "bias": False}),
    "rnn relu": described("rnn", 12, {"hidden_size": 33, "num_layers": 2, "nonlinearity": "relu"}),
    "between": described(
        "gru", 30, {"hidden_size": 100, "num_layers": 2}, before=[(65, "relu")], after=[(50, "tanh"), (10, "none")]
    ),
    "odd": described(
        "gru",
        5,
        {"hidden_size": 7, "num_layers": 2, "bias": False},
        before=[(3, "sigmoid", False), (17, "tanh")],
        after=[(1, "sigmoid"), (2, "relu", False)],
    ),
    "gru norms": described(
        "gru",
        5,
        {"hidden_size": 37},
        before=[{}, (33, "none"), {"activation": "sigmoid", "eps": 1e-3}],
        after=[{"activation": "softmax", "bias": False}, {"elementwise_affine": False}, (3, "none")],
    ),
    "lstm norms": described(
        "lstm",
        30,
        {"hidden_size": 100, "num_layers": 2},
        before=[{"activation": "gelu"}, (64, "relu")],
        after=[{}, (9, "softmax")],
    ),
    "rnn norms": described(
        "rnn",
        9,
        {"hidden_size": 41, "num_layers": 2, "bias": False, "nonlinearity": "relu"},
        before=[(17, "none"), {"activation": "tanh"}],
        after=[{"activation": "silu"}],
    ),
    "learned gru": described("gru", 6, {"hidden_size": 20, "num_layers": 2}, initial_state="learned"),
    "learned lstm": described("lstm", 6, {"hidden_size": 20}, after=[(3, "none")], initial_state="learned"),
    "activations": described(
        "gru",
        20,
        {"hidden_size": 48},
        before=[(11, name) for name in ACTIVATIONS],
        after=[(13, name, False) for name in ACTIVATIONS],
    ),
}
ROWS: Final = 50
"""Some are computed side by side, and some one by one, for any number of lanes that processors have."""


@cache
def network_of(name: str) -> PortableNetwork:
    torch.set_num_threads(1)
    return PortableNetwork(make_model(parse_description(NETWORKS[name]), "random", name="n", seed=7))


def frames_and_states(network: PortableNetwork, steps: int = 20, rows: int = ROWS) -> tuple[F32, U8]:
    """Random frames [T, R, features] and rows of states."""
    random = np.random.default_rng(steps * 1000 + rows)
    x = random.standard_normal((steps, rows, network.description.features)).astype(np.float32)
    return x, random_rows(network.state, rows, random)


def assert_close(network: PortableNetwork, one: tuple[F32, U8], other: tuple[F32, U8]) -> None:
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=2e-6)
    for name, leaf in network.state.unpack(one[1]).items():
        np.testing.assert_allclose(leaf, network.state.unpack(other[1])[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_those_of_torchs_modules(name: str) -> None:
    network = network_of(name)
    x, states = frames_and_states(network)
    given = states.copy()
    expected, whole = TorchNetwork(network.model).run(x, states), network.sequence(x, states)
    assert whole is not None
    assert_close(network, whole, expected)
    assert_close(network, step_frames(network, x, states), expected)
    assert states.tobytes() == given.tobytes(), "what it is given stays"


@pytest.mark.parametrize("name", NETWORKS)
def test_bits_are_those_of_the_definition_in_every_batch(name: str) -> None:
    network = network_of(name)
    check_bits(network, *frames_and_states(network, steps=6))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_definition_and_the_references_agree(name: str) -> None:
    network = network_of(name)
    x, states = frames_and_states(network, rows=9)
    truth = TorchNetwork(network.model).run(x, states, torch.float64)
    leaves = network.state.unpack(states)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-5)):
        reference = network.reference(dtype)
        assert reference is not None
        assert reference.independent
        y, after = reference.run(
            x.astype(dtype), {name: leaf.astype(dtype) for name, leaf in leaves.items()}, np.full(20, 9)
        )
        assert y.dtype == dtype
        np.testing.assert_allclose(y, truth[0], rtol=tolerance, atol=max(tolerance / 10, 3e-9))
        for name, leaf in network.state.unpack(truth[1]).items():  # of float32
            np.testing.assert_allclose(after[name], leaf, rtol=max(tolerance, 1e-7), atol=1e-6)
    y, _ = network.definition().run(x, leaves, np.full(20, 9))
    np.testing.assert_allclose(y, truth[0], rtol=1e-5, atol=2e-6)


# What is stepped for hours stays as near to the truth as torch's own module does.

STEPS, STREAMS = 1000, 16
KINDS: Final = {
    "gru": described("gru", 40, {"hidden_size": 128}),
    "lstm": described("lstm", 40, {"hidden_size": 128}),
    "rnn": described("rnn", 40, {"hidden_size": 128}),
    "rnn relu": described("rnn", 40, {"hidden_size": 128, "nonlinearity": "relu"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_after_1000_steps_it_is_at_most_3_times_as_far_from_float64_as_torch(name: str) -> None:
    torch.set_num_threads(1)
    model: Model = make_model(parse_description(KINDS[name]), "random", name="n", seed=3)
    network = PortableNetwork(model)
    x, states = frames_and_states(network, STEPS, STREAMS)
    truth, _ = TorchNetwork(model).run(x, states, torch.float64)
    torchs, _ = TorchNetwork(model).run(x, states)
    y, _ = step_frames(network, x, states)
    ours, theirs = (np.abs(each - truth) for each in (y, torchs))
    assert 0 < theirs.max() < 1e-4
    assert ours.max() <= 3 * theirs.max()
    assert ours.mean() <= 3 * theirs.mean()
