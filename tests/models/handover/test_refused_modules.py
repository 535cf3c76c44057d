"""Modules that do what cannot be served are refused by what is in the way, and nothing is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from instep.models.errors import ModelError
from instep.models.handover.save import save_model
from tests.support.forwards import Forward, Net, plain


def begins_with_its_frames(net: Any, x: torch.Tensor) -> Any:
    rows = net.encoder(x)
    return net.head(net.gru(rows, rows[:, :2, :10].transpose(0, 1).contiguous())[0])


def answers_by_length(net: Any, x: torch.Tensor) -> Any:
    return plain(net, x) if x.shape[1] < 10 else plain(net, x).sigmoid()


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda net, x: plain(net, x) + x[..., :3], "`add`.*export_step"),
        (lambda net, x: torch.softmax(plain(net, x), 1), "`softmax`"),
        (lambda net, x: plain(net, x.half().float()), "float16"),
        (lambda net, x: net.leaky(plain(net, x)), r"`leaky` is LeakyReLU\(negative_slope=0.2\)"),
        (lambda net, x: tuple(map(net.head, [net.gru(net.encoder(x))[0]] * 2)), "the output of `gru` more than once"),
        (lambda net, x: net.encoder(x), "recurrent module"),
        (lambda net, x: plain(net, x if x.sum() > 0 else -x), r"\(test_refused_modules.py, line \d+: .*torch.export"),
        (begins_with_its_frames, "runs `gru` on a state that depends on the frames"),
        (lambda net, x: net.gru(net.encoder(x), torch.ones(2, x.size(0), 10).cumsum(1))[0], "`gru` .*another state"),
        (lambda net, x: net.head(net.gru(net.encoder(x))[1][0]), "differ by"),
        (lambda net, x: plain(net, x)[..., :2], r"\[32, 6, 2\]"),
        (lambda net, x: plain(net, x.reshape(-1, 6, 6)), r"fails on frames \[1, 403, 6\]"),
        (answers_by_length, r"frames \[1, 403, 6\] .* differ by"),
    ],
)
def test_a_forward_that_does_more_or_depends_on_the_length_is_refused_and_nothing_is_written(
    tmp_path: Path, forward: Forward, named: str
) -> None:
    with pytest.raises(ModelError, match=named) as refused:
        save_model(tmp_path / "m", Net(forward))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "m").exists()


def test_arguments_in_the_order_of_torch_save_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"save_model\(folder, net\)"):
        save_model(nn.GRU(3, 4), tmp_path / "m")  # type: ignore[arg-type]


def test_a_quantised_module_is_called_so(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
            Net(plain), {nn.GRU}, torch.qint8
        )
    with pytest.raises(ModelError, match="quantised"):
        save_model(tmp_path / "m", quantised)


def test_an_example_that_the_forward_cannot_take_is_refused(tmp_path: Path) -> None:
    for example, named in (
        (torch.zeros(2, 5, 7), r"on frames \[2, 5, 7\]"),
        (torch.zeros(1, 1, 6), "a single frame"),
        (torch.zeros(2, 5, 6).double(), "float32 tensor"),
    ):
        with pytest.raises(ModelError, match=named):
            save_model(tmp_path / "m", Net(plain), example=example)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("shape", [(3, 6), (400, 1, 6)])
def test_an_example_of_any_shape_is_compared_at_another_length(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def with_state(net: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
        return net.head(net.gru(net.encoder(x), h)[0])

    def window(net: Any, x: torch.Tensor, h: torch.Tensor) -> Any:
        return with_state(net, x[..., -8:, :], h)[..., -1, :]

    h = torch.zeros((2, shape[0], 10) if len(shape) == 3 else (2, 10))
    save_model(tmp_path / "m", Net(with_state), example=(torch.zeros(shape), h))
    with pytest.raises(ModelError, match="differ by"):
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
        given: dict[str, Any] = {
            "is not a network": program,
            "GraphModule": program.module(),
            "TopLevelTracedModule": torch.jit.trace(net, torch.randn(2, 5, 3)),  # type: ignore[no-untyped-call]
            "^Plain": torch.ao.quantization.quantize_dynamic(net, {nn.GRU, nn.Linear}),  # type: ignore[no-untyped-call]
            "float64": Plain().double(),
        }
        for named, network in given.items():
            with pytest.raises(ModelError, match=named):
                save_model(tmp_path / "m", network)
    assert not (tmp_path / "m").exists()
