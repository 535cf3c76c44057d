"""The rules of the arithmetic, broken one by one: the tests of its bits notice each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from instep.models.portable import compiler, definition, kernels, machine
from instep.models.portable.form import Builder, View
from instep.models.portable.lanes import F32, Lanes, Value
from instep.models.recurrent import normal
from tests.models.portable import test_bits, test_compiler, test_digest
from tests.models.portable.processors import x86
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """StepCode is made by the broken rule and forgotten with it; the routines that all steps share are sound."""
    kernels.routines()
    monkeypatch.setattr(machine, "CACHE_FOLDER", "")
    monkeypatch.setattr(test_bits, "network", test_bits.make_network)


def terms_swapped(original: Any, shape: Any, strides: Any, first: int | None = None) -> Any:
    """Only the terms of a chain are counted from 0."""
    if first is not None:
        return original(shape, strides, first)
    found = original(shape, strides)
    found[:2] = found[:2][::-1].copy()
    return found


def last_term_first(original: Any, code: Any, line: Value, add: Callable[[Value, Value], None]) -> None:
    """A chain over one dimension, backwards."""
    _, _, (count, stride) = code.dims
    b = code.b
    with code.loop(count) as k:
        at = b.sub(b.sub(count, code.i(1)), k)
        add(b.mul(at, stride), code.at(line, b.mul(at, code.i(code.panel)), F32))


def difference_contracted(original: Any, b: Builder, x: View, h: View, weights: normal.Weights) -> View:
    original(b, x, h, weights)
    update, _, new = b.nodes[-1].args
    return b.map("fma", update, h, b.map("fma", b.map("neg", update), new, new))


def contracted(original: Any, lanes: Lanes, op: str, dtype: str, x: Value, y: Value) -> Value:
    if op != "add" or getattr(x, "opname", "") != "fmul":
        return original(lanes, op, dtype, x, y)
    return lanes.fma(x.operands[0], x.operands[1], y)


def stride_off_by_one(original: Any, dims: Any) -> Any:
    """Of an argument, so that nothing is written elsewhere."""
    *outer, (size, strides) = original(dims) or [(1, ())]
    return [*outer, (size, (*strides[:-1], strides[-1] + 1) if len(strides) > 1 else strides)]


RULES = (
    BrokenRule(
        "the definition adds two terms of a chain in the other order",
        definition._offsets,
        terms_swapped,
        [partial(test_digest.test_the_definition, test_digest.ROWS)],
    ),
    BrokenRule(
        "the routine of a product adds the terms of a chain backwards",
        kernels._Dense.chain,
        last_term_first,
        [partial(test_digest.test_code_for_other_processors, x86("x86-64-v2", 4))],
    ),
    BrokenRule(
        "h - n of a GRU is contracted",
        normal.gru_cell,
        difference_contracted,
        [partial(test_digest.test_the_code_of_this_processor, test_digest.ROWS)],
    ),
    BrokenRule(
        "products and sums are contracted",
        Lanes.binary,
        contracted,
        [test_compiler.test_products_and_sums_are_not_contracted],
    ),
    BrokenRule(
        "NaN stays as the processor made it",
        Lanes.one_nan,
        lambda original, lanes, dtype, x: x,
        [partial(test_bits.test_beside_hostile_rows, "gru 5-7")],
    ),
    BrokenRule(
        "the sign of a NaN is taken for that of a number",
        Lanes._copysign,
        lambda original, lanes, dtype, x, y: lanes._with_sign(dtype, lanes.intrinsic("fabs", x), y),
        [partial(test_compiler.test_a_nan_that_was_just_computed_is_the_one_nan_and_has_no_sign, "sqrt", "float32")],
    ),
    BrokenRule(
        "a stride is off by one",
        compiler._neighbours_joined,
        stride_off_by_one,
        [test_compiler.test_views_that_run_backwards_and_results_in_parts],
    ),
    BrokenRule(
        "a part of a buffer begins one element late",
        compiler._Unit._load,
        lambda original, unit, view, index: original(unit, replace(view, offset=view.offset + 1), index),
        [partial(test_bits.test_rows_alone_are_those_of_the_definition, "rnn 5-7")],
    ),
    BrokenRule(
        "a lane takes the index of its neighbour",
        Lanes.lane,
        lambda original, lanes, value, number: original(lanes, value, number ^ (lanes.count > 1)),
        [partial(test_compiler.test_take_and_put, "float32")],
    ),
    BrokenRule(
        "a lane takes an element of its neighbour",
        compiler._Unit._load_lane,
        lambda original, unit, view, index, lane: original(unit, view, index, lane ^ (unit.count > 1)),
        [partial(test_compiler.test_take_and_put, "float32")],
    ),
    BrokenRule(
        "a sum begins with -0",
        Lanes.const,
        lambda original, lanes, value, dtype="float32": original(lanes, -0.0 if value == 0 else value, dtype),
        [partial(test_compiler.test_reductions_and_scans, "float32")],
    ),
    BrokenRule(
        "the arithmetic has the mode that another library has set",
        compiler._in_usual_mode,
        lambda original, code, processor: lambda: None,
        [partial(test_bits.test_in_another_mode_of_arithmetic, "gru 5-7", test_bits._flushing)],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    with np.errstate(all="ignore"):
        check_is_found(rule, request)
