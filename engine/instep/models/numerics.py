"""How torch computes in this process: threads and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


def prepare() -> None:
    """Limit torch to one thread in this process, and use full float32 products on GPUs (no TF32)."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the server does, and restore the number of threads afterwards.

    Several threads would share so small a step, and wait for one another and for other programs on their cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_as_here() -> Callable[[], None]:
    """A function to call first in a new thread, so that its products use as many threads as those of this thread.

    torch configures a thread at its first parallel loop. A product before that uses all cores, waits for busy ones, and
    may have other bits.
    """
    return partial(torch.set_num_threads, torch.get_num_threads())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module as it is served: in evaluation mode, without gradients, and without compiling."""
    training = [part for part in module.modules() if part.training]
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in module.modules())
    module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:
        for part in training:
            part.training = True


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in descriptions and forms: `float32`."""
    return str(dtype).removeprefix("torch.")


def difference(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """The largest difference. If only one of two values is finite, or NaN, it is the largest float64."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        away = np.where((found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0, np.abs(found - wanted))
    return float(np.nan_to_num(away, nan=np.inf).clip(max=np.finfo(np.float64).max).max(initial=0))


def magnitude(values: npt.NDArray[Any]) -> float:
    """The largest finite value without its sign, at least 1."""
    values = np.abs(values.astype(np.float64))
    return float(values.max(initial=1, where=np.isfinite(values)))
