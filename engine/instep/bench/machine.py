"""What stands beside every number: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import zmq

from instep.models.numerics import processor
from instep.runtime.cores import usable_cores


def machine() -> str:
    """One line: processor, cores, instruction set, Python, torch."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} torch thread(s)"
    )


def facts() -> dict[str, Any]:
    """The machine and the versions, by name."""
    return {
        "processor": processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "versions": {
            "instep": version("instep"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pyzmq": zmq.__version__,
            "libzmq": zmq.zmq_version(),
            "msgpack": version("msgpack"),
        },
        "threads": {"torch_of_engine": 1, "torch_of_bare_loops": torch.get_num_threads(), "producers": 1},
    }


def load_average() -> list[float]:
    """Processes that wanted to run, on average over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]
