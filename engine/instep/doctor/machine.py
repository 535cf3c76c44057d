"""The machine: processor, cores, memory, limits, clock."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

from instep.config import Config
from instep.doctor.findings import FactSheet, Findings
from instep.memory import memory_limit, read_text, size
from instep.runtime.executor import usable_cores
from instep.server.open_files import FILES_BESIDE_CONNECTIONS
from instep_tools.machine import machine

_FEATURES: Final = ("avx2", "fma", "avx512f", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")
_GOOD_CLOCKS: Final = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter")


def examine_machine(findings: Findings, config: Config, root: Path = Path("/")) -> int:
    """Look at the machine; files of the system are below `root`.

    Returns:
        The bytes of memory that a server may use.
    """
    section = findings.section("machine")
    section.note("system", machine()["system"])
    _cores(findings, section, root)
    memory = _memory(findings, section, root)
    _open_files(findings, section, config)
    clock = read_text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")
    section.note("clock_source", clock)
    if clock and clock not in _GOOD_CLOCKS:
        findings.warn(
            f"the clock source is {clock}: reading the time takes a system call, several times in each step",
            "boot with clocksource=tsc, or ask the provider of the virtual machine",
        )
    return memory


def _cores(findings: Findings, section: FactSheet, root: Path) -> None:
    flags = set(_cpu_flags(root))
    features = [feature for feature in _FEATURES if feature in flags]
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    usable = usable_cores()
    section.note("processor", machine()["processor"])
    section.note("features", features, ", ".join(features) or "none of those that matter")
    section.note("cores", os.cpu_count())
    section.note("affinity", affinity, _ranges(affinity) or "not known")
    section.note("cores_usable", usable)
    if usable < 2:
        findings.warn(
            "this process may use one core only: the event loop and the steps share it",
            "give it two or more: by its affinity (taskset), or the CPU limit of its container or service",
        )
    governor = read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    section.note("governor", governor, governor or "not known")
    if governor == "powersave":
        findings.warn(
            "the processor's governor is powersave: single steps may take several times as long",
            "cpupower frequency-set --governor performance",
        )


def _memory(findings: Findings, section: FactSheet, root: Path) -> int:
    known = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in read_text(root / "proc/meminfo").splitlines())
    }
    total, limit = known.get("MemTotal", 0), memory_limit(root)
    section.note("memory", total, f"{size(total)}, {size(known.get('MemAvailable', 0))} available")
    section.note("memory_limit", limit, "none" if limit is None else f"{size(limit)} (control group)")
    swapped = known.get("SwapTotal", 0) - known.get("SwapFree", 0)
    section.note("swap_used", swapped, f"{size(swapped)} of {size(known.get('SwapTotal', 0))}")
    if swapped:
        findings.warn(
            f"{size(swapped)} of memory are swapped out: a stream whose state is there waits for the disk",
            "free memory, or keep the server out of it: MemorySwapMax=0 in its unit, or swapoff",
        )
    huge = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = huge[huge.find("[") + 1 : huge.find("]")] if "[" in huge else huge
    section.note("huge_pages", chosen, chosen or "not known")
    if chosen == "always":
        findings.warn(
            "transparent huge pages are always used: the kernel may stop a step to move memory, and tables of "
            "streams that are never opened take real memory",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return total if limit is None else min(total, limit)


def _open_files(findings: Findings, section: FactSheet, config: Config) -> None:
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    section.note("open_files", [soft, hard], f"{soft or 'unlimited'}, can be raised to {hard or 'any number'}")
    needed = config.limits.max_connections + FILES_BESIDE_CONNECTIONS
    if hard is not None and hard < needed:
        findings.warn(
            f"{hard:,} files may be open, and limits.max_connections of {config.limits.max_connections:,} needs "
            f"{needed:,}: later connections will be refused",
            f"LimitNOFILE={needed} in the unit, --ulimit nofile={needed} of docker, ulimit -Hn {needed} as root, or "
            "a lower limits.max_connections",
        )


def _cpu_flags(root: Path) -> list[str]:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return words.split()
    return []


def _ranges(numbers: list[int]) -> str:
    """`0-3, 8`."""
    parts: list[str] = []
    begin = 0
    for at, number in enumerate(numbers):
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            parts.append(str(number) if begin == at else f"{numbers[begin]}-{number}")
            begin = at + 1
    return ", ".join(parts)
