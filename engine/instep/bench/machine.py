"""What stands beside every number: the machine and the versions."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> str:
    """One line: processor, cores, instruction set, Python, torch."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} torch thread(s)"
    )
