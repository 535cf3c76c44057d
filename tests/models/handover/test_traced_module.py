"""Whole modules are handed over: what is served is compared with what their own forward gives, by torch alone."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.handover.save import save_model
from instep.models.model import Model
from instep.models.recurrent.description import GruDescription
from instep.models.registry import build

Forward = Callable[..., Any]


class Net(nn.Module):
    """Layers as people name them; each test gives the forward that uses some of them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5))
        self.gru = nn.GRU(16, 10, num_layers=2, batch_first=True, dropout=0.2)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(10, 7)
        self.last = nn.Linear(7, 3, bias=False)
        self.layer_norm = nn.LayerNorm(10)
        self.rms_norm = nn.RMSNorm(10)
        self.leaky = nn.LeakyReLU(0.2)
        self.state = nn.Parameter(torch.ones(2, 1, 10))
        with torch.no_grad():
            for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                assert tensor is not None
                tensor.uniform_(-1, 1)
            assert self.norm.running_var is not None
            self.norm.running_var.uniform_(0.1, 3)
        self._forward = forward

    def forward(self, x: torch.Tensor, *others: Any) -> Any:
        return self._forward(self, x, *others)


def served(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Outputs [B, T, outputs] for frames [B, T, features]."""
    network = build(model, torch.device("cpu"))
    frames = np.ascontiguousarray(x.transpose(0, 1).numpy())
    whole = network.sequence(frames, network.state.initial(frames.shape[1]))
    assert whole is not None
    return torch.from_numpy(whole[0]).transpose(0, 1)


def plain(net: Any, x: torch.Tensor) -> Any:
    return net.last(torch.tanh(net.head(net.gru(net.encoder(x))[0])))


def with_bn(net: Any, x: torch.Tensor) -> Any:
    y = net.head(net.gru(net.encoder(x))[0]).transpose(1, 2)
    return functional.gelu(net.norm(y)).transpose(1, 2)


def with_bn_alone(net: Any, x: torch.Tensor) -> Any:
    y = torch.relu(net.head(net.gru(net.encoder(x))[0])).transpose(1, 2)
    return net.last(torch.tanh(net.norm(y)).transpose(1, 2))


def with_initial_zeros(net: Any, x: torch.Tensor) -> Any:
    h = torch.zeros(2, x.size(0), 10).to(x.device)
    y, h = net.gru(input=net.encoder(x), hx=h)
    return net.head(net.drop(y)), h


def flattened(net: Any, x: torch.Tensor) -> Any:
    y, _ = net.gru(net.encoder(x))
    return functional.softmax(net.head(y.contiguous().view(-1, 10)), dim=1)


def time_first(net: Any, x: torch.Tensor) -> Any:
    return net.head(net.gru(net.encoder(x.transpose(0, 1)))[0]).transpose(0, 1)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (plain, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 tanh → dense 3"),
        (with_bn, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 gelu"),
        (with_bn_alone, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 relu → dense 7 tanh → dense 3"),
        (with_initial_zeros, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"),
        (flattened, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 softmax"),
        (time_first, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"),
        (lambda net, x: net.gru(net.encoder(x)), "6 features → dense 16 relu → GRU 10 × 2 layers"),
        (
            lambda net, x: net.head(torch.relu(net.layer_norm(net.gru(net.encoder(x))[0]))),
            "6 features → dense 16 relu → GRU 10 × 2 layers → layer norm relu → dense 7",
        ),
        (
            lambda net, x: net.head(torch.relu(net.gru(net.encoder(x))[0])),
            "6 features → dense 16 relu → GRU 10 × 2 layers → dense 10 relu → dense 7",
        ),
        (
            lambda net, x: [net.head(net.gru(net.encoder(torch.tanh_(x)))[0]).relu_().sigmoid()],
            "6 features → dense 6 tanh → dense 16 relu → GRU 10 × 2 layers → dense 7 relu → dense 7 sigmoid",
        ),
    ],
)
def test_what_is_served_is_what_the_forward_gives(tmp_path: Path, forward: Forward, words: str) -> None:
    net = Net(forward)
    model = save_model(tmp_path / "m", net)
    assert model.description.in_words() == words
    assert net.training, "the module is as it was"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    x = torch.randn(5, 20, 6)
    with torch.no_grad():
        y = net.eval()(x.transpose(0, 1) if forward is time_first else x.clone())
    y = y if isinstance(y, torch.Tensor) else y[0]
    y = y.transpose(0, 1) if forward is time_first else y.reshape(5, 20, -1)
    torch.testing.assert_close(served(model, x), y, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head(net.gru(net.encoder(x))[0][:, -1]),
        lambda net, x: net.head(net.gru(net.encoder(x))[1][-1]),
    ],
)
def test_a_forward_may_answer_the_last_frame_only(tmp_path: Path, forward: Forward) -> None:
    net = Net(forward)
    model = save_model(tmp_path / "m", net)
    x = torch.randn(3, 8, 6)
    net.eval()
    with torch.no_grad():
        y = torch.stack([net(x[:, : length + 1]) for length in range(8)], dim=1)
    torch.testing.assert_close(served(model, x), y, rtol=1e-5, atol=2e-6)


def test_an_example_is_needed_where_the_forward_takes_more_than_frames(tmp_path: Path) -> None:
    net = Net(lambda net, x, h: net.head(net.gru(net.encoder(x), h)[0]))
    with pytest.raises(
        ModelError, match=r"Net.forward fails on random input \[2, 6, 6\] \(.*missing.* 'h'\); give it an e"
    ):
        save_model(tmp_path / "m", net)
    x, h = torch.randn(1, 4, 6), torch.zeros(2, 1, 10)
    model = save_model(tmp_path / "m", net, example=(x, h))
    with torch.no_grad():
        torch.testing.assert_close(served(model, x), net.eval()(x, h), rtol=1e-5, atol=2e-6)
    for example in (5, x.double(), [x]):
        with pytest.raises(ModelError, match="example must be a float32 tensor of frames, or a tuple that begins"):
            save_model(tmp_path / "m", net, example=example)


def test_a_forward_that_fails_is_answered_with_the_call_to_make(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.Sequential(nn.GRU(3, 4)), nn.Linear(4, 2))  # a GRU gives a tuple
    with pytest.raises(ModelError) as refused:
        save_model(tmp_path / "m", net)
    sentence, _, call = str(refused.value).partition(": Sequential has ")
    assert sentence.startswith("Sequential.forward fails on random input [2, 6, 5] (")
    assert call == (
        "`0` (Linear 5→3) and `1.0` (GRU 3→4) and `2` (Linear 4→2); name the activation after each layer in place of "
        '"none": '
        'save_model(path, net[1][0], before=[(net[0], "none")], after=[(net[2], "none")])'
    )
    model = eval(call.rpartition('"none": ')[2], {"save_model": save_model, "path": tmp_path / "m", "net": net})
    assert model.description.in_words() == "5 features → dense 3 → GRU 4 → dense 2"


class Recurrent(nn.Module):
    """An encoder with a layer norm, and recurrent layers that are not a GRU."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16, eps=1e-2), nn.GELU())
        self.recurrent = recurrent
        self.norm = nn.LayerNorm(10)

    def forward(self, x: torch.Tensor) -> Any:
        y, state = self.recurrent(self.encoder(x))
        return self.norm(y), state


@pytest.mark.parametrize(
    ("recurrent", "words"),
    [
        (nn.LSTM(16, 10, 2, batch_first=True, dropout=0.5), "LSTM 10 × 2 layers"),
        (nn.RNN(16, 10), "RNN 10"),
        (nn.RNN(16, 10, nonlinearity="relu", batch_first=True), "RNN 10 relu"),
    ],
)
def test_lstms_and_rnns_are_found_in_a_module(tmp_path: Path, recurrent: nn.RNNBase, words: str) -> None:
    torch.manual_seed(2)
    net = Recurrent(recurrent)
    model = save_model(tmp_path / "m", net)
    assert model.description.in_words() == f"6 features → dense 16 → layer norm gelu → {words} → layer norm"
    x = torch.randn(3, 20, 6)
    given = x if recurrent.batch_first else x.transpose(0, 1)
    with torch.no_grad():
        y, _ = net.eval()(given)
    torch.testing.assert_close(served(model, x), y if recurrent.batch_first else y.transpose(0, 1))


def step_by_step(net: Any, x: torch.Tensor) -> Any:
    rows, h = net.encoder(x), None
    for timestep in range(x.shape[1]):
        y, h = net.gru(rows[:, timestep : timestep + 1], h)
    return net.head(y)


def forgets_the_first(net: Any, x: torch.Tensor) -> Any:
    return net.head(net.gru(net.encoder(x))[0])[:, 0]


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (
            lambda net, x: plain(net, x) + x[..., :3],
            "Net.forward computes `add`, which cannot be served as a layer: write the network as a step and export it",
        ),
        (lambda net, x: plain(net, x).clamp(-1e9, 1e9), "Net.forward computes `clamp`, which cannot be served"),
        (lambda net, x: plain(net, torch.cat([x[..., :3], x[..., 3:]], -1)), "Net.forward computes `cat`"),
        (lambda net, x: torch.log_softmax(plain(net, x), -1), "Net.forward computes `log_softmax`"),
        (lambda net, x: torch.from_numpy(plain(net, x).numpy() * 2), "Net.forward does not return first what comes"),
        (lambda net, x: net.head(net.rms_norm(net.gru(net.encoder(x))[0])), "`rms_norm` is a RMSNorm, which"),
        (lambda net, x: net.leaky(plain(net, x)), "leaky_relu with negative_slope=0.2 cannot be served, only with"),
        (lambda net, x: torch.softmax(plain(net, x), 1), "softmax over another dimension than the last"),
        (
            lambda net, x: (plain(net, x), net.encoder(x)),
            "Net.forward uses its input more than once, for `encoder.0` and for `encoder.0`",
        ),
        (lambda net, x: (net.encoder(x), plain(net, net.encoder(x)))[0], "runs|more than once|takes"),
        (lambda net, x: net.gru(net.encoder(x))[1], "gives the shape|gives other values"),
        (lambda net, x: net.head(net.gru(net.encoder(x))[1][0]), "gives other values than its layers do"),
        (forgets_the_first, "gives other values than its layers do .* they differ by [0-9.]+, where rounding explains"),
        (lambda net, x: plain(net, x)[..., :2], r"gives the shape \[2, 6, 2\] for frames \[2, 6, 6\]; return the 3"),
        (lambda net, x: {"y": plain(net, x)}, "Net returns a dict; return a tensor of outputs, or a tuple"),
        (lambda net, x: net.encoder(x), "Net.forward does not run its recurrent module on its input"),
        (step_by_step, "Net.forward runs `gru` again on its state: run it once over the whole sequence"),
        (
            lambda net, x: net.gru(net.encoder(x), torch.ones(2, x.size(0), 10).cumsum(1))[0],
            "`gru` begins each sequence with another state, and a model folder holds one for all: hand over the layers",
        ),
        (
            lambda net, x: net.gru(net.encoder(x), torch.rand(2, 1, 10).expand(2, x.size(0), 10).contiguous())[0],
            "gives other values than its layers do",
        ),
        (lambda net, x: net.head.forward(net.gru(net.encoder(x))[0]), "Net.forward computes `mm`"),
        (lambda net, x: plain(net, x.half().float()), "Net.forward computes in float16: write the network as a step"),
    ],
)
def test_a_forward_that_does_more_is_refused_and_nothing_is_written(
    tmp_path: Path, forward: Forward, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        save_model(tmp_path / "m", Net(forward))
    assert not (tmp_path / "m").exists()


def in_chunks(net: Any, x: torch.Tensor) -> Any:
    parts = [plain(net, part) for part in torch.split(x, 16, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (lambda net, x: plain(net, x[:, -8:])[:, -1], r"gives other values .*: on frames \[2, 403, 6\] they differ by"),
        (lambda net, x: plain(net, x)[:, :64], r"gives the shape \[2, 64, 3\] for frames \[2, 403, 6\]; return the 3"),
        (in_chunks, r"on frames \[2, 403, 6\], Net.forward uses its input more than once, for `encoder.0` and"),
        (
            lambda net, x: plain(net, x) if x.shape[1] < 10 else plain(net, x).sigmoid(),
            r"runs other layers on frames \[2, 403, 6\] than on \[2, 6, 6\], but a stream may have any length: take",
        ),
        (
            lambda net, x: plain(net, x.reshape(-1, 6, 6)),
            r"runs on frames \[2, 6, 6\] and fails on frames \[2, 403, 6\] \(shape .*\), but a stream may have any",
        ),
    ],
)
def test_a_forward_that_depends_on_the_length_is_refused(tmp_path: Path, forward: Forward, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        save_model(tmp_path / "m", Net(forward))
    assert not (tmp_path / "m").exists()


def test_a_state_that_the_forward_begins_with_becomes_that_of_every_stream(tmp_path: Path) -> None:
    def begins(net: Any, x: torch.Tensor, *others: torch.Tensor) -> Any:
        start = others[0] if others else (net.state * torch.linspace(-1, 1, 10)).expand(2, x.size(0), 10)
        return net.head(net.gru(net.encoder(x), start.contiguous())[0])

    net = Net(begins)
    model = save_model(tmp_path / "m", net)
    assert load_model(tmp_path / "m").fingerprint == model.fingerprint
    assert model.description.in_words().endswith("GRU 10 × 2 layers → dense 7, from a learned state")
    assert model.weights["initial_state.h"].shape == (2, 10)
    plain_model = save_model(tmp_path / "p", Net(plain))
    assert "initial_state" not in plain_model.description.as_json()
    x = torch.randn(3, 9, 6)
    with torch.no_grad():
        torch.testing.assert_close(served(model, x), net.eval()(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="begins with a state that is not zero, and the example may be where"):
        save_model(tmp_path / "e", net, example=(x, torch.ones(2, 3, 10)))


@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 6), (3, 6), (1, 5, 6), (400, 1, 6)])
def test_an_example_of_any_shape_is_compared_at_another_length(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def with_state(net: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
        return net.head(net.gru(net.encoder(x), h)[0])

    def window(net: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
        return with_state(net, x[..., -8:, :], h)[..., -1, :]

    h = torch.zeros((2, shape[0], 10) if len(shape) == 3 else (2, 10))
    save_model(tmp_path / "m", Net(with_state), example=(torch.zeros(shape), h))
    with pytest.raises(ModelError, match="gives other values"):
        save_model(tmp_path / "w", Net(window), example=(torch.zeros(shape), h))
    if len(shape) == 2:
        steps_alone = Net(lambda net, x: net.head(net.gru(net.encoder(x.unsqueeze(1)))[0]).squeeze(1))
        save_model(tmp_path / "s", steps_alone, example=torch.zeros(shape))


def test_what_swallows_every_exception_is_refused_all_the_same(tmp_path: Path) -> None:
    def careless(net: Any, x: torch.Tensor) -> Any:
        y = plain(net, x)
        with contextlib.suppress(Exception):
            y = y.round()
        return y

    with pytest.raises(ModelError, match=r"Net\.forward computes `round`"):
        save_model(tmp_path / "m", Net(careless))


def test_a_batch_norm_without_statistics_cannot_be_folded(tmp_path: Path) -> None:
    net = Net(with_bn)
    net.norm = nn.BatchNorm1d(7, track_running_stats=False)
    with pytest.raises(ModelError, match="`norm` keeps no running statistics; train it with track_running_stats=True"):
        save_model(tmp_path / "m", net)
    net.norm = nn.BatchNorm1d(7, affine=False)
    assert "dense 7 gelu" in save_model(tmp_path / "m", net).description.in_words()


def test_compiled_modules_are_unwrapped_and_graphs_of_modules_run(tmp_path: Path) -> None:
    net = Net(plain)
    expected = save_model(tmp_path / "m", net).fingerprint
    inside, in_place = copy.deepcopy(net), copy.deepcopy(net)
    inside.gru = torch.compile(inside.gru, backend=_fails)  # type: ignore[assignment]
    in_place.compile(backend=_fails)
    outside: Any = torch.compile(net, backend=_fails)
    for number, compiled in enumerate([outside, inside, in_place]):
        assert save_model(tmp_path / f"{number}", compiled).fingerprint == expected
    gru: Any = torch.compile(net.gru, backend=_fails)
    assert save_model(tmp_path / "gru", gru).description.in_words() == "16 features → GRU 10 × 2 layers"


def _fails(graph: Any, inputs: Any) -> Any:
    raise AssertionError("nothing is compiled")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.gru(x)[0])


def test_graphs_and_quantised_modules_are_told_what_to_hand_over(tmp_path: Path) -> None:
    net = Plain().eval()
    assert "GRU 4 → dense 2" in save_model(tmp_path / "fx", torch.fx.symbolic_trace(net)).description.in_words()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        program = torch.export.export(net, (torch.randn(2, 5, 3),))
        given = {
            "a program of torch.export cannot be served: hand over the module that it was exported from, or": program,
            "a compiled graph cannot be served: hand over the module that it was made from": program.module(),
            "a compiled graph cannot be served: hand over the module that it was made": torch.jit.trace(  # type: ignore[no-untyped-call]
                net, torch.randn(2, 5, 3)
            ),
            "Plain has `gru`, and a quantised GRU cannot be served, only float32: hand over": (
                torch.ao.quantization.quantize_dynamic(net, {nn.GRU, nn.Linear})  # type: ignore[no-untyped-call]
            ),
        }
        for sentence, network in given.items():
            with pytest.raises(ModelError, match=f"^{sentence}"):
                save_model(tmp_path / "m", network)
    with pytest.raises(ModelError, match="the weights of Plain are float64, and only float32 is served: convert"):
        save_model(tmp_path / "m", net.double())
    assert not (tmp_path / "m").exists()


def test_layers_go_with_a_gru_and_not_with_a_whole_module(tmp_path: Path) -> None:
    net = Plain()
    with pytest.raises(ModelError, match=r"before and after go with a recurrent module: .* not with the whole Plain"):
        save_model(tmp_path / "m", net, after=[(net.head, "none")])
    by_hand = save_model(tmp_path / "by hand", net.gru, after=[(net.head, "none")])
    found = save_model(tmp_path / "found", net)
    assert isinstance(found.description, GruDescription)
    assert found.fingerprint == by_hand.fingerprint
