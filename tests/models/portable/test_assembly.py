"""The machine code of a GRU 40 → 128: vectors of fused multiply-adds in its loops, as many as were written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Final

import pytest

from instep.models.portable import kernels
from instep.models.portable.builder import Builder
from instep.models.portable.compiler import StepCode
from instep.models.portable.form import Form
from instep.models.portable.machine import Processor, assembly
from instep.models.recurrent.description import RecurrentDescription
from instep.models.recurrent.normal import form_of
from instep.models.registry import parse_description
from tests.models.portable.processors import x86

LANES: Final = {"haswell": 8, "skylake-avx512": 16}
_VECTOR: Final = r"\bvf\w*ps\b.*%[yz]mm"
_FUSED: Final = re.compile(r"\s(vfn?m(?:add|sub)\w*)\s")
_SEPARATE: Final = re.compile(r"\sv(?:add|sub|mul|div)[ps]s\s")
_WRITTEN: Final = r'call .*@"llvm\.fma\.'


class Function:
    """The instructions of a function by basic block, and its loops."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def count(self, pattern: str | re.Pattern[str]) -> int:
        return sum(re.search(pattern, line) is not None for line in self.lines)

    def innermost_loops(self) -> list[list[str]]:
        """From a label to each jump back to it, where no other such stretch lies within."""
        labels = {line[:-1]: number for number, line in enumerate(self.lines) if line.endswith(":")}
        found = []
        for number, line in enumerate(self.lines):
            jump = re.match(r"\s+j\w+\s+(\.LBB\w+)$", line)
            if jump is not None and labels.get(jump[1], number) < number:
                found.append((labels[jump[1]], number))
        inner = [one for one in found if not any(one[0] <= other[0] < other[1] < one[1] for other in found)]
        return [self.lines[begin : end + 1] for begin, end in inner]


@cache
def texts(form: Form, processor: Processor) -> tuple[str, str]:
    """A step in LLVM's language as written, and in assembly."""
    written = StepCode(form, processor).text()
    return written, assembly(written, processor)


@cache
def routines(processor: Processor) -> tuple[str, str]:
    """The same for the routines that all steps share."""
    written = str(kernels.module(processor))
    return written, assembly(written, processor)


def functions(text: str) -> Mapping[str, Function]:
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if name := re.match(r"([a-z]\w*):", line):
            current = found[name[1]] = []
        current.append(line.split("#")[0].rstrip())
    return {name: Function(lines) for name, lines in found.items()}


def written_functions(text: str) -> Mapping[str, Function]:
    parts = re.findall(r'^define void @"(\w+)".*?^\{(.*?)^\}', text, re.MULTILINE | re.DOTALL)
    return {name: Function(body.splitlines()) for name, body in parts}


def gru() -> Form:
    description = parse_description({"kind": "gru", "features": 40, "gru": {"hidden_size": 128}})
    assert isinstance(description, RecurrentDescription)
    return form_of(description)


def processor(name: str) -> Processor:
    return x86(name, LANES[name], few=2)


@pytest.mark.parametrize("name", LANES)
def test_loops_have_vector_fmas_and_no_scalar_ones(name: str) -> None:
    for part, expected in ((texts(gru(), processor(name)), 4), (routines(processor(name)), 4)):
        _, text = part
        assert "fmaf" not in text, "it calls a function for a fused multiply-add"
        found = functions(text)
        loops = [Function(loop) for function in found.values() for loop in function.innermost_loops()]
        busy = [loop for loop in loops if loop.count(_FUSED)]
        assert len(busy) >= expected
        for loop in busy:
            assert loop.count(_VECTOR) == loop.count(_FUSED), loop.lines
            assert loop.count(r"\bcall") == 0, loop.lines
        everywhere = sum(function.count(_FUSED) for function in found.values())
        assert sum(loop.count(_FUSED) for loop in busy) == everywhere


@pytest.mark.parametrize("name", LANES)
def test_there_are_as_many_fmas_as_were_written(name: str) -> None:
    """A product and an addition that were written one after the other are not contracted, and no FMA is taken apart."""
    written, text = texts(gru(), processor(name))
    made, meant = functions(text), written_functions(written)
    assert {"run", "once", "unit_1_0", f"unit_{LANES[name]}_0"} <= set(made)
    for function, intended in meant.items():
        assert made[function].count(_FUSED) == intended.count(_WRITTEN), function
        assert (made[function].count(_SEPARATE) > 0) == (intended.count(r" f(add|sub|mul|div) ") > 0), function
    assert sum(each.count(_WRITTEN) for each in meant.values()) == 2 * 32
    written, text = routines(processor(name))
    assert not re.search(r" f(add|sub|mul|div) ", written)
    every = [function for key, function in functions(text).items() if key.startswith("instep_")]
    assert sum(each.count(_FUSED) for each in every) == len(re.findall(_WRITTEN, written))
    assert sum(each.count(_SEPARATE) for each in every) == 0


@pytest.mark.parametrize("name", [*LANES, "znver4", "sapphirerapids"])
def test_products_and_sums_are_not_contracted(name: str) -> None:
    b = Builder()
    x, h = b.input("float32", (32,)), b.input("float32", (32,))
    y = b.map("add", b.map("mul", x, h), x)
    y = b.map("sub", b.map("mul", y, 0.75), b.map("mul", h, h))
    total = b.reduce("sum", b.map("mul", y, h), [0], keep=True)
    scan = b.emit("cumsum", b.fresh("float32", (32,)), b.map("mul", x, y))
    form = b.form([b.map("sub", y, b.map("mul", total, x)), scan])
    written, text = texts(form, x86(name, 16))
    made, meant = functions(text), written_functions(written)
    steps = [function for function in meant if function.startswith("unit_")]
    assert sum(meant[each].count(" fmul ") for each in steps) == 2 * 6
    for each in steps:
        assert made[each].count(_FUSED) == 0
        assert bool(made[each].count(r"\svmul[ps]s\s")) == bool(meant[each].count(" fmul "))


def test_a_processor_without_fma_calls_a_function() -> None:
    """So the tests above would notice one."""
    b = Builder()
    x, h = b.input("float32", (4,)), b.input("float32", (4,))
    _, text = texts(b.form([b.map("fma", x, h, x), h]), x86("x86-64-v2", 4))
    assert "fmaf" in text
