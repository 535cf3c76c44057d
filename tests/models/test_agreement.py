from __future__ import annotations

import numpy as np
import pytest
import torch

from instep.models.handover.check import agreement
from instep.models.numerics import difference
from instep.models.registry import build
from tests.support.models import with_head

MODEL = with_head(5, 8, 3)
CPU = torch.device("cpu")


def outputs(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Of torch's own modules for frames [T, R, features], with a weight multiplied."""
    with torch.no_grad():
        gru = torch.nn.GRU(5, 8)
        weights = MODEL.weights.items()
        gru.load_state_dict({name[4:]: tensor.clone() for name, tensor in weights if name.startswith("gru.")})
        gru.get_parameter("weight_hh_l0")[0, 0] *= factor
        y: torch.Tensor = gru(x)[0]
        return y @ MODEL.weights["after.0.weight"].T + MODEL.weights["after.0.bias"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_the_order_of_the_axes_is_found(order: tuple[int, ...], last: bool) -> None:
    x = torch.randn(20, 4, 5, generator=torch.Generator().manual_seed(1))
    y = outputs(x)[-1:] if last else outputs(x)
    found = agreement(build(MODEL, CPU), x.permute(order).numpy(), y.permute(order).numpy())
    assert found is not None
    assert found.agrees
    assert found.error < 1e-6 < found.tolerance < 1e-4
    assert (found.steps_axis, found.rows_axis) == (order.index(0), order.index(1))


def test_one_sequence_and_one_frame_of_each_may_lack_an_axis() -> None:
    x = torch.randn(20, 1, 5, generator=torch.Generator().manual_seed(1))
    network = build(MODEL, CPU)
    one = agreement(network, x[:, 0].numpy(), outputs(x)[:, 0].numpy())
    frames = agreement(network, x[:, 0].numpy(), outputs(x.transpose(0, 1))[0].numpy())
    assert one is not None
    assert frames is not None
    assert one.agrees
    assert frames.agrees
    assert (frames.rows_axis, frames.steps_axis) == (0, -1)
    assert (one.rows_axis, one.steps_axis) == (-1, 0)


def test_another_weight_is_more_than_rounding() -> None:
    x = torch.randn(20, 4, 5, generator=torch.Generator().manual_seed(1))
    found = agreement(build(MODEL, CPU), x.numpy(), outputs(x, factor=1.1).numpy())
    assert found is not None
    assert not found.agrees
    assert agreement(build(MODEL, CPU), x.numpy(), outputs(x)[..., :2].numpy()) is None


@pytest.mark.parametrize("size", [1e-7, 1e4])
def test_outputs_agree_in_proportion_to_their_size(size: float) -> None:
    x = torch.randn(20, 4, 5, generator=torch.Generator().manual_seed(1))
    model = with_head(5, 8, 3)
    for name in ("after.0.weight", "after.0.bias"):
        model.weights[name].mul_(size)
    found = agreement(build(model, CPU), x.numpy(), (outputs(x) * size).numpy())
    other = agreement(build(model, CPU), x.numpy(), (outputs(x, factor=1.1) * size).numpy())
    assert found is not None
    assert other is not None
    assert found.agrees
    assert not other.agrees
    silent = agreement(build(model, CPU), x.numpy(), np.zeros((20, 4, 3), np.float32))
    assert silent is not None
    assert not silent.agrees
    for name in ("after.0.weight", "after.0.bias"):
        model.weights[name].zero_()
    silent = agreement(build(model, CPU), x.numpy(), np.zeros((20, 4, 3), np.float32))
    assert silent is not None
    assert silent.agrees
    assert silent.tolerance == 0


def test_distances() -> None:
    x, most = np.array([1, -np.inf, 0], np.float32), float(np.finfo(np.float64).max)
    assert difference(x, x) == 0
    assert difference(x[:1], np.nextafter(x[:1], np.float32(5))) == 2.0**-23
    assert difference(x, np.nextafter(x, np.float32(5))) == most, "one of two is finite"
    assert difference(x[:1], np.array([np.nan], np.float32)) == most
