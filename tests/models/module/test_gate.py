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
ROWS = "^the rows of a batch influence one another"


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


class Layered(Step):
    """With more layers, whose tensors would take most of the time of an export that does not use them."""

    def __init__(self, body: Callable[[Any, torch.Tensor, torch.Tensor], Result]) -> None:
        super().__init__(body)
        self.norm = nn.BatchNorm1d(4)
        self.unkept = nn.BatchNorm1d(4, track_running_stats=False)
        self.rnn = nn.GRU(4, 4)
        self.attention = nn.MultiheadAttention(4, 1)


def refusal(step: nn.Module, folder: Path, state: Any = None, x: Any = None) -> str:
    """The sentence; and nothing is written."""
    with pytest.raises(ModelError) as refused:
        export_step(step, torch.zeros(1, 4) if x is None else x, torch.zeros(1, 4) if state is None else state, folder)
    assert not folder.exists()
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


def loops(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    while h.abs().max() > 1:
        h = h / 2
    return x, h


def counts_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    return torch.stack([row * 2 for row in x]), h


def counts_in_python(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    self.ticks += 1
    return x * self.ticks, h


def counts_later(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    if not torch.compiler.is_compiling() and x.shape[0] == 1:
        self.kept = True
    return x, h


def keeps_in_a_buffer(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    self.seen += 1
    return x + self.seen, h


def keeps_in_a_view_of_a_buffer(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    self.seen.view(2, 2)[0].fill_(3)
    return x + self.seen, h


def casts(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    with torch.autocast("cpu"):
        y = self.layer(x)
    return y.float(), h


def picks_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    (rows,) = (x[:, 0] > 0).nonzero(as_tuple=True)
    return x.index_copy(0, rows, self.layer(x[rows])), h


def steps_in_one_sequence(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    return self.rnn(x)[0], h


def attends_to_other_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    return functional.scaled_dot_product_attention(x, x, x), h


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (lambda s, x, h: (x if x.sum() > 0 else -x, h), CONTROL),
        (loops, CONTROL),
        (picks_rows, HERE + "calls nonzero"),
        (lambda s, x, h: (x.masked_select(x > 0).sum() + x, h), HERE + "calls masked_select"),
        (lambda s, x, h: (x + x[x > 0].sum(), h), HERE),
        (lambda s, x, h: (x + torch.randn_like(x), h), HERE + "calls randn_like"),
        (lambda s, x, h: (torch.dropout(x, 0.5, True), h), HERE + "calls .*dropout"),
        (lambda s, x, h: (x + torch.empty_like(x), h), HERE + "calls empty_like"),
        (lambda s, x, h: (x + torch.zeros(32, 4), h), "fixes the batch size"),
        (counts_rows, "fixes the batch size"),
        (lambda s, x, h: (x if x.shape[0] > 16 else -x, h), "another way at some batch sizes"),
        (counts_in_python, "attribute self.ticks,"),
        (counts_later, "attribute self.kept,"),
        (lambda s, x, h: (x * next(CALLS), h), "^y of the step"),
        (lambda s, x, h: (x, h + next(CALLS)), "^leaf state of the step"),
        (keeps_in_a_buffer, "its own buffer seen"),
        (keeps_in_a_view_of_a_buffer, "its own buffer seen"),
        (lambda s, x, h: (x + s.seen[(x[:, :1] > 2).long() * 4], h), "out of bounds"),
        (lambda s, x, h: (x, torch.cat([h, x], 1)), r"float32 \[32, 4\] before a frame and float32 \[32, 8\] after"),
        (lambda s, x, h: (x, h.double()), r"float32 \[32, 4\] before a frame and float64 \[32, 4\] after"),
        (lambda s, x, h: x, r"must return \(y, new_state\)"),
        (lambda s, x, h: (x.unsqueeze(1), h), r"y is float32 \[32, 1, 4\]"),
        (lambda s, x, h: (x > 0, h), "y is bool"),
        (lambda s, x, h: (x[:16], h), r"y has the shape \[16, 4\]"),
        (lambda s, x, h: ((x, None), h), "y is one NoneType"),
        (lambda s, x, h: (torch.from_numpy(np.tanh(x.numpy())), h), "torch.export cannot follow the step"),
        (lambda s, x, h: (x.view(3), h), r"the step fails on frames \[32, 4\]"),
        (lambda s, x, h: (x + s.hidden, h), "hidden of the step holds NaN or infinity"),
        (lambda s, x, h: (x + s.sixteen.float(), h), "sixteen of the step is float16"),
        (lambda s, x, h: (torch.linalg.svdvals(x[:, None]) * x, h), HERE + "calls linalg_svdvals"),
        (casts, "bfloat16"),
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


def test_a_layer_that_takes_the_batch_for_a_sequence(tmp_path: Path) -> None:
    found = refusal(Layered(steps_in_one_sequence), tmp_path / "m")
    assert re.search(r"fixes the batch size .* x.unsqueeze\(1\)", found), found


def numbers(x: torch.Tensor) -> torch.Tensor:
    """The number of each row in the batch."""
    return torch.arange(x.shape[0])


def writes_to_a_neighbour(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    h = h.clone()
    h[(x[:, 0] > 0).long() % x.shape[0]] = x
    return x, h


def counts_rows_in_place(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    places = torch.zeros(x.shape[0], dtype=torch.int64)
    places.add_(numbers(x))
    return x + places[:, None], h


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x, h: (x - x.mean(0), h),
        lambda s, x, h: (x.clamp(max=x.max()) - x.max(), h),
        lambda s, x, h: (x, h + x.cumsum(0)),
        lambda s, x, h: (x.softmax(0), h),
        lambda s, x, h: (x.flip(0), h),
        lambda s, x, h: (x @ (x.T @ x), h),
        lambda s, x, h: ((x @ x.T) @ x, h),
        attends_to_other_rows,
        lambda s, x, h: (h[(x[:, 0] > 0).long() % x.shape[0]], x),
        lambda s, x, h: (x + torch.einsum("bf,cf,ch->bh", x, x, x), h),
        lambda s, x, h: (x + functional.conv1d(x.T[None], torch.ones(4, 4, 3), padding=1)[0].T, h),
        lambda s, x, h: (torch.triu(x), h),
        lambda s, x, h: (x + numbers(x)[:, None], h),
        lambda s, x, h: (x * x.shape[0], h),
        writes_to_a_neighbour,
        counts_rows_in_place,
    ],
)
def test_a_row_that_sees_another_its_place_or_how_many_there_are(
    body: Callable[[Any, torch.Tensor, torch.Tensor], Result], tmp_path: Path
) -> None:
    assert re.search(ROWS, found := refusal(Step(body), tmp_path / "m")), found


def test_a_step_that_one_row_is_too_few_for(tmp_path: Path) -> None:
    found = refusal(Step(lambda s, x, h: (functional.batch_norm(x, None, None, training=True), h)), tmp_path / "m")
    assert found.startswith("the step fails in a batch of 1 row")


def places_in_a_ring(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    h, place = h.clone(), (x[:, 0] > 0).long()
    h[numbers(x), place] = x[:, 1]
    h[h > 3] = 3.0
    return x + h[numbers(x), place + 1][:, None], h


def heads_beside_rows(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    heads = x.view(-1, 2, 2).transpose(0, 1).reshape(-1, 2).softmax(-1)
    return heads.view(2, -1, 2).transpose(0, 1).reshape(-1, 4), torch.tanh(h.reshape(-1, 2)).reshape(-1, 4)


def attends_to_its_past(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    past = torch.stack([x, h]).transpose(0, 1)
    y = functional.scaled_dot_product_attention(x[:, None], past, past)[:, 0]
    return y + torch.einsum("...i,...i->...", x, h)[:, None] + self.attention(x[None], h[None], h[None])[0][0], x


def goes_through_layers(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
    y, after = self.rnn(x[None], h[None])
    window = torch.cat([y[0, :, :, None], x[:, :, None]], 2)
    pooled = functional.max_pool1d(functional.instance_norm(window), 2)[..., 0]
    return self.norm(functional.group_norm(window, 2))[..., 0] + pooled + torch.fft.rfft(x, dim=1).abs().sum(1, True), (
        after[0]
    )


@pytest.mark.parametrize("body", [places_in_a_ring, heads_beside_rows, attends_to_its_past, goes_through_layers])
def test_steps_that_keep_rows_apart_are_served(
    body: Callable[[Any, torch.Tensor, torch.Tensor], Result], tmp_path: Path
) -> None:
    model = export_step(Layered(body), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path / "m")
    assert load_model(tmp_path / "m").fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({}, "at least one"),
        ({"h": (ONE,)}, "none inside another"),
        (torch.zeros(2, 4), r"leaf state .* \[2, 4\] for 1 row"),
        (ONE.bfloat16(), "leaf state .* bfloat16"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinity"),
        ({"no spaces": ONE}, "'no spaces'"),
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
    with pytest.raises(ModelError, match="initial_state is 'ones'"):
        export_step(step, x, state, tmp_path / "m", initial_state=given)
    spec = export_step(step, x, state, tmp_path / "m", initial_state="example").state
    assert [leaf.initial for leaf in spec.leaves] == [1, 0, 1]


def test_a_leaf_that_is_left_out_is_named(tmp_path: Path) -> None:
    state = {"h": torch.zeros(1, 4), "c": torch.zeros(1, 4)}
    without_c: Any = lambda s, x, h: (x, {"h": h["h"]})  # noqa: E731
    found = refusal(Step(without_c), tmp_path / "m", state)
    assert "the leaves h, and the state before the frame, one dict, h, c" in found
    found = refusal(Step(lambda s, x, h: (x, h[:1])), tmp_path / "m", (torch.zeros(1, 4), torch.zeros(1, 4)))
    assert "one tuple, and the state before the frame, one tuple, s0, s1" in found


def test_one_output_and_one_row_are_said_in_the_singular(tmp_path: Path) -> None:
    model = export_step(Step(lambda s, x, h: (x[:, 0], h)), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path / "m")
    assert model.description.in_words().endswith(" → 1 output")
    sentence = refusal(Step(lambda s, x, h: (x, h)), tmp_path / "n", state=torch.zeros(2, 4))
    assert "has the shape [2, 4] for 1 row of example_x" in sentence


def test_what_is_no_step(tmp_path: Path) -> None:
    step: Any = Step(lambda s, x, h: (x, h))
    for module, x, sentence in (
        (lambda x, h: (x, h), torch.zeros(1, 4), "the step is one function; give an nn.Module"),
        (step, torch.zeros(4), r"must be a float32 tensor of frames \[rows, features\], not float32 \[4\]"),
        (step, torch.zeros(1, 4).double(), "not float64"),
        (step, np.zeros((1, 4), np.float32), "not ndarray"),
    ):
        with pytest.raises(ModelError, match=sentence):
            export_step(module, x, torch.zeros(1, 4), tmp_path / "m")  # type: ignore[arg-type]
    with torch.no_grad():
        step.layer.weight[0, 0] = float("nan")
    step.body = lambda s, x, h: (s.layer(x), h)
    assert "layer.weight of the step holds NaN or infinity" in refusal(step, tmp_path / "m")
    assert step.training, "it is left as it was"


def test_a_folder_that_holds_a_model_is_refused_before_the_step_runs(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").touch()

    def body(self: Any, x: torch.Tensor, h: torch.Tensor) -> Result:
        raise AssertionError("the step ran")

    with pytest.raises(ModelError, match="holds a model already; choose another folder"):
        export_step(Step(body), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path)
    with pytest.raises(ModelError, match="the step ran"):
        export_step(Step(body), torch.zeros(1, 4), torch.zeros(1, 4), tmp_path, overwrite=True)
