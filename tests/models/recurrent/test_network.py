from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from instep.core.typing import F32, U8
from instep.models.certify import certify
from instep.models.folder import make_model
from instep.models.recurrent.cell import BY_HAND, Kernel
from instep.models.recurrent.description import DenseLayer, RecurrentDescription
from instep.models.recurrent.network import RecurrentNetwork
from instep.models.registry import parse_description
from instep.models.stepping import load_state, put, step_rows
from tests.support.torch_network import ACTIVATIONS, KINDS, TorchNetwork, random_rows

CPU = torch.device("cpu")


def described(kind: str, features: int, recurrent: dict[str, Any], **around: list[Any]) -> RecurrentDescription:
    """A description; layers of `around` are `(size, activation)`, with `bias` third, or keys of a layer norm."""
    places = {
        place: [
            {"layer_norm": True, **layer}
            if isinstance(layer, dict)
            else dict(zip(("size", "activation", "bias"), layer, strict=False))
            for layer in layers
        ]
        for place, layers in around.items()
    }
    found = parse_description({"kind": kind, "features": features, kind: recurrent, **places})
    assert isinstance(found, RecurrentDescription)
    return found


PLAIN = {
    "seed": described("gru", 3, {"hidden_size": 4}),
    "40to128": described("gru", 40, {"hidden_size": 128}),
    "2x256": described("gru", 256, {"hidden_size": 256, "num_layers": 2}),
    "no bias": described("gru", 5, {"hidden_size": 7, "num_layers": 3, "bias": False}),
    "lstm 40to128": described("lstm", 40, {"hidden_size": 128}),
    "lstm 3x64": described("lstm", 7, {"hidden_size": 64, "num_layers": 3}),
    "lstm no bias": described("lstm", 5, {"hidden_size": 7, "num_layers": 2, "bias": False}),
    "rnn 40to128": described("rnn", 40, {"hidden_size": 128}),
    "rnn no bias": described("rnn", 5, {"hidden_size": 7, "num_layers": 3, "bias": False}),
    "rnn relu": described("rnn", 12, {"hidden_size": 33, "num_layers": 2, "nonlinearity": "relu"}),
}
DENSE = {
    "2x400 between": described(
        "gru",
        30,
        {"hidden_size": 400, "num_layers": 2},
        before=[(100, "relu")],
        after=[(50, "tanh"), (10, "none")],
    ),
    "12to64 head": described("gru", 12, {"hidden_size": 64}, after=[(9, "none")]),
    "odd": described(
        "gru",
        5,
        {"hidden_size": 7, "num_layers": 2, "bias": False},
        before=[(3, "sigmoid", False), (17, "tanh")],
        after=[(1, "sigmoid"), (2, "relu", False)],
    ),
    "smooth": described(
        "gru",
        20,
        {"hidden_size": 48},
        before=[(33, "gelu"), (40, "silu"), (7, "softmax")],
        after=[(50, "elu"), (30, "leaky_relu"), (19, "softplus"), (9, "softmax", False)],
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
    "lstm head": described("lstm", 12, {"hidden_size": 64}, after=[(9, "none")]),
    "rnn norms": described(
        "rnn",
        9,
        {"hidden_size": 41, "num_layers": 2, "bias": False, "nonlinearity": "relu"},
        before=[(17, "none"), {"activation": "tanh"}],
        after=[{"activation": "silu"}],
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network_of(description: RecurrentDescription) -> RecurrentNetwork:
    return RecurrentNetwork(make_model(description, "random", name="n", seed=7), CPU)


def frames_and_states(network: RecurrentNetwork, steps: int, rows: int) -> tuple[F32, U8]:
    """Random frames [T, R, features] and rows of states."""
    random = np.random.default_rng(steps * 1000 + rows)
    x = random.standard_normal((steps, rows, network.description.features)).astype(np.float32)
    return x, random_rows(network.state, rows, random)


def stepped(network: RecurrentNetwork, x: F32, rows: U8) -> tuple[F32, U8]:
    """As `RecurrentModel.sequence`, one frame after another."""
    step, outputs = network.bind(x.shape[1]), []
    for frame in x:
        y, rows = step_rows(step, network.state, frame, rows, network.description.outputs)
        outputs.append(y)
    return np.stack(outputs), rows


def same_bits(one: F32 | U8, other: F32 | U8) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def same_answers(one: tuple[F32, U8], other: tuple[F32, U8]) -> bool:
    return same_bits(one[0], other[0]) and same_bits(one[1], other[1])


def assert_close(network: RecurrentNetwork, one: tuple[F32, U8], other: tuple[F32, U8], rtol: float = 1e-4) -> None:
    np.testing.assert_allclose(one[0], other[0], rtol=rtol, atol=2e-6)
    for name, leaf in network.state.unpack(one[1]).items():
        np.testing.assert_allclose(leaf, network.state.unpack(other[1])[name], rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("name", list(PLAIN))
def test_without_frame_layers_the_bits_are_those_of_the_users_own_module(name: str) -> None:
    network = network_of(PLAIN[name])
    found = certify(network, (4, 16, 64))
    chosen: Kernel = network.kernel
    kernels: set[Kernel] = {"torch", chosen}
    for network.kernel, rows in product(kernels, (4, 16, 64)):
        x, states = frames_and_states(network, 20, rows)
        given = states.copy()
        expected = TorchNetwork(network.model, network.kernel).run(x, states)
        assert same_answers(network.sequence(x, states), expected)
        one_by_one = stepped(network, x, states)
        assert_close(network, one_by_one, expected)
        # A kernel that is not chosen was not certified; that of torch is, where the one by hand has its bits.
        if found.whole_sequence and rows in found.buckets and (network.kernel == chosen or expected_alike(network)):
            assert same_answers(one_by_one, expected)
        assert same_bits(states, given)
        step = network.bind(rows)
        assert (step.x.shape[1], step.leaves["h"].shape[2]) == (x.shape[2], network.description.recurrent.hidden_size)
    assert network.row_multiple == 4


def expected_alike(network: RecurrentNetwork) -> bool:
    """Whether torch has one way to compute these layers, so that steps by hand and torch's own have the same bits."""
    return network.description.kind != "lstm"


@pytest.mark.parametrize("name", [*PLAIN, *DENSE])
def test_values_are_those_of_torch_modules(name: str) -> None:
    network = network_of({**PLAIN, **DENSE}[name])
    x, states = frames_and_states(network, 20, 32)
    assert_close(network, network.sequence(x, states), TorchNetwork(network.model).run(x, states))


@pytest.mark.parametrize("name", list(DENSE))
def test_with_frame_layers_stepping_and_the_whole_sequence_have_the_bits_that_are_certified(name: str) -> None:
    network = network_of(DENSE[name])
    found = certify(network, (32, 64, 256))
    few = found.buckets[0]
    for rows in (32, 64, 256):
        x, states = frames_and_states(network, 12, rows)
        y, final = network.sequence(x, states)
        for other in (stepped(network, x, states), network.sequence(np.ascontiguousarray(x[:, -few:]), states[-few:])):
            count = other[0].shape[1]
            expected = np.ascontiguousarray(y[:, -count:]), final[-count:]
            assert_close(network, other, expected)
            if found.whole_sequence and rows in found.buckets:
                assert same_answers(other, expected)


@pytest.mark.parametrize("name", list(DENSE))
def test_padded_units_of_the_state_stay_zero_and_widths_are_multiples_of_32(name: str) -> None:
    network = network_of(DENSE[name])
    for network.kernel in ("torch", *BY_HAND):
        step = network.bind(32)
        x, _ = frames_and_states(network, 30, 32)
        size = network.description.recurrent.hidden_size
        for frame in x:
            put(step.x[:, : x.shape[2]], 100 * frame)
            step.run()
        for leaf in step.leaves.values():
            assert not leaf[:, :, size:].any()
            assert leaf[:, :, :size].any()
        widths = (step.x.shape[1], step.leaves["h"].shape[2], step.y.shape[1])
        for width, values in zip(widths, (x.shape[2], size, network.description.outputs), strict=True):
            assert width % 16 == 0
            assert 0 <= width - values < 32
    assert network.row_multiple == 32


@torch.no_grad()
@pytest.mark.parametrize("name", list(DENSE))
def test_the_padding_is_zeros_around_the_weights(name: str) -> None:
    """The same bits as modules whose padded weights were written out one unit at a time."""
    network = network_of(DENSE[name])
    weights = {key: tensor.numpy() for key, tensor in network.model.weights.items()}
    description, truth = network.description, TorchNetwork(network.model)
    size, inputs, kind = description.recurrent.hidden_size, description.recurrent_inputs, description.kind

    def up(count: int) -> int:
        return (count + 31) // 32 * 32

    def through(place: str, values: torch.Tensor, width: int) -> tuple[torch.Tensor, int]:
        """Rows of padded values through the layers in one place."""
        for index, layer in enumerate(getattr(description, place)):
            padding = -np.inf if layer.activation == "softmax" else 0
            if isinstance(layer, DenseLayer):
                matrix = np.zeros((up(layer.size), up(width)), "f4")
                bias = np.full(up(layer.size), padding, "f4")
                for unit in range(layer.size):
                    matrix[unit, :width] = weights[f"{place}.{index}.weight"][unit]
                    bias[unit] = weights[f"{place}.{index}.bias"][unit] if layer.bias else 0
                width = layer.size
                values = nn.functional.linear(values, torch.from_numpy(matrix), torch.from_numpy(bias))
            else:
                norm = getattr(truth, place)[index](values[:, :width].clone())
                values = torch.full_like(values, padding)
                values[:, :width] = norm
            values = ACTIVATIONS[layer.activation](values)
        return values, width

    module = truth.get_submodule(kind)
    assert isinstance(module, nn.RNNBase)
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    padded = KINDS[kind](up(inputs), up(size), module.num_layers, bias=module.bias, **options)
    for key, parameter in padded.named_parameters():
        array, source = parameter.numpy(), weights[f"{kind}.{key}"]
        array[:] = 0
        for gate in range(len(source) // size):
            for unit in range(size):
                if key.startswith("bias"):
                    array[gate * up(size) + unit] = source[gate * size + unit]
                else:
                    array[gate * up(size) + unit, : source.shape[1]] = source[gate * size + unit]
    x, states = frames_and_states(network, 1, 64)
    frames = torch.zeros(64, up(x.shape[2]))
    frames[:, : x.shape[2]] = torch.from_numpy(x[0])
    leaves = [torch.zeros(module.num_layers, 64, up(size)) for _ in network.state.leaves]
    for leaf, given in zip(leaves, network.state.unpack(states).values(), strict=True):
        leaf[:, :, :size] = torch.from_numpy(given.copy()).transpose(0, 1)
    values, _ = through("before", frames, description.features)
    out, after = padded(values.unsqueeze(0), tuple(leaves) if len(leaves) > 1 else leaves[0])
    values, width = through("after", out[0], size)
    y, final = stepped(network, x, states)
    assert same_bits(y[0], values[:, :width].contiguous().numpy())
    expected = dict(zip(network.state.unpack(final), after if isinstance(after, tuple) else (after,), strict=True))
    for leaf_name, found in network.state.unpack(final).items():
        assert same_bits(found.copy(), expected[leaf_name].transpose(0, 1)[:, :, :size].contiguous().numpy())


def test_no_graph_is_built_outside_inference_mode_either() -> None:
    for description in (PLAIN["seed"], DENSE["odd"], DENSE["lstm norms"]):
        step = network_of(description).bind(32)
        step.run()
        assert not step.y.requires_grad
        assert not step.leaves["h"].requires_grad


def test_a_step_can_be_bound_inside_inference_mode_and_run_outside() -> None:
    for description in (PLAIN["seed"], DENSE["odd"], DENSE["lstm norms"]):
        with torch.inference_mode():
            step = network_of(description).bind(32)
        step.run()


def test_the_models_weights_are_copied() -> None:
    for description in (PLAIN["seed"], DENSE["lstm norms"]):
        model = make_model(description, "random", name="n")
        network = RecurrentNetwork(model, CPU)
        x, states = frames_and_states(network, 1, 32)
        y, _ = stepped(network, x, states)
        for tensor in model.weights.values():
            tensor.zero_()
        again, _ = stepped(network, x, states)
        assert same_bits(again, y)


@pytest.mark.parametrize("name", [*PLAIN, *DENSE])
def test_the_step_by_hand_is_the_step_of_torch(name: str) -> None:
    network = network_of({**PLAIN, **DENSE}[name])
    x, states = frames_and_states(network, 12, 32)
    expected = stepped(network, x, states)
    for network.kernel in BY_HAND:
        assert_close(network, stepped(network, x, states), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["2x256", "lstm 3x64", "rnn relu"])
def test_steps_of_one_network_do_not_disturb_each_other(name: str) -> None:
    network = network_of(PLAIN[name])
    network.kernel = "fused"
    expected = {rows: stepped(network, *frames_and_states(network, 3, rows)) for rows in (64, 16, 128)}
    steps = {rows: network.bind(rows) for rows in expected}
    inputs = {rows: frames_and_states(network, 3, rows) for rows in expected}
    for rows, step in steps.items():
        load_state(step, network.state, inputs[rows][1])
    for timestep in range(3):
        for rows, step in steps.items():
            put(step.x, inputs[rows][0][timestep])
            step.run()
        for rows, step in steps.items():
            assert same_bits(step.y.numpy(), expected[rows][0][timestep])
    for rows, step in steps.items():
        leaves = {name: leaf.transpose(0, 1).numpy() for name, leaf in step.leaves.items()}
        assert same_bits(network.state.pack(leaves), expected[rows][1])
