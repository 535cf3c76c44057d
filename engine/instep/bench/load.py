"""The load that throughput is measured with: a model, its inputs, and streams in closed loop."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import torch

from instep.core.typing import F32
from instep.models.description import GruLayers, NetworkDescription
from instep.models.folder import Model, make_model
from instep_client import AsyncClient

FEATURES, HIDDEN = 40, 128
STREAMS, BLOCK = 1024, 256
TIMESTEPS = 64
"""Different inputs; a longer run repeats them."""
MODEL_IN_WORDS = f"GRU {FEATURES}→{HIDDEN}, float32"


def make_load() -> tuple[Model, torch.nn.GRU, F32]:
    """The model to serve, torch's own GRU with its weights, and inputs [TIMESTEPS, STREAMS, FEATURES]."""
    description = NetworkDescription(features=FEATURES, gru=GruLayers(hidden_size=HIDDEN))
    model = make_model(description, init="random", seed=1, name="bench")
    gru = torch.nn.GRU(FEATURES, HIDDEN)
    gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in model.weights.items()})
    x = np.random.default_rng(1).standard_normal((TIMESTEPS, STREAMS, FEATURES)).astype(np.float32)
    return model, gru.eval(), x


async def served(
    client: AsyncClient, gru: torch.nn.GRU, x: F32, round_number: int, seconds: float
) -> tuple[float, int]:
    """Every stream in closed loop: a block of 256 streams sends its next frame when it has the answer to the last.

    Returns:
        Frames a second, and how many streams ended in another state than `gru` does.
    """
    parts = [slice(start, start + BLOCK) for start in range(0, STREAMS, BLOCK)]
    groups = [await client.open_group([f"{round_number}-{index}" for index in range(STREAMS)[part]]) for part in parts]
    blocks = [np.ascontiguousarray(x[:, part]) for part in parts]
    steps = [0] * len(groups)
    deadline = time.perf_counter() + seconds
    start = time.perf_counter()

    async def drive(index: int) -> None:
        while time.perf_counter() < deadline:
            await groups[index].step(blocks[index][steps[index] % TIMESTEPS])
            steps[index] += 1

    await asyncio.gather(*(drive(index) for index in range(len(groups))))
    elapsed = time.perf_counter() - start
    wrong = 0
    for group, block, count in zip(groups, blocks, steps, strict=True):
        truth = state_after(gru, block, count)
        wrong += int((await group.close() != truth).any(axis=(1, 2)).sum())
    return sum(steps) * BLOCK / elapsed, wrong


@torch.inference_mode()
def state_after(gru: torch.nn.GRU, block: F32, count: int) -> F32:
    """The states [BLOCK, 1, HIDDEN] after `count` timesteps of a block's inputs."""
    inputs = torch.from_numpy(block)
    h = torch.zeros(1, BLOCK, HIDDEN)
    for step in range(count):
        _, h = gru(inputs[step % TIMESTEPS].unsqueeze(0), h)
    states: F32 = h.transpose(0, 1).numpy()
    return states
