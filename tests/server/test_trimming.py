"""A server whose recording keeps a limited history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.recording.inspection import inspect
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
NAMES = [f"s{number}" for number in range(8)]


def trimmed(told: list[dict[str, Any]]) -> list[int]:
    return [each["position"] for each in told if each["event"] == "recording trimmed"]


@pytest.mark.long
@pytest.mark.parametrize("limit", [{"keep_bytes": 700_000}, {"keep_s": 0.05}], ids=str)
async def test_streams_go_on_exactly_while_and_after_their_history_is_trimmed(
    rng: np.random.Generator, tmp_path: Path, limit: dict[str, float]
) -> None:
    path, told = tmp_path / "r.instep", list[dict[str, Any]]()
    x, y = list[np.ndarray[Any, np.dtype[np.float32]]](), list[np.ndarray[Any, np.dtype[np.float32]]]()
    async with running(SMALL, told=told, recording={"file": path, **limit}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open(*NAMES)
            while len(trimmed(told)) < 3:
                x.append(rng.standard_normal((16, len(NAMES), F)).astype(np.float32))
                seqs = [16 * (len(x) - 1)] * len(NAMES)
                reply = await client.step(opened.handles(), seqs, x[-1], seqs)
                assert reply.failures() == []
                y.append(reply.floats().reshape(16, len(NAMES), H))
    assert trimmed(told) == sorted(trimmed(told))
    found = inspect(path)
    assert found.first_position == trimmed(told)[-1] + 1
    assert found.open_streams == len(NAMES)
    async with running(SMALL, recording={"file": path}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        seqs = [16 * len(x)] * len(NAMES)
        resumed = await client.resume(NAMES, seqs, opened.epochs())
        assert resumed.failures() == []
        x.append(rng.standard_normal((16, len(NAMES), F)).astype(np.float32))
        reply = await client.step(resumed.handles(), seqs, x[-1], seqs)
        y.append(reply.floats().reshape(16, len(NAMES), H))
    for column in range(len(NAMES)):
        truth, _ = whole(SMALL, np.concatenate(x)[:, column], None)
        np.testing.assert_array_equal(np.concatenate(y)[:, column], truth)
