"""Code for many processors, as far as this one can run it, and for ARM in an emulator."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import llvmlite.binding as llvm
import numpy as np
import pytest

from instep.models.portable.compiler import StepCode
from instep.models.portable.form import DTYPES, Form
from instep.models.portable.machine import Processor, object_code
from tests.models.portable.guarded import Values, compiled, stepped

_X86: Final = "x86_64-unknown-linux-gnu"
_AVX2: Final = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt")
_AVX512: Final = (*_AVX2, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_LATEST: Final = (
    *_AVX512, "avx512bf16", "avx512bitalg", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vnni",
    "avx512vpopcntdq", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip
NEEDS: Final[Mapping[str, Sequence[str]]] = {
    "x86-64-v2": ("popcnt", "sse4.2"),
    "haswell": _AVX2,
    "skylake-avx512": _AVX512,
    "znver4": _LATEST,
    "sapphirerapids": _LATEST,
}
"""Of LLVM's processors, what code for them may use."""
_WITHOUT: Final = {
    "znver4": "-sse4a,-clzero",
    "sapphirerapids": "-avx512fp16,-avxvnni,-amx-bf16,-amx-int8,-amx-tile",
}
"""Features of one maker's processors that code would rarely use."""


def x86(name: str, lanes: int, *, few: int = 1) -> Processor:
    """With the vectors of that processor; there is less code to compile for fewer rows one by one."""
    wide = "avx512f" in NEEDS[name]
    return Processor(_X86, name, _WITHOUT.get(name, ""), lanes, 16 if wide else 8, 24 if wide else 12, few)


def arm(lanes: int) -> Processor:
    return Processor("aarch64-unknown-linux-gnu", "neoverse-n1", "", lanes, 8, 20, 4)


def skip_unless_it_runs(processor: Processor) -> None:
    if not llvm.get_process_triple().startswith("x86_64"):
        pytest.skip("this processor runs no code for x86-64")
    features = llvm.get_host_cpu_features()
    missing = [each for each in NEEDS[processor.name] if not features.get(each, False)]
    if missing:
        pytest.skip(f"this processor cannot run code for {processor.name}: it has no {', '.join(missing)}")


def step_on(processor: Processor, form: Form, tensors: Mapping[str, Values], arrays: Sequence[Values]) -> list[Values]:
    """The outputs and each leaf by code for another processor, on guarded memory."""
    skip_unless_it_runs(processor)
    return stepped(compiled(form, tensors, processor), arrays)


# ── ARM ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_DRIVER: Final = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void once(void *memory, void *weights, long rows);
void run(void *memory, void *weights, void *ports, long first, long rows);

static void *aligned(long bytes) {
    void *memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(memory, 0xFF, bytes);
    return memory;
}

/* The file holds the bytes of memory and weights, rows, the count of tables and of those that are inputs, and for each
   table the bytes of its rows; then the weights and the inputs. Without rows, weights are made ready. */
int main(int count, char **names) {
    long head[5], sizes[64], ports[64][3];
    FILE *file = fopen(names[1], "rb");
    if (count != 3 || !file || fread(head, 8, 5, file) != 5 || fread(sizes, 8, head[3], file) != head[3]) return 1;
    char *memory = aligned(head[0]), *weights = aligned(head[1]);
    if (fread(weights, 1, head[1], file) != head[1]) return 2;
    for (long i = 0; i < head[3]; i++) {
        char *table = aligned(head[2] * sizes[i]);
        if (i < head[4] && fread(table, 1, head[2] * sizes[i], file) != head[2] * sizes[i]) return 3;
        ports[i][0] = (long)table, ports[i][1] = sizes[i], ports[i][2] = 0;
    }
    fclose(file);
    file = fopen(names[2], "wb");
    if (!head[2]) {
        once(0, weights, 1);
        fwrite(weights, 1, head[1], file);
    } else {
        run(memory, weights, ports, 0, head[2]);
        for (long i = head[4]; i < head[3]; i++) fwrite((char *)ports[i][0], 1, head[2] * sizes[i], file);
    }
    return fclose(file);
}
"""


class Emulator:
    """Code for ARM, run by `qemu-aarch64`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        emulator, self._linker = shutil.which("qemu-aarch64"), next(_linkers(), None)
        if emulator is None:
            pytest.skip("qemu-aarch64 is missing: install qemu-user")
        if self._linker is None:
            pytest.skip("nothing links programs for ARM: install ziglang with pip, or gcc-aarch64-linux-gnu")
        self._emulator = emulator

    def step(
        self, processor: Processor, form: Form, tensors: Mapping[str, Values], arrays: Sequence[Values]
    ) -> list[Values]:
        """The outputs and each leaf."""
        code = StepCode(form, processor)
        program = self._linked(object_code(str(code.module(with_kernels=True)), processor))
        size = code.weight_bytes

        def once(_memory: int, address: int, _rows: int) -> None:
            made = self._run(program, [0, size, 0, 0, 0], [ctypes.string_at(address, size)])
            ctypes.memmove(address, made, size)

        weights = code.weights(tensors, once).tobytes()
        rows, buffers = len(arrays[0]), [form.buffers[index] for index in form.inputs]
        dtypes = [DTYPES[buffer.dtype] for buffer in buffers]
        counts = [view.elements for view in form.outputs]
        bytes_of_rows = [
            *(buffer.size * dtype.itemsize for buffer, dtype in zip(buffers, dtypes, strict=True)),
            *(count * dtype.itemsize for count, dtype in zip(counts, dtypes, strict=True)),
        ]
        head = [code.memory_bytes, size, rows, len(bytes_of_rows), len(arrays), *bytes_of_rows]
        found = self._run(program, head, [weights, *(np.ascontiguousarray(each).tobytes() for each in arrays)])
        results, at = list[Values](), 0
        for count, dtype in zip(counts, dtypes, strict=True):
            results.append(np.frombuffer(found, dtype, rows * count, at).reshape(rows, count))
            at += results[-1].nbytes
        assert at == len(found)
        return results

    def _linked(self, code: bytes) -> Path:
        driver, made, program = (self._folder / name for name in ("driver.c", "step.o", "step"))
        driver.write_text(_DRIVER)
        made.write_bytes(code)
        assert self._linker is not None
        subprocess.run([*self._linker, "-O1", "-static", driver, made, "-lm", "-o", program], check=True)
        return program

    def _run(self, program: Path, head: Sequence[int], parts: Sequence[bytes]) -> bytes:
        given, made = self._folder / "given", self._folder / "made"
        given.write_bytes(np.array(head, np.int64).tobytes() + b"".join(parts))
        subprocess.run([self._emulator, program, given, made], check=True)
        return made.read_bytes()


def _linkers() -> Iterator[list[str]]:
    if found := shutil.which("aarch64-linux-gnu-gcc"):
        yield [found]
    if found := shutil.which("zig"):
        yield [found, "cc", "-target", "aarch64-linux-musl"]
    if find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
