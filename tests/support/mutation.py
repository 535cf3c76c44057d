"""Copies of the engine with one rule broken, and tests run against them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_THE_COPY = 70
"""Exit status when the tests would have run against another engine than the copy."""
_TIMEOUT = re.compile(r"from pytest-timeout|\+ Timeout \+")
"""What pytest-timeout writes when it fails a test, or ends the process."""
_RUN = f"""
import sys, instep, pytest
if not instep.__file__.startswith(sys.argv[1]):
    sys.exit({NOT_THE_COPY})
sys.exit(pytest.main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Mutant:
    """One rule of the engine, broken.

    Attributes:
        name: what it does wrong.
        file: below `engine/instep/`.
        old: the text that keeps the rule; it stands in the file exactly once.
        new: what stands there instead.
        tests: some that must fail.
        hangs: whether they fail by waiting for ever. Else too long a time is no failure: the machine may be busy.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    hangs: bool = False

    @property
    def timeout_s(self) -> int:
        """How long a test may take: short where nothing else can be waited for."""
        return 15 if self.hangs else 60


def copy_engine(folder: Path, mutant: Mutant | None = None) -> None:
    """Copy `engine/` into a new folder, with the mutant's change.

    Raises:
        ValueError: when the text to change is not there exactly once, because the engine has changed.
    """
    shutil.copytree(ROOT / "engine", folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is None:
        return
    file = folder / "instep" / mutant.file
    text = file.read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.old!r} stands {count} times in {mutant.file}; fit the mutant to the engine")
    file.write_text(text.replace(mutant.old, mutant.new))


def run_tests(engine: Path, tests: Sequence[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    """Run tests in a process of its own that imports `instep` from this folder; it ends at the first failure.

    A test that takes longer than `timeout_s` is ended, see `is_killed`.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "PYTEST_"))}
    path = os.pathsep.join([str(engine), str(ROOT / "clients")])
    environment |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--timeout={timeout_s}"]
    return subprocess.run(
        [sys.executable, "-c", _RUN, str(engine), *options, *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def is_killed(mutant: Mutant, run: subprocess.CompletedProcess[str]) -> bool:
    """Whether its tests failed, and not only because they took too long."""
    timed_out = _TIMEOUT.search(run.stdout + run.stderr) is not None
    return run.returncode == pytest.ExitCode.TESTS_FAILED and (mutant.hangs or not timed_out)
