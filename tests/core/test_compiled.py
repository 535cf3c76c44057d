from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import instep

RELEASE_ONE = """
import numpy as np
from instep.core.runs import release
from instep.core.tables import READY, make_tables

tables = make_tables(1, 1, 1, 1, 1, 1, 1, 1)
tables.streams[1]["owner"], tables.streams[1]["next_seq"], tables.streams[1]["holds"] = 0, 1, 1
release(tuple(tables), np.array([1]), 0)
print(tables.counts[READY])
"""


def test_a_kernel_is_compiled_again_when_what_it_inlines_from_another_file_has_changed(tmp_path: Path) -> None:
    source, package = Path(instep.__file__).parent, tmp_path / "instep"
    shutil.copytree(source / "core", package / "core", ignore=shutil.ignore_patterns("__pycache__"))
    for module in source.glob("*.py"):
        shutil.copy(module, package)
    clients = source.parents[1] / "clients"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},  # it runs a copy
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{clients}",
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "NUMBA_DISABLE_JIT": "0",
    }

    def ready() -> str:
        command = [sys.executable, "-c", RELEASE_ONE]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert [ready(), ready()] == ["1", "1"]
    scheduler = package / "core" / "scheduler.py"
    text = scheduler.read_text()
    assert "counts[READY] += 1" in text
    scheduler.write_text(text.replace("counts[READY] += 1", "counts[READY] += 7"))
    assert ready() == "7"
