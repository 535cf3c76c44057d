"""How torch computes in this process: threads and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn


def prepare() -> None:
    """Have torch use one thread here, and full float32 products on GPUs (no TF32)."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the server does, and restore the number of threads afterwards.

    Threads that share such a step out wait for one another, and for other programs on their cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_as_here() -> Callable[[], None]:
    """A function to call first in a new thread, so that its products use as many threads as those of this one.

    torch sets a thread up with its first loop that it would share out; a product before that takes all cores, which
    wait for each other where they are busy, and may have other bits.
    """
    return partial(torch.set_num_threads, torch.get_num_threads())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module as it is served: evaluating, without gradients, and without compiling anything."""
    training = [part for part in module.modules() if part.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in module.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True


def dtype_name(dtype: torch.dtype) -> str:
    """As descriptions and forms call it: `float32`."""
    return str(dtype).removeprefix("torch.")
