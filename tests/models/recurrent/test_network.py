from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from instep.core.typing import F32
from instep.models.certify import certify
from instep.models.folder import make_model
from instep.models.recurrent.description import Activation, DenseLayer, GruDescription, GruLayers
from instep.models.recurrent.network import GruNetwork
from instep.models.recurrent.step import BY_HAND, GruKernel
from instep.models.stepping import put
from tests.support.models import in_one_call, stepped

CPU = torch.device("cpu")


def dense(size: int, activation: Activation = "none", bias: bool = True) -> DenseLayer:
    return DenseLayer(size=size, activation=activation, bias=bias)


PLAIN = {
    "seed": GruDescription(features=3, gru=GruLayers(hidden_size=4)),
    "40to128": GruDescription(features=40, gru=GruLayers(hidden_size=128)),
    "2x256": GruDescription(features=256, gru=GruLayers(hidden_size=256, num_layers=2)),
    "no bias": GruDescription(features=5, gru=GruLayers(hidden_size=7, num_layers=3, bias=False)),
}
DENSE = {
    "2x400 between": GruDescription(
        features=30,
        before=(dense(100, "relu"),),
        gru=GruLayers(hidden_size=400, num_layers=2),
        after=(dense(50, "tanh"), dense(10)),
    ),
    "12to64 head": GruDescription(features=12, gru=GruLayers(hidden_size=64), after=(dense(9),)),
    "odd": GruDescription(
        features=5,
        before=(dense(3, "sigmoid", bias=False), dense(17, "tanh")),
        gru=GruLayers(hidden_size=7, num_layers=2, bias=False),
        after=(dense(1, "sigmoid"), dense(2, "relu", bias=False)),
    ),
    "smooth": GruDescription(
        features=20,
        before=(dense(33, "gelu"), dense(40, "silu"), dense(7, "softmax")),
        gru=GruLayers(hidden_size=48),
        after=(dense(50, "elu"), dense(30, "leaky_relu"), dense(19, "softplus"), dense(9, "softmax", bias=False)),
    ),
}
MODULES: dict[Activation, nn.Module] = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "leaky_relu": nn.LeakyReLU(),
    "softplus": nn.Softplus(),
    "softmax": nn.Softmax(dim=-1),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network_of(description: GruDescription) -> GruNetwork:
    return GruNetwork(make_model(description, "random", name="n", seed=7), CPU)


def frames_and_state(network: GruNetwork, steps: int, rows: int) -> tuple[F32, F32]:
    """Random frames [T, R, features] and states [layers, R, hidden]."""
    random = np.random.default_rng(steps * 1000 + rows)
    layers, hidden = network.state.leaves[0].shape
    x = random.standard_normal((steps, rows, network.description.features)).astype(np.float32)
    return x, random.uniform(-0.5, 0.5, (layers, rows, hidden)).astype(np.float32)


def tensors(*arrays: F32) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def torch_gru(network: GruNetwork) -> nn.GRU:
    layers = network.description.gru
    gru = nn.GRU(network.description.gru_input_size, layers.hidden_size, layers.num_layers, bias=layers.bias)
    gru.load_state_dict({name[4:]: tensor for name, tensor in network.model.weights.items() if name.startswith("gru.")})
    return gru.eval()


def torch_dense(network: GruNetwork, place: str) -> nn.Sequential:
    modules: list[nn.Module] = []
    for index, layer in enumerate(getattr(network.description, place)):
        weight = network.model.weights[f"{place}.{index}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias)
        linear.load_state_dict(
            {
                name.split(".")[2]: tensor
                for name, tensor in network.model.weights.items()
                if name.startswith(f"{place}.{index}.")
            }
        )
        modules += [linear, MODULES[layer.activation]]
    return nn.Sequential(*modules)


def same_bits(one: F32, other: F32) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


@torch.no_grad()
@pytest.mark.parametrize("rows", [4, 16, 64])
@pytest.mark.parametrize("name", list(PLAIN))
def test_without_dense_layers_the_bits_are_those_of_the_users_own_gru(name: str, rows: int) -> None:
    network = network_of(PLAIN[name])
    x, h = frames_and_state(network, 20, rows)
    given = h.copy()
    expected_y, expected_h = (tensor.numpy() for tensor in torch_gru(network)(*tensors(x, h)))
    found = certify(network, (4, 16, 64))
    answers = [in_one_call(network, x, h)]
    kernels: set[GruKernel] = {"torch", network.kernel}
    for network.kernel in kernels:
        y, final = stepped(network, x, h)
        np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-6)
        if found.whole_sequence and rows in found.buckets:
            answers.append((y, final))
    for y, final in answers:
        assert same_bits(y, expected_y)
        assert same_bits(final, expected_h)
    assert same_bits(h, given)
    assert (network.bind(rows).x.shape[1], network.bind(rows).h.shape[2]) == (x.shape[2], h.shape[2])
    assert network.row_multiple == 4


