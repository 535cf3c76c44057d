from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from instep.core.typing import F32
from instep.models.errors import ModelError
from instep.models.module.description import Graph, ModuleDescription
from instep.models.portable import trace as tracing
from instep.models.portable.definition import Definition
from instep.models.portable.trace import Traced, form_of_module, trace
from tests.support.steps import FEATURES, STEPS, eager, example, exported, leaves


def stepped(traced: Traced, tensors: Mapping[str, Tensor], arrays: Sequence[Any]) -> list[Any]:
    """The results of one step of one row."""
    held = {name: each.numpy() for name, each in {**tensors, **traced.constants}.items()}
    return Definition(traced.form, held).step([np.asarray(each).reshape(1, -1) for each in arrays])


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32))


def traced_again(name: str) -> Traced:
    """The normal form of an exported step, from its graph."""
    model = exported(name)
    assert isinstance(model.description, ModuleDescription)
    assert model.description.graph is not None
    inputs = [torch.zeros(1, FEATURES), *leaves(example(name))]
    return form_of_module(model.description.graph, model.weights, inputs)


@pytest.mark.parametrize("name", STEPS)
def test_a_module_in_normal_form_gives_what_it_gives_itself(name: str) -> None:
    traced, weights = traced_again(name), exported(name).weights
    x: F32 = random(6, FEATURES).numpy()
    expected, after = eager(name, x, 1)
    state: list[Any] = [leaf.numpy() for leaf in leaves(example(name))]
    for frame, y in zip(x, expected, strict=True):
        found, *state = stepped(traced, weights, [frame, *state])
        np.testing.assert_allclose(found[0], y, rtol=1e-6, atol=1e-6)
    for found, leaf in zip(state, after, strict=True):
        np.testing.assert_allclose(found[0], leaf.numpy().flatten(), rtol=1e-6, atol=1e-6)


def form_of(*nodes: tuple[str, str, list[Any]], lines: Mapping[str, str] = MappingProxyType({})) -> Traced:
    """Of a step of 3 features and a leaf h [2], which stays as it is, of nodes (name, operator, arguments)."""
    graph = Graph.model_validate(
        {
            "tensors": [{"name": "w", "shape": [3]}],
            "nodes": [{"name": name, "op": op, "args": args} for name, op, args in nodes],
            "y": {"node": "y"},
            "new_state": {"h": {"state": "h"}},
        }
    )
    return form_of_module(graph, WEIGHTS, [torch.zeros(1, 3), torch.zeros(1, 2)], lines)


X: Final = {"x": True}
WEIGHTS: Final = {"w": torch.tensor([1.0, 2.0, 3.0])}


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        (
            [("found", "aten.fft_rfft.default", [X]), ("y", "aten.neg.default", [{"node": "found"}])],
            "neg with complex",
        ),
        (
            [
                ("wide", "aten.to.dtype", [X, {"dtype": "float64"}]),
                ("found", "aten.exp.default", [{"node": "wide"}]),
                ("y", "aten.to.dtype", [{"node": "found"}, {"dtype": "float32"}]),
            ],
            "line 7.* exp for float64",
        ),
        (
            [
                ("found", "aten.to.dtype", [X, {"dtype": "int8"}]),
                ("y", "aten.to.dtype", [{"node": "found"}, {"dtype": "float32"}]),
            ],
            "line 7.* for int8",
        ),
    ],
)
def test_what_has_no_portable_form_is_refused_with_its_line(nodes: list[Any], match: str) -> None:
    first = ("i", "aten.to.dtype", [X, {"dtype": "int64"}])
    lines = {"found": "the step (model.py, line 7: f(x))"}
    with pytest.raises(ModelError, match=match):
        form_of(first, *nodes, lines=lines)


def test_too_many_operations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_NODES", 2)
    with pytest.raises(ModelError, match="3 operations"):
        trace(lambda tensors, x: [x.sin().cos().tanh()], {}, [random(1, 4)])


def test_a_step_that_changes_its_frame_in_place_is_refused() -> None:
    with pytest.raises(ModelError, match="in place"):
        trace(lambda tensors, x: [x.mul_(2)], {}, [random(1, 4)])


