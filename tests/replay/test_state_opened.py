"""`recordings state --open`: on a live server, a recorded stream continues from any frame with the same bits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.program import app
from instep.server.server import Server
from instep_client import AsyncClient
from tests.support.models import SEED_SIZED, SMALL, whole
from tests.support.running import running
from tests.support.traffic import assert_same_bits

FRAMES = 40


class Live:
    """A server that records, and a stream that it has: hibernated, reset, written to and forked."""

    def __init__(self, folder: Path, server: Server, rng: np.random.Generator) -> None:
        self.server = server
        self.recording = folder / "r.instep"
        self.x = rng.standard_normal((FRAMES, 5)).astype(np.float32)
        self.opened, self.written = rng.uniform(-1, 1, (2, 1, 8)).astype(np.float32)
        self.parts = ((0, self.opened), (15, np.zeros((1, 8), np.float32)), (20, self.written))

    async def live(self) -> None:
        async with AsyncClient(self.server.endpoint) as client:
            mic = await client.open("mic", self.opened)
            await mic.step(self.x[:9])
            while not (await client.stats())["streams_hibernated"]:
                await asyncio.sleep(0.02)
            await mic.step(self.x[9:15])
            await mic.reset()
            await mic.step(self.x[15:20])
            await mic.reset(self.written)
            await mic.step(self.x[20:30])
            copy = await mic.fork("copy")
            await copy.step(self.x[30:35])
            await mic.step(self.x[30:])
            await client.open("later")  # answered once the recording holds all outputs before it
            await client.close(park=True)

    def outputs(self, seq: int, end: int) -> tuple[F32, F32]:
        """What the definition computes for frames of `mic`, and the state after them."""
        first, state = [part for part in self.parts if part[0] <= seq][-1]
        if seq > first:
            state = whole(SMALL, self.x[first:seq], state)[1]
        return whole(SMALL, self.x[seq:end], state) if end > seq else (self.x[:0], state)

    async def run(self, *arguments: str | Path) -> Result:
        """The command, in a thread beside the server."""
        return await asyncio.to_thread(CliRunner().invoke, app, [*map(str, arguments)])

    async def replay(self, *arguments: str | Path, recording: Path | None = None) -> tuple[int, dict[str, Any]]:
        file = recording or self.recording
        options = ("-e", self.server.endpoint, "--json")
        result = await self.run("recordings", "state", file, *arguments, *options)
        return result.exit_code, json.loads(result.stdout)


@pytest.fixture
async def live(tmp_path: Path, rng: np.random.Generator) -> AsyncIterator[Live]:
    write_model(tmp_path / "model", SMALL)
    async with running(
        SMALL,
        folder=tmp_path / "model",
        recording={"path": tmp_path / "r.instep"},
        limits={"hibernate_after_s": 0.1, "park_s": 60},
        transport={"heartbeat_s": 0.05},
    ) as server:
        found = Live(tmp_path, server, rng)
        await found.live()
        yield found


async def test_states_of_a_served_stream_are_those_of_the_definition_whatever_happened_to_it(live: Live) -> None:
    for name, seqs in (("mic", (0, 4, 9, 12, 15, 18, 20, 33, 40)), ("copy", (30, 33, 35))):
        for seq in seqs:
            result = await live.run("recordings", "state", live.recording, name, "--seq", str(seq), "--json")
            assert result.exit_code == 0, result.output
            state = np.array(json.loads(result.stdout)["state"]["h"], np.float32)
            assert_same_bits(state, live.outputs(seq, seq)[1], f"{name} before {seq}")


async def test_a_what_if_begins_with_the_recorded_state_and_takes_other_frames(live: Live) -> None:
    status, values = await live.replay("mic", "--seq", "24", "--open", "mic@24")
    assert (status, values["stream"], values["seq"]) == (0, "mic@24", 24)
    again = await live.replay("mic", "--seq", "24", "--open", "mic@24")
    assert (again[0], "with --open" in again[1]["error"]) == (2, True), "the name is in use"
    other = -live.x[:6]
    async with AsyncClient(live.server.endpoint) as client:
        stream = await client.resume("mic@24", epoch=values["epoch"])
        assert_same_bits(await stream.step(other), whole(SMALL, other, live.outputs(24, 24)[1])[0], "what if")


async def test_a_server_of_another_model_is_refused(live: Live) -> None:
    words = ("recordings", "state", live.recording, "mic", "--seq", "24", "--open", "mic@24", "-e")
    async with running(SEED_SIZED) as other:
        result = await live.run(*words, other.endpoint)
    assert result.exit_code == 2
    assert "a state is valid only with the weights that made it" in result.stderr
    async with running(SEED_SIZED, SMALL) as both:
        assert (await live.run(*words, both.endpoint)).exit_code == 2, "it is not the first model"
        result = await live.run(*words, both.endpoint, "--model", SMALL.name)
    assert result.exit_code == 0, result.output