@torch.no_grad()
@pytest.mark.parametrize("name", list(DENSE))
def test_with_dense_layers_values_are_those_of_torch_modules(name: str) -> None:
    network = network_of(DENSE[name])
    x, h = frames_and_state(network, 20, 32)
    before, after = torch_dense(network, "before"), torch_dense(network, "after")
    frames, states = tensors(x, h)
    expected, expected_h = torch_gru(network)(before(frames), states)
    y, final = in_one_call(network, x, h)
    np.testing.assert_allclose(y, after(expected).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(final, expected_h.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [32, 64, 256])
@pytest.mark.parametrize("name", list(DENSE))
def test_with_dense_layers_stepping_and_the_whole_sequence_have_the_bits_that_are_certified(
    name: str, rows: int
) -> None:
    network = network_of(DENSE[name])
    found = certify(network, (32, 64, 256))
    x, h = frames_and_state(network, 12, rows)
    y, final = in_one_call(network, x, h)
    few = found.buckets[0]
    for other_y, other_final in (
        stepped(network, x, h),
        in_one_call(network, np.ascontiguousarray(x[:, -few:]), h[:, -few:]),
    ):
        count = other_y.shape[1]
        np.testing.assert_allclose(other_y, y[:, -count:], rtol=1e-4, atol=1e-6)
        if found.whole_sequence and rows in found.buckets:
            assert same_bits(other_y, np.ascontiguousarray(y[:, -count:]))
            assert same_bits(other_final, np.ascontiguousarray(final[:, -count:]))


@pytest.mark.parametrize("name", list(DENSE))
def test_padded_units_of_the_state_stay_zero_and_widths_are_multiples_of_32(name: str) -> None:
    network = network_of(DENSE[name])
    step = network.bind(32)
    x, h = frames_and_state(network, 30, 32)
    for frame in x:
        put(step.x[:, : x.shape[2]], 100 * frame)
        step.run()
    assert not step.h[:, :, h.shape[2] :].any()
    assert step.h[:, :, : h.shape[2]].all()
    widths = (step.x.shape[1], step.h.shape[2], step.y.shape[1])
    for width, size in zip(widths, (x.shape[2], h.shape[2], network.description.outputs), strict=True):
        assert width % 16 == 0
        assert 0 <= width - size < 32
    assert network.row_multiple == 32


@torch.no_grad()
@pytest.mark.parametrize("name", list(DENSE))
def test_the_padding_is_zeros_around_the_weights(name: str) -> None:
    """The same bits as modules whose padded weights were written out one unit at a time."""
    network = network_of(DENSE[name])
    weights = {key: tensor.numpy() for key, tensor in network.model.weights.items()}
    description = network.description

    def up(size: int) -> int:
        return (size + 31) // 32 * 32

    def padded_dense(place: str, sizes: list[int]) -> list[nn.Linear]:
        linears = []
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            is_softmax = getattr(description, place)[index].activation == "softmax"
            linear = nn.Linear(up(inputs), up(outputs))
            matrix, bias = (
                np.zeros((up(outputs), up(inputs)), "f4"),
                np.full(up(outputs), -np.inf if is_softmax else 0, "f4"),
            )
            for unit in range(outputs):
                matrix[unit, :inputs] = weights[f"{place}.{index}.weight"][unit]
                bias[unit] = weights[f"{place}.{index}.bias"][unit] if f"{place}.{index}.bias" in weights else 0
            linear.load_state_dict({"weight": torch.from_numpy(matrix), "bias": torch.from_numpy(bias)})
            linears.append(linear)
        return linears

    before_sizes = [description.features, *(layer.size for layer in description.before)]
    hidden, inputs = description.gru.hidden_size, description.gru_input_size
    after_sizes = [hidden, *(layer.size for layer in description.after)]
    gru = nn.GRU(up(inputs), up(hidden), description.gru.num_layers, bias=description.gru.bias)
    for key, parameter in gru.named_parameters():
        array, source = parameter.numpy(), weights[f"gru.{key}"]
        array[:] = 0
        for gate in range(3):
            for unit in range(hidden):
                if key.startswith("bias"):
                    array[gate * up(hidden) + unit] = source[gate * hidden + unit]
                else:
                    array[gate * up(hidden) + unit, : source.shape[1]] = source[gate * hidden + unit]
    x, h = frames_and_state(network, 1, 64)
    rows, states = torch.zeros(64, up(x.shape[2])), torch.zeros(h.shape[0], 64, up(hidden))
    rows[:, : x.shape[2]], states[:, :, :hidden] = tensors(x[0], h)
    for linear, layer in zip(padded_dense("before", before_sizes), description.before, strict=True):
        rows = MODULES[layer.activation](linear(rows))
    out, expected_h = gru(rows.unsqueeze(0), states)
    rows = out[0]
    for linear, layer in zip(padded_dense("after", after_sizes), description.after, strict=True):
        rows = MODULES[layer.activation](linear(rows))
    y, final = stepped(network, x, h)
    assert same_bits(y[0], rows[:, : description.outputs].contiguous().numpy())
    assert same_bits(final, expected_h[:, :, :hidden].contiguous().numpy())


def test_no_graph_is_built_outside_inference_mode_either() -> None:
    for description in (PLAIN["seed"], DENSE["odd"]):
        step = network_of(description).bind(32)
        step.run()
        assert not step.y.requires_grad
        assert not step.h.requires_grad


def test_a_step_can_be_bound_inside_inference_mode_and_run_outside() -> None:
    for description in (PLAIN["seed"], DENSE["odd"]):
        with torch.inference_mode():
            step = network_of(description).bind(32)
        step.run()


def test_the_models_weights_are_copied() -> None:
    model = make_model(PLAIN["seed"], "random", name="n")
    network = GruNetwork(model, CPU)
    x, h = frames_and_state(network, 1, 4)
    y, _ = stepped(network, x, h)
    for tensor in model.weights.values():
        tensor.zero_()
    again, _ = stepped(network, x, h)
    assert same_bits(again, y)


@pytest.mark.parametrize("name", [*PLAIN, *DENSE])
def test_the_step_by_hand_is_the_step_of_torch(name: str) -> None:
    network = network_of({**PLAIN, **DENSE}[name])
    x, h = frames_and_state(network, 12, 32)
    expected_y, expected_h = stepped(network, x, h)
    for network.kernel in BY_HAND:
        y, final = stepped(network, x, h)
        np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(final, expected_h, rtol=1e-5, atol=1e-6)


def test_steps_of_one_network_do_not_disturb_each_other() -> None:
    network = network_of(PLAIN["2x256"])
    network.kernel = "fused"
    expected = {rows: stepped(network, *frames_and_state(network, 3, rows)) for rows in (64, 16, 128)}
    steps = {rows: network.bind(rows) for rows in expected}
    inputs = {rows: frames_and_state(network, 3, rows) for rows in expected}
    for rows, step in steps.items():
        put(step.state["h"], inputs[rows][1].swapaxes(0, 1))
    for timestep in range(3):
        for rows, step in steps.items():
            put(step.x, inputs[rows][0][timestep])
            step.run()
        for rows, step in steps.items():
            assert same_bits(step.y.numpy(), expected[rows][0][timestep])
    for rows, step in steps.items():
        assert same_bits(step.h.numpy(), expected[rows][1])
