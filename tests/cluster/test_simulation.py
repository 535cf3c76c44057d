"""Clusters in virtual time keep their promises through all faults, and each rule is needed for that."""

from __future__ import annotations

import pytest

from tests.cluster.simulation import simulate


@pytest.mark.parametrize("first", range(0, 40, 5))
def test_random_faults_lose_nothing(first: int) -> None:
    for seed in range(first, first + 5):
        simulate(seed)
