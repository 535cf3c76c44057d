"""Whole modules are handed over: what is served is compared with what their own forward gives, by torch alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.handover.save import save_model
from tests.support.forwards import Forward, Net, plain, served


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


def keeps_tensors(net: Any, x: torch.Tensor) -> Any:
    y, net.h = net.gru(net.encoder(x), getattr(net, "h", None))
    net.state_seen = y.detach()
    return net.head(y)


def with_statements_in_place(net: Any, x: torch.Tensor) -> Any:
    y = net.gru(net.encoder(x))[0]
    functional.relu(y, inplace=True)
    y = net.head(y)
    y.relu_()
    y.tanh_()
    return y


def flattened(net: Any, x: torch.Tensor) -> Any:
    y, _ = net.gru(net.encoder(x))
    return functional.softmax(net.head(y.contiguous().view(-1, 10)), dim=1)


def time_first(net: Any, x: torch.Tensor) -> Any:
    return net.head(net.gru(net.encoder(x.transpose(0, 1)))[0]).transpose(0, 1)


def careful(net: Any, x: torch.Tensor) -> Any:
    assert x.dim() == 3, f"{x.shape}"
    if len(x) < 1 or x.shape[-1] != 6 or not x.is_floating_point():
        raise ValueError(x.device)
    rows = x.reshape(-1, *x.shape[2:])
    for layer in net.encoder:
        rows = layer(rows)
    begins = torch.zeros(2, int(x.size(0)), 10, dtype=x.dtype, device=x.device)
    y, _ = net.gru(rows.view(*x.shape[:2], -1), begins)
    return {"y": net.head(y)}["y"]


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (careful, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"),
        (plain, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 tanh → dense 3"),
        (with_bn, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 gelu"),
        (with_bn_alone, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 relu → dense 7 tanh → dense 3"),
        (with_initial_zeros, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"),
        (keeps_tensors, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"),
        (
            with_statements_in_place,
            "6 features → dense 16 relu → GRU 10 × 2 layers → dense 10 relu → dense 7 relu → dense 7 tanh",
        ),
        (flattened, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7 softmax"),
        (time_first, "6 features → dense 16 relu → GRU 10 × 2 layers → dense 7"),
        (
            lambda net, x: net.head(torch.relu(net.layer_norm(net.gru(net.encoder(x))[0]))),
            "6 features → dense 16 relu → GRU 10 × 2 layers → layer norm relu → dense 7",
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
    assert not hasattr(net, "h")
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
    with pytest.raises(ModelError, match=r"'h'.*example="):
        save_model(tmp_path / "m", net)
    x, h = torch.randn(1, 4, 6), torch.zeros(2, 1, 10)
    model = save_model(tmp_path / "m", net, example=(x, h))
    with torch.no_grad():
        torch.testing.assert_close(served(model, x), net.eval()(x, h), rtol=1e-5, atol=2e-6)


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
    with pytest.raises(ModelError, match="not zero"):
        save_model(tmp_path / "e", net, example=(x, torch.ones(2, 3, 10)))


def test_compiled_modules_are_unwrapped_and_graphs_of_modules_run(tmp_path: Path) -> None:
    net = Net(plain)
    expected = save_model(tmp_path / "m", net).fingerprint
    inside, in_place = copy.deepcopy(net), copy.deepcopy(net)
    inside.gru = torch.compile(inside.gru, backend=_fails)  # type: ignore[assignment]
    in_place.compile(backend=_fails)
    outside: Any = torch.compile(net, backend=_fails)
    for number, compiled in enumerate([outside, inside, in_place]):
        assert save_model(tmp_path / f"{number}", compiled).fingerprint == expected
    assert save_model(tmp_path / "parallel", nn.DataParallel(net)).fingerprint == expected
    gru: Any = torch.compile(net.gru, backend=_fails)
    assert save_model(tmp_path / "gru", gru).description.in_words() == "16 features → GRU 10 × 2 layers"


def _fails(graph: Any, inputs: Any) -> Any:
    raise AssertionError("nothing is compiled")
