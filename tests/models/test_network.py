from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from instep.models.certify import certify
from instep.models.description import Activation, DenseLayer, GruLayers, NetworkDescription
from instep.models.folder import Model, make_model
from instep.models.network import Network

CPU = torch.device("cpu")


def dense(size: int, activation: Activation = "none", bias: bool = True) -> DenseLayer:
    return DenseLayer(size=size, activation=activation, bias=bias)


PLAIN = {
    "seed": NetworkDescription(features=3, gru=GruLayers(hidden_size=4)),
    "40to128": NetworkDescription(features=40, gru=GruLayers(hidden_size=128)),
    "2x256": NetworkDescription(features=256, gru=GruLayers(hidden_size=256, num_layers=2)),
    "no bias": NetworkDescription(features=5, gru=GruLayers(hidden_size=7, num_layers=3, bias=False)),
}
DENSE = {
    "2x400 between": NetworkDescription(
        features=30,
        before=(dense(100, "relu"),),
        gru=GruLayers(hidden_size=400, num_layers=2),
        after=(dense(50, "tanh"), dense(10)),
    ),
    "12to64 head": NetworkDescription(features=12, gru=GruLayers(hidden_size=64), after=(dense(9),)),
    "odd": NetworkDescription(
        features=5,
        before=(dense(3, "sigmoid", bias=False), dense(17, "tanh")),
        gru=GruLayers(hidden_size=7, num_layers=2, bias=False),
        after=(dense(1, "sigmoid"), dense(2, "relu", bias=False)),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network_of(description: NetworkDescription) -> Network:
    return Network(make_model(description, "random", name="n", seed=7), CPU)


def frames_and_state(network: Network, steps: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random frames and states of the network's own sizes, in arrays padded with zeros to its widths."""
    generator = torch.Generator().manual_seed(steps * 1000 + rows)
    x = torch.zeros(steps, rows, network.input_width)
    x[:, :, : network.features] = torch.randn(steps, rows, network.features, generator=generator)
    h = torch.zeros(network.state_layers, rows, network.state_width)
    h[:, :, : network.state_size] = (
        torch.rand(network.state_layers, rows, network.state_size, generator=generator) - 0.5
    )
    return x, h


def stepped(network: Network, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for frame in x:
        y, h = network.step(frame, h)
        outputs.append(y)
    return torch.stack(outputs), h


def torch_gru(model: Model) -> nn.GRU:
    layers = model.description.gru
    gru = nn.GRU(model.description.gru_input_size, layers.hidden_size, layers.num_layers, bias=layers.bias)
    gru.load_state_dict({name[4:]: tensor for name, tensor in model.weights.items() if name.startswith("gru.")})
    return gru.eval()


def torch_dense(model: Model, place: str) -> nn.Sequential:
    activations = {"none": nn.Identity(), "relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid()}
    modules: list[nn.Module] = []
    for index, layer in enumerate(getattr(model.description, place)):
        weight = model.weights[f"{place}.{index}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias)
        linear.load_state_dict(
            {
                name.split(".")[2]: tensor
                for name, tensor in model.weights.items()
                if name.startswith(f"{place}.{index}.")
            }
        )
        modules += [linear, activations[layer.activation]]
    return nn.Sequential(*modules)


@torch.no_grad()
@pytest.mark.parametrize("rows", [4, 16, 64])
@pytest.mark.parametrize("name", list(PLAIN))
def test_without_dense_layers_the_bits_are_those_of_the_users_own_gru(name: str, rows: int) -> None:
    network = network_of(PLAIN[name])
    x, h = frames_and_state(network, 20, rows)
    given = h.clone()
    expected_y, expected_h = torch_gru(network.model)(x, h)
    answers = [network.sequence(x, h)]
    if rows in certify(network, (4, 16, 64)).buckets:  # some processors have other kernels for 4 rows
        for fused in {False, network.uses_fused}:
            network.uses_fused = fused
            answers.append(stepped(network, x, h))
    for y, final in answers:
        assert torch.equal(y, expected_y)
        assert torch.equal(final, expected_h)
    assert torch.equal(h, given)
    assert (network.input_width, network.state_width, network.output_width) == (
        network.features,
        network.state_size,
        network.outputs,
    )
    assert network.smallest_bucket == 4


@torch.no_grad()
@pytest.mark.parametrize("name", list(DENSE))
def test_with_dense_layers_values_are_those_of_torch_modules(name: str) -> None:
    network = network_of(DENSE[name])
    x, h = frames_and_state(network, 20, 32)
    before, after = torch_dense(network.model, "before"), torch_dense(network.model, "after")
    size = network.state_size
    expected, expected_h = torch_gru(network.model)(before(x[:, :, : network.features]), h[:, :, :size].contiguous())
    y, final = network.sequence(x, h)
    torch.testing.assert_close(y[:, :, : network.outputs], after(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(final[:, :, :size], expected_h, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rows", [32, 64, 256])
@pytest.mark.parametrize("name", list(DENSE))
def test_with_dense_layers_stepping_and_the_whole_sequence_have_equal_bits(name: str, rows: int) -> None:
    network = network_of(DENSE[name])
    x, h = frames_and_state(network, 12, rows)
    y, final = network.sequence(x, h)
    stepped_y, stepped_final = stepped(network, x, h)
    assert torch.equal(y, stepped_y)
    assert torch.equal(final, stepped_final)
    y32, final32 = network.sequence(x[:, -32:].contiguous(), h[:, -32:].contiguous())
    assert torch.equal(y[:, -32:], y32)
    assert torch.equal(final[:, -32:], final32)


@torch.no_grad()
@pytest.mark.parametrize("name", list(DENSE))
def test_padded_units_of_the_state_stay_zero_and_widths_are_multiples_of_16(name: str) -> None:
    network = network_of(DENSE[name])
    x, h = frames_and_state(network, 30, 32)
    _, final = stepped(network, 100 * x, h)
    assert final.shape == (network.state_layers, 32, network.state_width)
    assert not final[:, :, network.state_size :].any()
    assert final[:, :, : network.state_size].all()
    for width, size in (
        (network.input_width, network.features),
        (network.state_width, network.state_size),
        (network.output_width, network.outputs),
    ):
        assert width % 16 == 0
        assert 0 <= width - size < 16
    assert network.smallest_bucket == 32


@torch.no_grad()
@pytest.mark.parametrize("name", list(DENSE))
def test_the_padding_is_zeros_around_the_weights(name: str) -> None:
    """The same bits as modules whose padded weights were written out one unit at a time."""
    network = network_of(DENSE[name])
    weights = {key: tensor.numpy() for key, tensor in network.model.weights.items()}
    description = network.description

    def up(size: int) -> int:
        return (size + 15) // 16 * 16

    def padded_dense(place: str, sizes: list[int]) -> list[nn.Linear]:
        linears = []
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            linear = nn.Linear(up(inputs), up(outputs))
            matrix, bias = np.zeros((up(outputs), up(inputs)), "f4"), np.zeros(up(outputs), "f4")
            for unit in range(outputs):
                matrix[unit, :inputs] = weights[f"{place}.{index}.weight"][unit]
                bias[unit] = weights[f"{place}.{index}.bias"][unit] if f"{place}.{index}.bias" in weights else 0
            linear.load_state_dict({"weight": torch.from_numpy(matrix), "bias": torch.from_numpy(bias)})
            linears.append(linear)
        return linears

    before_sizes = [description.features, *(layer.size for layer in description.before)]
    after_sizes = [description.state_size, *(layer.size for layer in description.after)]
    hidden, inputs = description.state_size, description.gru_input_size
    gru = nn.GRU(up(inputs), up(hidden), description.state_layers, bias=description.gru.bias)
    for key, parameter in gru.named_parameters():
        array, source = parameter.numpy(), weights[f"gru.{key}"]
        array[:] = 0
        for gate in range(3):
            for unit in range(hidden):
                if key.startswith("bias"):
                    array[gate * up(hidden) + unit] = source[gate * hidden + unit]
                else:
                    array[gate * up(hidden) + unit, : source.shape[1]] = source[gate * hidden + unit]
    act = {"none": torch.clone, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}

    x, h = frames_and_state(network, 1, 64)
    rows = x[0]
    for linear, layer in zip(padded_dense("before", before_sizes), description.before, strict=True):
        rows = act[layer.activation](linear(rows))
    out, expected_h = gru(rows.unsqueeze(0), h)
    rows = out[0]
    for linear, layer in zip(padded_dense("after", after_sizes), description.after, strict=True):
        rows = act[layer.activation](linear(rows))
    y, final = network.step(x[0], h)
    assert torch.equal(y, rows)
    assert torch.equal(final, expected_h)


def test_outputs_and_states_are_new_contiguous_and_without_a_graph() -> None:
    for description in (PLAIN["seed"], DENSE["odd"]):
        network = network_of(description)
        x, h = frames_and_state(network, 1, network.smallest_bucket)
        y, final = network.step(x[0], h)
        assert y.is_contiguous()
        assert final.is_contiguous()
        assert final.shape == h.shape
        assert not y.requires_grad
        assert not final.requires_grad
        assert y.data_ptr() not in (x.data_ptr(), h.data_ptr(), final.data_ptr())


def test_the_models_weights_are_copied() -> None:
    model = make_model(PLAIN["seed"], "random", name="n")
    network = Network(model, CPU)
    x, h = frames_and_state(network, 1, 4)
    y, _ = network.step(x[0], h)
    for tensor in model.weights.values():
        tensor.zero_()
    again, _ = network.step(x[0], h)
    assert torch.equal(again, y)


@torch.no_grad()
@pytest.mark.parametrize("name", [*PLAIN, *DENSE])
def test_the_fused_step_is_the_step_of_torch(name: str) -> None:
    network = network_of({**PLAIN, **DENSE}[name])
    x, h = frames_and_state(network, 12, 32)
    expected_y, expected_h = stepped(network, x, h)
    network.uses_fused = True
    y, final = stepped(network, x, h)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, expected_h, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_batches_of_all_sizes_share_the_memory_of_the_fused_step() -> None:
    network = network_of(PLAIN["2x256"])
    expected = {rows: stepped(network, *frames_and_state(network, 3, rows)) for rows in (64, 16, 128)}
    network.uses_fused = True
    for rows in (64, 16, 128, 16, 64):
        y, final = stepped(network, *frames_and_state(network, 3, rows))
        torch.testing.assert_close(y, expected[rows][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(final, expected[rows][1], rtol=1e-5, atol=1e-6)
