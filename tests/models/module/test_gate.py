"""What no step may do, and the sentence that says so: each step here is exported, and refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from instep.models import export_step
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.network import PortableNetwork

Result = tuple[Any, Any]
CALLS = itertools.count(1)
ONE = torch.zeros(1, 4)
CONTROL = r"^the step \(test_gate\.py, line \d+: .*[xh].*\) decides by a value in a tensor"
HERE = r"^the step \(test_gate\.py, line \d+: .*\) "
ROWS = "rows of a batch"


class Step(nn.Module):
    """A step with a layer and some tensors, whose forward a test gives."""

    def __init__(self, body: Callable[[Any, torch.Tensor, torch.Tensor], Result]) -> None:
        super().__init__()
        self.body = body
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("hidden", torch.tensor([0, float("-inf"), 0, 0]))
        self.sixteen = nn.Parameter(torch.zeros(4, dtype=torch.float16))
        self.ticks = 0
        self.kept: Any = None

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> Result:
        return self.body(self, x, h)


def refusal(step: nn.Module, folder: Path, state: Any = None, x: Any = None) -> str:
    """The sentence; and nothing is written."""
    with pytest.raises(ModelError) as refused:
        export_step(step, torch.zeros(1, 4) if x is None else x, torch.zeros(1, 4) if state is None else state, folder)
    assert not folder.exists()
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


def counts_in_python(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    self.ticks += 1
    return x * self.ticks, h


def keeps_in_a_buffer(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    self.seen += 1
    return x + self.seen, h


def picks_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    (rows,) = (x[:, 0] > 0).nonzero(as_tuple=True)
    return x.index_copy(0, rows, self.layer(x[rows])), h


def attends_to_other_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    return functional.scaled_dot_product_attention(x, x, x), h


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (lambda s, x, h: (x if x.sum() > 0 else -x, h), CONTROL),
        (picks_rows, HERE + "calls nonzero"),
        (lambda s, x, h: (x + torch.randn_like(x), h), HERE + "calls randn_like"),
        (lambda s, x, h: (x + torch.zeros(32, 4), h), "fixes the batch size"),
        (lambda s, x, h: (x if x.shape[0] > 16 else -x, h), "batch sizes"),
        (counts_in_python, "attribute self.ticks,"),
        (lambda s, x, h: (x * next(CALLS), h), "^y of the step"),
        (keeps_in_a_buffer, "its own buffer seen"),
        (lambda s, x, h: (x, torch.cat([h, x], 1)), r"float32 \[32, 4\] before a frame and float32 \[32, 8\] after"),
        (lambda s, x, h: (x > 0, h), "y is bool"),
        (lambda s, x, h: (torch.from_numpy(np.tanh(x.numpy())), h), "torch.export cannot follow the step"),
        (lambda s, x, h: (x.view(3), h), r"the step fails on frames \[32, 4\]"),
        (lambda s, x, h: (x + s.hidden, h), "tensor hidden"),
    ],
)
def test_a_step_that_cannot_be_served(
    body: Callable[[Any, torch.Tensor, torch.Tensor], Result],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = refusal(Step(body), tmp_path / "m")
    assert re.search(named, found), found
    assert capsys.readouterr() == ("", "")


def changes_what_it_is_given(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    x[:, 0] += 1
    return x, h.mul_(0.5).add_(x)


def test_a_step_may_change_its_arguments_in_place(tmp_path: Path) -> None:
    network = PortableNetwork(export_step(Step(changes_what_it_is_given), ONE, ONE, tmp_path / "m"))
    x, rows = np.full((3, 4), 2, np.float32), network.state.pack({"state": np.full((3, 4), 8, np.float32)})
    y, after = network.step(x, rows)
    assert y.tolist() == [[3, 2, 2, 2]] * 3
    assert network.state.unpack(after)["state"].tolist() == [[7, 6, 6, 6]] * 3
    assert (x == 2).all()


def numbers(x: torch.Tensor) -> torch.Tensor:
    """The number of each row in the batch."""
    return torch.arange(x.shape[0])


def writes_to_a_neighbour(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    h = h.clone()
    h[(x[:, 0] > 0).long() % x.shape[0]] = x
    return x, h


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x, h: (x - x.mean(0), h),
        lambda s, x, h: (x, h + x.cumsum(0)),
        attends_to_other_rows,
        lambda s, x, h: (x + functional.conv1d(x.T[None], torch.ones(4, 4, 3), padding=1)[0].T, h),
        lambda s, x, h: (x + numbers(x)[:, None], h),
        writes_to_a_neighbour,
    ],
)
def test_a_row_that_sees_another_its_place_or_how_many_there_are(
    body: Callable[[Any, torch.Tensor, torch.Tensor], Result], tmp_path: Path
) -> None:
    assert re.search(ROWS, found := refusal(Step(body), tmp_path / "m")), found


def places_in_a_ring(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    h, place = h.clone(), (x[:, 0] > 0).long()
    h[numbers(x), place] = x[:, 1]
    h[h > 3] = 3.0
    return x + h[numbers(x), place + 1][:, None], h


def heads_beside_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    heads = x.view(-1, 2, 2).transpose(0, 1).reshape(-1, 2).softmax(-1)
    return heads.view(2, -1, 2).transpose(0, 1).reshape(-1, 4), torch.tanh(h.reshape(-1, 2)).reshape(-1, 4)


@pytest.mark.parametrize(
    "body",
    [
        places_in_a_ring,
        heads_beside_rows,
    ],
)
def test_steps_that_keep_rows_apart_are_served(
    body: Callable[[Any, torch.Tensor, torch.Tensor], Result], tmp_path: Path
) -> None:
    model = export_step(Step(body), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path / "m")
    assert load_model(tmp_path / "m").fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({}, "at least one"),
        (ONE.bfloat16(), "leaf state .* bfloat16"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinity"),
        ((torch.zeros(1, 1, 1, 1, 1, 1),), "up to 4 extents"),
    ],
)
def test_an_example_state_that_no_stream_can_begin_with(state: Any, named: str, tmp_path: Path) -> None:
    step = Step(lambda s, x, h: (x, h))
    with pytest.raises(ModelError, match=named):
        export_step(step, ONE, state, tmp_path / "m", initial_state="example")


def test_what_streams_begin_with_is_zeros_unless_it_is_said(tmp_path: Path) -> None:
    step, x = Step(lambda s, x, h: (x, h)), torch.zeros(2, 4)
    state = {"h": torch.ones(2, 4), "c": torch.zeros(2, 4), "is": torch.ones(2, dtype=torch.bool)}
    assert "not zeros in h, is," in refusal(step, tmp_path / "m", state, x)
    given: Any = "ones"
    with pytest.raises(ModelError, match="initial_state"):
        export_step(step, x, state, tmp_path / "m", initial_state=given)
    spec = export_step(step, x, state, tmp_path / "m", initial_state="example").state
    assert [leaf.initial for leaf in spec.leaves] == [1, 0, 1]


def test_a_folder_that_holds_a_model_is_refused_before_the_step_runs(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").touch()

    def body(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
        raise AssertionError("the step ran")

    with pytest.raises(ModelError):
        export_step(Step(body), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path)
    with pytest.raises(ModelError, match="the step ran"):
        export_step(Step(body), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path, overwrite=True)
