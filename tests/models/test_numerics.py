from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from instep.models.numerics import numerics, one_thread, prepare
from instep_tools.machine import processor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_what_decides_the_bits_is_named() -> None:
    prepare(1)
    found = numerics(CPU)
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["dtype"] == "float32"
    assert found["machine"] == platform.machine()
    assert found["processor"]
    assert found["threads"] == "1"
    assert all(isinstance(value, str) for value in found.values())
    assert numerics(CPU) == found


def test_each_switch_shows() -> None:
    prepare(1)
    before = numerics(CPU)
    prepare(2)
    assert changed(before, numerics(CPU)) == {"threads"}
    prepare(1)
    torch.use_deterministic_algorithms(True)
    try:
        assert changed(before, numerics(CPU)) == {"deterministic"}
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("medium")
    try:
        assert changed(before, numerics(CPU)) == {"matmul_precision"}
    finally:
        torch.set_float32_matmul_precision("highest")
    assert numerics(CPU) == before


def test_one_thread_computes_and_as_many_as_before_do_afterwards() -> None:
    prepare(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def test_preparing_forbids_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    prepare(torch.get_num_threads())
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_without_cpuinfo_the_platform_names_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "z80")
    assert processor(tmp_path / "nothing") == "z80"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Z80 at 4 MHz\nflags: a:b\n")
    assert processor(tmp_path / "cpuinfo") == "Z80 at 4 MHz"
    assert numerics(CPU)["processor"] == processor()


PRODUCT_IN_A_THREAD = """
import os, sys, threading
import numpy as np, torch
from instep.models.numerics import threads_as_here

torch.set_num_threads(1)
arrays = [torch.from_numpy(np.ones(shape, np.float32)) for shape in ((128, 128), (128, 384), (128, 384))]

def multiply(set_up):
    set_up()
    before = len(os.listdir("/proc/self/task"))
    torch.mm(arrays[0], arrays[1], out=arrays[2])
    print(len(os.listdir("/proc/self/task")) - before)

thread = threading.Thread(target=multiply, args=[threads_as_here()])
thread.start()
thread.join()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_a_new_thread_shares_its_products_out_no_more_than_the_one_that_made_it() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    begun = subprocess.run(
        [sys.executable, "-c", PRODUCT_IN_A_THREAD], env=environment, capture_output=True, text=True, check=True
    )
    assert begun.stdout == "0\n"
