"""MKL's strict mode is asked for on Intel's processors only, and never over the user's head."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from instep.mkl import prefer_strict_products


@pytest.mark.parametrize(
    ("cpu_info", "before", "after"),
    [
        ("vendor_id\t: GenuineIntel\n", {}, {"MKL_CBWR": "AUTO,STRICT"}),
        ("vendor_id\t: GenuineIntel\n", {"MKL_CBWR": "AVX2"}, {"MKL_CBWR": "AVX2"}),
        ("vendor_id\t: AuthenticAMD\n", {}, {}),
        (None, {}, {}),
    ],
    ids=["intel", "set-by-the-user", "amd", "no-cpuinfo"],
)
def test_which_mode_is_asked_for(
    tmp_path: Path, cpu_info: str | None, before: dict[str, str], after: dict[str, str]
) -> None:
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(f"processor\t: 0\n{cpu_info}")
    environment = dict(before)
    prefer_strict_products(environment, str(path))
    assert environment == after


def test_it_is_asked_for_before_torch_is_imported() -> None:
    script = (
        "import sys, os; import instep; assert 'torch' not in sys.modules;"
        "from instep.models.numerics import numerics; import torch;"
        "print(numerics(torch.device('cpu'))['mkl_cbwr'] == os.environ.get('MKL_CBWR', ''))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"
