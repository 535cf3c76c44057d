"""What a captured graph does, on the CPU: the copies of the steps on the CPU are numpy's own."""

from __future__ import annotations

import numpy as np
import torch

from instep.models.gru.network import GruNetwork
from instep.runtime.state_cache import StateCache
from tests.support.models import plain, whole
from tests.support.running import prepared

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


def test_the_steps_of_a_graph_are_those_of_the_whole_sequence(rng: np.random.Generator) -> None:
    model = plain(5, 16, layers=2)
    ready = prepared(model, max_batch_size=2)
    bucket = ready.certification.buckets[0]
    step = GruNetwork(model, CPU).bind(bucket)
    cache = StateCache(6, 2, 16, CPU)
    x = rng.standard_normal((4, 2, 5)).astype(np.float32)
    slots = torch.tensor([3, 1, *[0] * (bucket - 2)])
    for at, frames in enumerate(x):
        step.x[:2] = torch.from_numpy(frames)
        cache.gather(slots, step.h)
        step.run()
        cache.scatter(slots, step.h)
        cache.clear_scratch()
        for stream in range(2):
            np.testing.assert_array_equal(step.y[stream].numpy(), whole(model, x[:, stream], max_batch_size=2)[0][at])
    for stream, slot in enumerate((3, 1)):
        np.testing.assert_array_equal(cache.array[:, slot], whole(model, x[:, stream], max_batch_size=2)[1])
    assert not cache.array[:, [0, 2, 4, 5, 6]].any()
