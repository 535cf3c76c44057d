"""The copies that a captured graph makes, on the CPU: those of the steps on the CPU are numpy's own."""

from __future__ import annotations

import numpy as np
import torch

from instep.runtime.state_cache import StateCache

CPU = torch.device("cpu")


def test_gather_scatter_and_clear_touch_the_slots_that_they_are_given(rng: np.random.Generator) -> None:
    cache = StateCache(6, 2, 3, CPU)
    states = rng.standard_normal((2, 7, 3)).astype(np.float32)
    cache.array[:] = states
    slots = torch.tensor([5, 2, 0, 0])
    out = torch.empty(2, 4, 3)
    cache.gather(slots, out)
    np.testing.assert_array_equal(out.numpy(), states[:, [5, 2, 0, 0]])

    cache.scatter(slots, out + 1)
    states[:, [5, 2, 0]] += 1
    np.testing.assert_array_equal(cache.array, states)
    cache.clear_scratch()
    states[:, 0] = 0
    np.testing.assert_array_equal(cache.array, states)
