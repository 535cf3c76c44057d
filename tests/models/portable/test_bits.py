"""A row has the same bits whatever else is in its batch, wherever it is, and however its thread is set up."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.base import StateSpec
from instep.models.folder import make_model
from instep.models.portable.compiler import CompiledStep, as_arrays, shaped, unpacked
from instep.models.portable.definition import Definition
from instep.models.portable.form import Form
from instep.models.portable.self_check import STATE, sample_form, sample_inputs
from instep.models.recurrent.description import RecurrentDescription
from instep.models.recurrent.normal import form_of
from instep.models.registry import parse_description
from tests.models.portable.guarded import Values

ROWS: Final = 511
SIZES: Final = (*range(1, 65), 100, 256, ROWS)
_MOST: Final = float(np.finfo(np.float32).max)
_HOSTILE: Final = np.array([np.nan, np.inf, -np.inf, _MOST, -_MOST, 1e-45, -1e-40, 1e30, -0.0], np.float32)

_LAYERS: Final[dict[str, dict[str, Any]]] = {
    "1-1": {"features": 1, "cell": {"hidden_size": 1}},
    "5-7": {"features": 5, "cell": {"hidden_size": 7, "bias": False}},
    "12-64 and layers": {
        "features": 12,
        "before": [{"size": 33, "activation": "silu"}, {"layer_norm": True}],
        "cell": {"hidden_size": 64},
        "after": [{"layer_norm": True, "activation": "gelu"}, {"size": 3, "activation": "softmax"}],
    },
    "161-400x2": {"features": 161, "cell": {"hidden_size": 400, "num_layers": 2}},
}
_KINDS: Final = {"gru": {}, "lstm": {}, "rnn": {"nonlinearity": "relu"}}
_LARGE: Final = [f"{kind} 161-400x2" for kind in _KINDS]
NAMES: Final = [
    "samples",
    *(f"{kind} {size}" for kind in _KINDS for size in _LAYERS if f"{kind} {size}" not in _LARGE),
    *(pytest.param(name, marks=pytest.mark.long) for name in _LARGE),
]


@dataclass(frozen=True)
class Network:
    """A step, rows for it, and what it makes of each row alone."""

    form: Form
    tensors: Mapping[str, Values]
    state: StateSpec
    step: CompiledStep
    x: F32
    states: U8
    y: F32
    after: U8

    def define(self, x: F32, states: U8) -> tuple[F32, U8]:
        """By the definition."""
        y, *leaves = Definition(self.form, self.tensors).step([x, *unpacked(self.state, states)])
        return y, self.state.pack(shaped(self.state, leaves))


def alone(step: CompiledStep, x: F32, states: U8) -> tuple[F32, U8]:
    """Each row by itself."""
    parts = [step.run(x[row : row + 1], states[row : row + 1]) for row in range(len(x))]
    return np.concatenate([y for y, _ in parts]), np.concatenate([after for _, after in parts])


def make_network(name: str) -> Network:
    form, tensors, state, x, states = _samples() if name == "samples" else _recurrent(*name.split(" ", 1))
    step = CompiledStep(form, tensors, state, name)
    return Network(form, tensors, state, step, x, states, *alone(step, x, states))


network = cache(make_network)


def _samples() -> tuple[Form, dict[str, Values], StateSpec, F32, U8]:
    x, h, counts = sample_inputs(ROWS)
    return *sample_form(), STATE, x, STATE.pack({"h": h, "counts": counts})


def _recurrent(kind: str, size: str) -> tuple[Form, dict[str, Values], StateSpec, F32, U8]:
    fields = dict(_LAYERS[size])
    cell = {**fields.pop("cell"), **_KINDS[kind]}
    description = parse_description({"kind": kind, kind: cell, **fields})
    assert isinstance(description, RecurrentDescription)
    tensors = as_arrays(make_model(description, "random", name=kind, seed=3).weights)
    random, state = np.random.default_rng(5), description.state
    scale = random.choice([0.0, 1e-39, 0.1, 1, 50], (ROWS, 1))
    x = (random.standard_normal((ROWS, description.features)) * scale).astype(np.float32)
    leaves = {leaf.name: random.uniform(-1, 1, (ROWS, *leaf.shape)).astype(np.float32) for leaf in state.leaves}
    return form_of(description), tensors, state, x, state.pack(leaves)


def check_equal(found: tuple[F32, U8], expected: tuple[F32, U8]) -> None:
    """That outputs and states have the same bits."""
    (y, after), (expected_y, expected_after) = found, expected
    assert y.tobytes() == expected_y.tobytes()
    assert after.tobytes() == expected_after.tobytes()


def check_rows(network: Network, rows: Any, y: F32, after: U8) -> None:
    check_equal((y, after), (network.y[rows], network.after[rows]))


@pytest.mark.parametrize("name", NAMES)
def test_rows_alone_are_those_of_the_definition(name: str) -> None:
    net = network(name)
    check_rows(net, slice(None), *net.define(net.x, net.states))
    if name != "samples":
        assert np.isfinite(net.y).all()


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_every_size_in_every_order(name: str) -> None:
    net, random = network(name), np.random.default_rng(6)
    for size in SIZES:
        rows = random.permutation(ROWS)[:size]
        check_rows(net, rows, *net.step.run(net.x[rows], net.states[rows]))


@pytest.mark.parametrize("name", NAMES)
def test_beside_hostile_rows(name: str) -> None:
    """Half of the rows hold the worst values there are; these, too, have the bits that they have alone."""
    net, random = network(name), np.random.default_rng(7)
    for size in SIZES:
        rows = random.permutation(ROWS)[:size]
        is_hostile = random.permutation(size) < size // 2
        x, states = net.x[rows], net.states[rows]
        x[is_hostile] = random.choice(_HOSTILE, x[is_hostile].shape)
        leaves = {}
        for leaf, values in net.state.unpack(states).items():
            leaves[leaf] = values.copy()
            hostile = _HOSTILE if values.dtype == np.float32 else np.array([2**63 - 1, -(2**63), 0, -1])
            leaves[leaf][is_hostile] = random.choice(hostile, leaves[leaf][is_hostile].shape)
        states = net.state.pack(leaves)
        y, after = net.step.run(x, states)
        check_rows(net, rows[~is_hostile], y[~is_hostile], after[~is_hostile])
        check_equal((y, after), alone(net.step, x, states))
    check_equal((y, after), net.define(x, states))


# ── Other modes of arithmetic ────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always keeps denormals")
    try:
        assert float(np.float32(1e-39) * np.float32(0.5)) == 0, "denormals are kept all the same"
        yield
        assert float(np.float32(1e-39) * np.float32(0.5)) == 0, "the mode was not restored"
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _rounding_up() -> Iterator[None]:
    libm = ctypes.CDLL(None)
    upward = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if upward is None or not hasattr(libm, "fesetround") or libm.fesetround(upward):
        pytest.skip("rounding cannot be set here")
    try:
        assert np.float32(1) + np.float32(1e-30) > 1, "sums are rounded to nearest all the same"
        yield
        assert np.float32(1) + np.float32(1e-30) > 1, "the mode was not restored"
    finally:
        libm.fesetround(0)


@pytest.mark.parametrize("mode", [_flushing, _rounding_up])
@pytest.mark.parametrize("name", ["samples", "gru 5-7", "lstm 12-64 and layers"])
def test_in_another_mode_of_arithmetic(name: str, mode: Callable[[], Any]) -> None:
    """Modes belong to a thread, and other libraries may have set them. In half of the rows all numbers are tiny."""
    net, scale = network(name), np.where(np.arange(ROWS) % 2, np.float32(1e-39), np.float32(1)).reshape(-1, 1)
    with np.errstate(invalid="ignore"):
        x = net.x * scale
        leaves = [leaf * scale if leaf.dtype == np.float32 else leaf for leaf in unpacked(net.state, net.states)]
    states = net.state.pack(shaped(net.state, leaves))
    expected = net.define(x, states)
    with mode():
        found = [net.step.run(x[:size], states[:size]) for size in (1, 5, 64, ROWS)]
    for y, after in found:
        check_equal((y, after), (expected[0][: len(y)], expected[1][: len(y)]))


@pytest.mark.parametrize("mode", [_flushing, _rounding_up])
def test_weights_are_made_ready_in_the_usual_mode(mode: Callable[[], Any]) -> None:
    """What depends on weights alone is computed once: here sums of biases, with denormals among them."""
    net = network("gru 12-64 and layers")
    random = np.random.default_rng(9)
    tensors = {
        name: (values * random.choice([1e-38, 1e-30, 1], values.shape)).astype(np.float32)
        for name, values in net.tensors.items()
    }
    usual = CompiledStep(net.form, tensors, net.state).run(net.x, net.states)
    with mode():
        step = CompiledStep(net.form, tensors, net.state)
    check_equal(step.run(net.x, net.states), usual)


def test_tables_of_another_kind_are_refused() -> None:
    form, tensors = sample_form()
    step = CompiledStep(form, tensors, STATE)
    x, states = np.zeros((2, step.features), np.float32), STATE.initial(2)
    wrong: tuple[Any, ...] = (x[:, 1:], x.astype(np.float64), np.zeros((2, 2 * step.features), np.float32)[:, ::2])
    for table in wrong:
        with pytest.raises(ValueError):
            step.bind(table, states, np.zeros((2, step.outputs), np.float32))
    with pytest.raises(ValueError):
        step.run(x, states[:1])
