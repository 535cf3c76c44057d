"""What all tests share: nothing from the user's environment, no luck, one thread for numbers."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere, and inherited by processes that tests start: several threads on a busy machine
# make small matrices many times slower, and what the engine uses it sets itself.
os.environ["OMP_NUM_THREADS"] = "1"

for name in [name for name in os.environ if name.startswith("INSTEP_")]:
    del os.environ[name]

settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(20_240_229)
