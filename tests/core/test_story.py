"""Random stories of streams: the kernels do what the rules say in plain Python, compiled or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.core.admission import admit
from tests.support.core_story import Story

ROOT = Path(__file__).resolve().parents[2]
SEED = 4


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_streams_of_several_origins_are_served_as_in_plain_python(random: Random) -> None:
    Story(random).tell(40)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_story_is_told_as_in_plain_python(seed: int) -> None:
    Story(Random(seed)).tell(200)


def test_compiled_kernels_leave_the_same_bytes_behind_as_the_same_kernels_in_python() -> None:
    """This process runs them in one mode, the other one in the other."""
    story = Story(Random(SEED))
    story.tell(200)
    other = {**os.environ, "NUMBA_DISABLE_JIT": "1" if hasattr(admit, "py_func") else "0"}
    command = [sys.executable, "-W", "error", "-m", "tests.support.core_story", str(SEED)]
    told = subprocess.run(command, cwd=ROOT, env=other, capture_output=True, text=True, timeout=100, check=True)
    assert told.stdout.strip() == story.digest()
