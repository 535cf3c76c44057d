"""Compiles LLVM's intermediate language to machine code for this processor or another one, and caches the result."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import llvmlite
import llvmlite.binding as llvm

from instep.core.compiled import CACHE_FOLDER
from instep.models.errors import ModelError
from instep_client.files import write_file

_DIGEST_BYTES: Final = 32
"""The length of the sha256 with which a cached file begins; the code follows."""
_FEW: Final = 8
"""The limit for vectors of 16 floats. It is half as large for vectors of 8, because there are fewer registers."""


@dataclass(frozen=True, slots=True)
class Processor:
    """A target of the compiler. No field changes a bit of a result.

    Attributes:
        triple: LLVM's name of architecture and system.
        name: LLVM's name of the processor.
        features: in LLVM's notation.
        lanes: the number of rows computed at once.
        columns: the number of outputs of a product computed at once, which is the number of floats in a vector.
        registers: the number of vectors for sums.
        few: up to this many rows are computed one by one, with vectors over the elements of a row.
    """

    triple: str
    name: str
    features: str
    lanes: int = 16
    columns: int = 16
    registers: int = 24
    few: int = _FEW

    @property
    def has_fma(self) -> bool:
        """Whether it has fused multiply-adds; without them code calls a function for each, 7 to 30 times slower."""
        return "86" not in self.triple or "+fma," in f"{self.features},"

    @property
    def is_x86(self) -> bool:
        """Whether its architecture is x86-64."""
        return "86" in self.triple


@cache
def host() -> Processor:
    """The processor of this machine."""
    features = llvm.get_host_cpu_features()
    wide = {} if features.get("avx512f", False) else {"lanes": 8, "columns": 8, "registers": 12, "few": _FEW // 2}
    return Processor(llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten(), **wide)


def object_code(text: str, processor: Processor) -> bytes:
    """Compile a module to object code."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(processor.triple).create_target_machine(
        cpu=processor.name,
        features=processor.features,
        opt=3,
        jit=True,
        codemodel="jitdefault" if processor.is_x86 else "default",
    )
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.slp_vectorization = False
    options.loop_vectorization = True  # where there is one lane; it keeps the order of every sum
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    code: bytes = machine.emit_object(parsed)
    return code


class Library:
    """Compiled functions loaded into this process.

    Args:
        code: the result of `object_code`.
        symbols: by name, addresses of external functions that it calls.
    """

    def __init__(self, code: bytes, symbols: Mapping[str, int]) -> None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        for name, address in symbols.items():
            llvm.add_symbol(name, address)
        processor = host()
        machine = llvm.Target.from_triple(processor.triple).create_target_machine(
            cpu=processor.name, features=processor.features, jit=True
        )
        empty = llvm.parse_assembly(f'target triple = "{processor.triple}"')
        self._engine = llvm.create_mcjit_compiler(empty, machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """The address of a function."""
        found: int = self._engine.get_function_address(name)
        return found

    def function(self, name: str, *arguments: Any) -> Any:
        """A function without a return value; a call releases the interpreter's lock."""
        found: Any = ctypes.CFUNCTYPE(None, *arguments)(self.address(name))
        found.library = self  # keeps the compiled code alive as long as the function
        return found


def cached(key: str, processor: Processor, make: Any) -> bytes:
    """The object code for this key and processor, from the cache or made by `make`.

    The key must cover everything that the code depends on, except the sources of this package.

    Raises:
        ModelError: where LLVM cannot compile it.
    """
    parts = (key, repr(processor), llvmlite.__version__, str(llvm.llvm_version_info), _sources())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40] + ".o"
    path = Path(CACHE_FOLDER) / name if CACHE_FOLDER else None
    if path is not None:
        with suppress(OSError):
            kept = path.read_bytes()
            if hashlib.sha256(kept[_DIGEST_BYTES:]).digest() == kept[:_DIGEST_BYTES]:  # else a start would crash
                return kept[_DIGEST_BYTES:]
    try:
        code: bytes = make()
    except RuntimeError as error:
        raise ModelError(f"LLVM cannot compile the step ({error!s:.200}); report it with the model folder") from None
    if path is not None:
        with suppress(OSError):
            write_file(path, hashlib.sha256(code).digest() + code)
    return code


@cache
def _sources() -> str:
    here = Path(__file__).parent
    names = ("form.py", "plan.py", "lanes.py", "kernels.py", "compiler.py", "machine.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()
