"""The machine and the versions with which a result was measured."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import zmq

CPU_INFO: Final = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """The machine and the versions, by name."""
    return {
        "processor": processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {
            "instep": version("instep"),
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("torch", "numpy", "pyzmq", "msgpack")
                if name != "torch" or find_spec(name)
            },
            "libzmq": zmq.zmq_version(),
        },
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine as the start of a sentence, without versions, from the result of `machine`."""
    return f"{found['processor']} ({found['machine']}), {found['cores']} cores, {found['system']}"


def versions_line(found: Mapping[str, Any]) -> str:
    """The versions in the result of `machine`: `instep 0.4.0, python 3.12.1, …`."""
    return ", ".join(f"{name} {number}" for name, number in found["versions"].items())


def processor(cpu_info: Path = CPU_INFO) -> str:
    """The processor's model, by which matrix libraries choose their kernels."""
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"


def typed_command(program: str) -> str:
    """The command that this process runs, as it can be typed into a shell.

    `program` replaces the path by which it was started.
    """
    return shlex.join([*program.split(), *sys.argv[1:]])
