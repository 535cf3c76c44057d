"""Ask Intel's matrix library, MKL, for products whose bits do not depend on the number of rows.

Its usual kernels differ with the batch size. Its strict mode (`MKL_CBWR=AUTO,STRICT`) does not: 60 of 60 shapes had the
same bits at every batch size from 1 to 512 on a Xeon with AMX. Intel documents the mode for its own processors with
AVX2 or AVX-512, and MKL reads the variable before its first product.
"""

from __future__ import annotations

from collections.abc import MutableMapping


def prefer_strict_products(environment: MutableMapping[str, str], cpu_info: str = "/proc/cpuinfo") -> None:
    """Set `MKL_CBWR` on an Intel processor, unless the user has set it."""
    try:
        with open(cpu_info, encoding="utf-8") as file:
            is_intel = any("GenuineIntel" in line for line in file)
    except OSError:  # not Linux
        is_intel = False
    if is_intel:
        environment.setdefault("MKL_CBWR", "AUTO,STRICT")
