"""What, besides the model, decides the bits of a step: library, processor, threads, switches."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import torch

from instep_tools.machine import processor


def prepare(threads: int) -> None:
    """Set this process up to step networks: torch's threads, and full float32 products on GPUs (no TF32).

    The server and the verifier call it once, before they certify, so that both compute in the same way.
    """
    torch.set_num_threads(threads)
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


def numerics(device: torch.device, kernel: str = "torch") -> dict[str, str]:
    """By name, everything known to change the bits of a step; written to recordings.

    `kernel` is the word of `RecurrentModel.kernel`.

    A replay under equal numerics and the same model gives equal bits where certified; under others it need not.
    """
    found = {
        "torch": torch.__version__,
        "device": str(device),
        "dtype": "float32",
        "machine": platform.machine(),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "mkl": str(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            "tf32": str(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32),
        }
    if kernel == "onnxruntime":
        found["onnxruntime"] = version("onnxruntime")
    return found
