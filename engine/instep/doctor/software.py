"""The software: versions, switches of libraries, GPUs."""

from __future__ import annotations

import os
import re
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

from instep.config import Config
from instep.doctor.findings import Findings
from instep.models.network import IN_WORDS
from instep.models.portable.form import ARITHMETIC
from instep.models.portable.machine import host
from instep_tools.machine import machine

_OTHERS: Final = ("numba", "pydantic", "starlette", "uvicorn", "onnxruntime", "uvloop")
"""Besides those of `instep_tools.machine`."""
_SWITCHES: Final = ("OMP_NUM_THREADS", "NUMBA_DISABLE_JIT", "LD_PRELOAD")


def examine_software(findings: Findings, config: Config) -> None:
    """Look at versions and settings of libraries."""
    section = findings.section("software")
    for name, version in (machine()["versions"] | {"sqlite": sqlite3.sqlite_version}).items():
        section.note(name, version)
    for name in _OTHERS:
        try:
            section.note(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            section.note(name, None, "not installed")
    _old_versions(findings)

    section = findings.section("arithmetic")
    section.note("arithmetic", ARITHMETIC, IN_WORDS)
    section.note("fma", host().has_fma, "yes" if host().has_fma else "no")
    switches = {name: os.environ[name] for name in _SWITCHES if os.environ.get(name)}
    section.note(
        "environment", switches, ", ".join(f"{name}={value}" for name, value in switches.items()) or "nothing set"
    )
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        findings.warn(
            "NUMBA_DISABLE_JIT is set: the hot path runs as ordinary Python, some hundred times as slow",
            "unset NUMBA_DISABLE_JIT",
        )
    _gpus(findings)


def _gpus(findings: Findings) -> None:
    section = findings.section("gpu")
    section.note("cuda", torch.version.cuda, torch.version.cuda or "torch was built without CUDA")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    section.note("devices", names, ", ".join(names) or "none")
    if torch.version.cuda and not names and Path("/dev/nvidia0").exists():
        findings.warn(
            "there is an NVIDIA GPU that torch cannot use, so steps run on the CPU",
            f"nvidia-smi says which CUDA its driver supports; this torch was built for {torch.version.cuda}",
        )


def _old_versions(findings: Findings) -> None:
    """Warn of packages that are older than what this version asks for."""
    for requirement in metadata.requires("instep") or []:
        found = re.match(r"([\w-]+)(?:\[[^\]]*\])?>=([\d.]+)", requirement)
        if found is None:
            continue
        try:
            installed = metadata.version(found[1])
        except metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(found[2]):
            findings.warn(
                f"{found[1]} {installed} is older than {found[2]}, the oldest that instep is tested with",
                f"pip install --upgrade {found[1]}",
            )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]
