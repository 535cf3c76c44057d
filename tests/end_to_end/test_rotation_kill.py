"""A server whose recording goes on in one file after another is killed again and again, and all fits together."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from rich.console import Console

from instep.core.typing import F32, U64
from instep.recording import family
from instep.verify.command import run
from tests.chaos.victim import Victim
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient

F, H = 5, 8
STREAMS, LIVES, ROUNDS = 24, 3, 14


async def test_killed_in_the_middle_of_rotations_it_loses_nothing_and_all_files_are_verified(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    names = [f"s{number}" for number in range(STREAMS)]
    x = rng.standard_normal((LIVES * ROUNDS, STREAMS, F)).astype(np.float32)
    y: F32 = np.full((LIVES * ROUNDS, STREAMS, H), np.nan, np.float32)
    epochs: U64 = np.zeros(STREAMS, np.uint64)
    with contextlib.closing(Victim(tmp_path, "commit", ["--set", "recording.max_age_s=1e-06"])) as victim:
        for life in range(LIVES):
            ready = await victim.start()
            assert ready.get("streams_recovered", 0) == (STREAMS if life else 0)
            async with RawClient(victim.endpoint) as client:
                await client.hello()
                have = [ROUNDS * life] * STREAMS
                reply = await client.resume(names, have, epochs.tolist()) if life else await client.open(*names)
                assert reply.codes() == []
                handles, epochs = reply.handles(), reply.grants()["epoch"].copy()
                for seq in range(have[0], have[0] + ROUNDS):
                    for columns in rng.permutation(STREAMS).reshape(-1, 8):
                        seqs = [seq] * 8
                        reply = await client.step(handles[columns], seqs, x[seq : seq + 1, columns], seqs)
                        assert reply.codes() == []
                        y[seq, columns] = reply.floats().reshape(8, H)
                if life < LIVES - 1:
                    victim.kill()
        victim.stop()
    for stream in range(STREAMS):
        np.testing.assert_array_equal(y[:, stream], whole(SMALL, x[:, stream])[0])
    base = victim.recording
    assert len(family.members(base)) > LIVES
    assert not list(base.parent.glob("*-new*"))
    said = io.StringIO()
    assert run([base], model_folder=None, streams=[], json=False, console=Console(file=said, width=160)) == 0
    frames = STREAMS * LIVES * ROUNDS
    assert f"{STREAMS} streams, {frames:,} frames, exact, 0 mismatches" in said.getvalue().splitlines()[-1]
