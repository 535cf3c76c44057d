"""A server whose memory holds a few of its streams' states is killed, and goes on exactly where it was."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from instep.core.typing import F32, U64
from tests.chaos.victim import Victim
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient

F, H = 5, 8
STREAMS, ROUNDS, BLOCK = 64, 9, 16
ENGINE = {"max_streams": STREAMS, "device_streams": 8, "host_streams": 16, "max_batch_size": 8}


async def test_cold_streams_go_on_after_a_kill(rng: np.random.Generator, tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(STREAMS)]
    x = rng.standard_normal((ROUNDS, STREAMS, F)).astype(np.float32)
    y: F32 = np.full((ROUNDS, STREAMS, H), np.nan, np.float32)
    epochs: U64 = np.zeros(STREAMS, np.uint64)
    settings = [word for key, value in ENGINE.items() for word in ("--set", f"engine.{key}={value}")]
    with contextlib.closing(Victim(tmp_path, "commit", settings)) as victim:
        for life in range(2):
            ready = await victim.start()
            assert ready.get("streams_recovered", 0) == life * STREAMS
            async with RawClient(victim.endpoint) as client:
                await client.hello()
                have = [ROUNDS // 2 * life] * STREAMS
                reply = await client.resume(names, have, epochs.tolist()) if life else await client.open(*names)
                assert reply.codes() == []
                handles, epochs = reply.handles(), reply.grants()["epoch"].copy()
                if life:
                    assert (await client.statistics())["streams_cold"] >= STREAMS - 8 - 16
                for seq in range(have[0], ROUNDS // 2 if life == 0 else ROUNDS):
                    for columns in rng.permutation(STREAMS).reshape(-1, BLOCK):
                        seqs = [seq] * BLOCK
                        reply = await client.step(handles[columns], seqs, x[seq : seq + 1, columns], seqs)
                        assert reply.codes() == []
                        y[seq, columns] = reply.floats().reshape(BLOCK, H)
                if life == 0:
                    victim.kill()
                else:
                    assert (await client.statistics())["states_fetched_total"] > STREAMS
                    finals = (await client.close(handles)).floats().reshape(STREAMS, 1, H)
        victim.stop()
    for stream in range(STREAMS):
        truth, final = whole(SMALL, x[:, stream])
        np.testing.assert_array_equal(y[:, stream], truth)
        np.testing.assert_array_equal(finals[stream], final)
