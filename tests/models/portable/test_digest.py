"""One digest of the samples, whatever processor the code is for, how many rows it computes at once, and who does it.

A change of a digest is another arithmetic, which needs another name than `portable-1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from instep.models.portable.compiler import CompiledStep, shaped, unpacked
from instep.models.portable.definition import Definition
from instep.models.portable.machine import Processor
from instep.models.portable.self_check import STATE, digest_of, sample_form, sample_inputs
from tests.models.portable.guarded import Values
from tests.models.portable.processors import NEEDS, Emulator, arm, step_on, x86

ROWS, LONG_ROWS = 101, 5600
DIGEST: Final = "62282a9c678771dac901d9270f6cb51ec2717339bc4fc596efb941d75f9778e6"
LONG_DIGEST: Final = "79bd9745c135aef17f940a3475fa77b6714dcfd58c3b94d41c30c4485d0628a8"
DIGESTS: Final = {ROWS: DIGEST, LONG_ROWS: LONG_DIGEST}

ALL: Final = [x86(name, lanes, few=few) for name in NEEDS for lanes, few in ((4, 4), (8, 1), (16, 8))]
FEW: Final = [x86("x86-64-v2", 4), x86("skylake-avx512", 16)]
SIZES: Final = [ROWS, pytest.param(LONG_ROWS, marks=pytest.mark.long)]


def name_of(value: object) -> str:
    return f"{value.name}x{value.lanes}" if isinstance(value, Processor) else str(value)


def check_digest(rows: int, results: Sequence[Values]) -> None:
    y, *leaves = results
    assert digest_of([y, STATE.pack(shaped(STATE, leaves))]) == DIGESTS[rows]


def test_there_are_ten_million_values() -> None:
    form, _ = sample_form()
    y, after = form.outputs[0].elements, STATE.row_bytes // 4
    assert LONG_ROWS * (y + after) > 10_000_000


@pytest.mark.parametrize("rows", SIZES)
def test_the_code_of_this_processor(rows: int) -> None:
    form, tensors = sample_form()
    x, h, counts = sample_inputs(rows)
    y, after = CompiledStep(form, tensors, STATE).run(x, STATE.pack({"h": h, "counts": counts}))
    check_digest(rows, [y, *unpacked(STATE, after)])


@pytest.mark.parametrize("rows", SIZES)
def test_the_definition(rows: int) -> None:
    form, tensors = sample_form()
    check_digest(rows, Definition(form, tensors).step(sample_inputs(rows)))


@pytest.mark.parametrize("processor", FEW, ids=name_of)
def test_code_for_other_processors(processor: Processor) -> None:
    form, tensors = sample_form()
    check_digest(ROWS, step_on(processor, form, tensors, sample_inputs(ROWS)))


@pytest.mark.long
@pytest.mark.parametrize("processor", ALL, ids=name_of)
def test_all_values_by_code_for_other_processors(processor: Processor) -> None:
    form, tensors = sample_form()
    check_digest(LONG_ROWS, step_on(processor, form, tensors, sample_inputs(LONG_ROWS)))


@pytest.mark.long
@pytest.mark.timeout(900)  # a linker may first build its library
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_all_values_by_code_for_arm(lanes: int, tmp_path: Path) -> None:
    form, tensors = sample_form()
    found = Emulator(tmp_path).step(arm(lanes), form, tensors, sample_inputs(LONG_ROWS))
    check_digest(LONG_ROWS, found)
