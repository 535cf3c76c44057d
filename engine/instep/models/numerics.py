"""How torch computes in this process: threads and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


def prepare() -> None:
    """Have torch use one thread here, and full float32 products on GPUs (no TF32)."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the server does, and afterwards with as many as before: for many small steps.

    Threads that share such a step out wait for one another, and for other programs on their cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_as_here() -> Callable[[], None]:
    """Called first in a new thread, so that products use as many threads there as in this one.

    torch sets a thread up with its first loop that it would share out; a product before that takes all cores, which
    wait for each other where they are busy, and may have other bits.
    """
    return partial(torch.set_num_threads, torch.get_num_threads())
