"""Modules that do what cannot be served are refused, with what to do, and nothing is written."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instep.models.errors import ModelError
from instep.models.handover.save import save_model
from instep.models.recurrent.description import GruDescription
from tests.support.forwards import Forward, Net, plain


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


def step_by_step(net: Any, x: torch.Tensor) -> Any:
    rows, h = net.encoder(x), None
    for timestep in range(x.shape[1]):
        y, h = net.gru(rows[:, timestep : timestep + 1], h)
    return net.head(y)


def forgets_the_first(net: Any, x: torch.Tensor) -> Any:
    return net.head(net.gru(net.encoder(x))[0])[:, 0]


def in_chunks(net: Any, x: torch.Tensor) -> Any:
    parts = [plain(net, part) for part in torch.split(x, 16, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def swallows_exceptions(net: Any, x: torch.Tensor) -> Any:
    y = plain(net, x)
    with contextlib.suppress(Exception):
        y = y.round()
    return y


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
        (
            lambda net, x: tuple(map(net.head, [net.gru(net.encoder(x))[0]] * 2)),
            "uses the output of `gru` more than once, for `head` and for `head`: run each layer once, .*export_step",
        ),
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
        (swallows_exceptions, r"Net\.forward computes `round`"),
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
def test_a_forward_that_does_more_or_depends_on_the_length_is_refused_and_nothing_is_written(
    tmp_path: Path, forward: Forward, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        save_model(tmp_path / "m", Net(forward))
    assert not (tmp_path / "m").exists()


def test_an_example_that_the_forward_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^Net.forward fails on the example \[2, 5, 7\] \(.*\); give an example that"):
        save_model(tmp_path / "m", Net(plain), example=torch.zeros(2, 5, 7))
    assert not (tmp_path / "m").exists()


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
