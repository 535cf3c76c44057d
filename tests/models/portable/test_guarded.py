"""Forms from strangers: whatever `check` lets through stays within its memory, and is computed as defined."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from instep.models.errors import ModelError
from instep.models.portable import machine
from instep.models.portable.compiler import MAX_UNITS, StepCode
from instep.models.portable.form import (
    Builder,
    Form,
    View,
    broadcast,
    check,
    form_of_values,
    iterations,
    reshape,
    select,
)
from tests.models.portable import test_form
from tests.models.portable.grown import Grower
from tests.models.portable.guarded import check_form, hard_inputs

ROWS = 21
"""Some are computed in lanes, and a rest one by one."""
MOST_STEPS = 20_000
Change = tuple[tuple[Any, ...], Any]

EXAMPLES = [6, pytest.param(400, marks=[pytest.mark.long, pytest.mark.timeout(900)])]


def check_examples(count: int, check: Callable[[Any], None], examples: st.SearchStrategy[Any]) -> None:
    slow = [HealthCheck.filter_too_much, HealthCheck.too_slow]
    settings(max_examples=count, suppress_health_check=slow, deadline=None)(given(examples)(check))()


@pytest.fixture(autouse=True)
def _nothing_is_cached() -> Iterator[None]:
    """Code of many forms that are never seen again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "CACHE_FOLDER", "")
        yield


def check_grown(random: Random) -> None:
    grower = Grower(random)
    form = grower.grow(random.randint(1, 25))
    used = {buffer.tensor for buffer in form.buffers}
    tensors = {name: tensor for name, tensor in grower.tensors.items() if name in used}
    check_form(form, tensors, hard_inputs(form, ROWS, random.randrange(99)), parts=(1, 3))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_grown_forms(examples: int) -> None:
    check_examples(examples, lambda seed: check_grown(Random(seed)), st.integers(0, 2**32 - 1))


def check_damaged(changes: list[Change]) -> None:
    values = copy.deepcopy(test_form.SOUND)
    for place, replacement in changes:
        inside = values
        try:
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = copy.deepcopy(replacement)
        except (LookupError, TypeError):  # the place is gone by an earlier change
            continue
    try:
        form = form_of_values(values, "the form")
        check(form, test_form.KNOWN, "the form")
    except ModelError:
        assume(False)
    assume(sum(map(iterations, form.nodes)) < MOST_STEPS and sum(buffer.size for buffer in form.buffers) < MOST_STEPS)
    check_form(form, test_form.TENSORS, hard_inputs(form, ROWS), parts=(1, 3))


_DAMAGE = st.lists(
    st.tuples(st.sampled_from(test_form.places(test_form.SOUND)[1:]), test_form.REPLACEMENTS), min_size=1, max_size=3
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_damaged_forms(examples: int) -> None:
    check_examples(examples, check_damaged, _DAMAGE)


def far(op: str) -> Form:
    """Takes or puts at indices that rows give."""
    b = Builder()
    x, index, h = b.input("float32", (3,)), b.input("int64", (5,)), b.input("float32", (6,))
    if op == "take":
        taken = b.emit("take", b.fresh("float32", (5,)), broadcast(h, (5, 6)), index)
        return b.form([taken, index, h])
    out = b.map("copy", h)
    b.emit(op, broadcast(reshape(out, (1, 6)), (5, 6)), index, broadcast(select(x, 0, 1), (5,)))
    return b.form([x, index, out])


@pytest.mark.parametrize("op", ["take", "put", "put_add"])
def test_indices_far_out_of_range_are_the_nearest_in_range(op: str) -> None:
    form = far(op)
    x, index, h = hard_inputs(form, 64)
    ends = np.iinfo(np.int64)
    wild = np.array([ends.min, ends.max, ends.min + 1, -7, -6, 5, 6, 2**32, -(2**32), 2**62, -(2**62), 2**31])
    index[:] = np.random.default_rng(1).choice(wild, index.shape)
    check_form(form, {}, [x, index, h], parts=(1, 7))


# ── Forms that would take too much of the machine ────────────────────────────────────────────────────────────────────


def test_products_that_repeat_a_few_weights_take_no_gigabytes() -> None:
    b = Builder()
    x, h = b.input("float32", (1,)), b.input("float32", (4,))
    weight, (outputs, inputs) = b.tensor("weight", "float32", (4,)), (4, 2**28)
    factors = (View(part.buffer, 0, (outputs, inputs), (step, 0)) for part, step in ((x, 0), (weight, 1)))
    form = b.form([x, b.emit("fma_chain", b.fresh("float32", (outputs,)), h, *factors)])
    check(form, {"weight": ("float32", 4)}, "the form")
    with pytest.raises(ModelError, match=r"GB"):
        StepCode(form, machine.host())


def test_constants_count_as_parts() -> None:
    b = Builder()
    x, constant = b.input("float32", (1,)), b.tensor("weight", "float32", (1,))
    h = b.input("float32", (1,))
    for _ in range(MAX_UNITS):
        constant = b.map("neg", constant)
    form = b.form([x, b.map("add", h, constant)])
    check(form, {"weight": ("float32", 1)}, "the form")
    with pytest.raises(ModelError):
        StepCode(form, machine.host())
