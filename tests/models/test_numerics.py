from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from instep.models.numerics import one_thread


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_one_thread_computes_and_as_many_as_before_do_afterwards() -> None:
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


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