def test_results_have_memory_of_their_own() -> None:
    def step(tensors: Sequence[Tensor], x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        return [x, tensors[0], b.t()[:2].t(), torch.arange(3.0).expand(2, 3)]

    x, w, a = random(1, 4), random(3), random(2, 2, seed=4)
    traced = trace(step, {"w": w}, [x, random(3), a, random(2, 3)])
    given = {*traced.form.inputs, *(n for n, buffer in enumerate(traced.form.buffers) if buffer.tensor)}
    assert not given & {view.buffer for view in traced.form.outputs}
    results = stepped(traced, {"w": w}, [x, random(3), a, random(2, 3)])
    expected = [x, w, a, torch.tensor([0.0, 1, 2, 0, 1, 2])]
    for found, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(found[0], value.flatten().numpy())


def test_constants_are_stored_once_under_free_names() -> None:
    def step(tensors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        table = torch.arange(4.0)
        masked = torch.full((4, 4), -math.inf).triu(1)
        return [x * table + torch.arange(4.0).flip(0) * tensors[0] + torch.full((4,), 0.5) + masked[2]]

    w = {"constant.0": random(4)}
    traced = trace(step, w, [random(1, 4)])
    assert "constant.0" not in traced.constants
    assert all(bool(each.isfinite().all()) for each in traced.constants.values())
    floats = [each.tolist() for each in traced.constants.values() if each.dtype == torch.float32]
    assert floats.count([0, 1, 2, 3]) == 1
    assert [0.5] * 4 not in floats
    (found,) = stepped(traced, w, [random(1, 4)])
    expected = step(list(w.values()), random(1, 4))[0]
    np.testing.assert_allclose(found[0], expected.flatten().numpy(), rtol=1e-6)


def ops(step: Callable[..., Any], *inputs: Tensor, **tensors: Tensor) -> list[str]:
    return [node.op for node in trace(step, tensors, inputs).form.nodes]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: F.linear(x, w, w[:, 0]), ["fma_chain"]),
        (lambda x, w: F.conv1d(x.unsqueeze(0), w[:, :3].unsqueeze(1)), ["fma_chain"]),
        (lambda x, w: torch.lerp(x, x * 2, x), ["mul", "sub", "fma"]),
        (lambda x, w: torch.relu(x), ["maximum"]),
        (lambda x, w: 1 / x, ["div", "mul"]),  # of a number, torch makes a multiplication
        (lambda x, w: torch.rsqrt(x), ["sqrt", "div"]),
        (lambda x, w: x**3, ["mul", "mul"]),
        (lambda x, w: x.transpose(0, 1)[1:].unsqueeze(0).expand(2, 3, 1) + 0.1, ["add"]),
    ],
)
def test_an_operator_takes_few_primitives(function: Callable[[Tensor, Tensor], Tensor], expected: list[str]) -> None:
    assert ops(lambda tensors, x: [function(x, tensors[0])], random(1, 4), w=random(4, 4)) == expected


# Random steps.


def assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 1:] = 0.5
    return y


def added(x: Tensor) -> Tensor:
    y = x * 1
    y.transpose(0, -1)[:1].add_(1.0)
    y.select(-1, 0).mul_(2).neg_()
    return y


def joined(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a.reshape(-1), b.transpose(0, -1).reshape(-1)])


def combined(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(reversed(a.shape), reversed(b.shape), strict=False)
        return function(a, b if all(n == m or 1 in (n, m) for n, m in pairs) else b.mean())

    return run


OF_ONE: Final[list[Callable[[Tensor], Tensor]]] = [
    *(torch.tanh, torch.sigmoid, torch.relu, torch.abs, torch.Tensor.clone, torch.Tensor.contiguous, assigned, added),
    *(lambda x: x * 0.5, lambda x: 1 - x, lambda x: x.clamp(-1, 1)),
    *(lambda x: x.transpose(0, -1), lambda x: x.flip(0), lambda x: x.reshape(-1), lambda x: x.unsqueeze(1)),
    *(lambda x: x[..., ::2], lambda x: x[..., 1:] if x.shape[-1] > 1 else x, lambda x: x.roll(1, -1)),
    *(lambda x: x.unsqueeze(0).expand(2, *x.shape), lambda x: x.unsqueeze(-1).select(-1, 0), lambda x: x.cumsum(-1)),
    *(lambda x: x.sum(-1, keepdim=True), lambda x: x.amax(0, keepdim=True), lambda x: torch.softmax(x, -1)),
    *(lambda x: x.mean() + x[:1], lambda x: x.unfold(-1, 1, 1).squeeze(-1), lambda x: F.pad(x, [1, -1])),
    *(lambda x: (x * 3).long().float(), lambda x: torch.where(x > 0, x, 0.1), lambda x: x.double().mul(2).float()),
    *(lambda x: torch.stack(x.unbind(0), -1), lambda x: torch.stack(x.chunk(1, 0)).squeeze(0)),
    *(
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
        lambda x: x.new_zeros(2, *x.shape).index_copy(0, torch.tensor([1]), x[None]),
    ),
]
OF_TWO: Final = [
    *(combined(torch.add), combined(torch.mul), combined(torch.maximum), combined(torch.sub), joined),
    *(combined(lambda a, b: torch.where(a > b, a, b)), combined(lambda a, b: torch.addcmul(a, a, b))),
]


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=9))
def test_random_steps_give_what_torch_gives(plan: list[tuple[int, int, int]]) -> None:
    def step(tensors: Sequence[Tensor], x: Tensor, h: Tensor) -> list[Tensor]:
        values = [x, h, h.transpose(1, 2), *tensors]
        for choice, first, second in plan:
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            each = choice % (len(OF_ONE) + len(OF_TWO))
            found = OF_ONE[each](a) if each < len(OF_ONE) else OF_TWO[each - len(OF_ONE)](a, b)
            if 0 < found.numel() < 500 and found.dim() < 7:
                values.append(found)
        return [torch.cat([value.reshape(-1) for value in values[3:]]), h + 0]

    x, h, w = random(1, 4), random(1, 3, 4, seed=4), random(3, 4, seed=5)
    with torch.no_grad():
        expected = step([w], x, h)[0]
    found = stepped(trace(step, {"w": w}, [x, h]), {"w": w}, [x, h])[0]
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=2e-5, atol=2e-5)
