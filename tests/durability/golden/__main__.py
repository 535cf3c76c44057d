"""Writes the golden recording of the present format: `python -m tests.durability.golden`.

An engine is started three times on one recording: killed, closed in order, and killed again while it stepped a frame.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np

from instep.core.typing import F32
from instep.models.folder import load_model
from instep.server.server import Server
from instep_client.protocol.wire import Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.golden import (
    FEATURES,
    GOLDEN,
    HIDDEN,
    MODEL_FOLDER,
    make_golden_model,
)
from tests.support.raw import RawClient, Reply
from tests.support.running import running


class Clients:
    """Whatever the clients know at the end: frames, outputs, and what they did to states."""

    def __init__(self) -> None:
        self.x: dict[str, list[F32]] = {}
        self.y: dict[str, list[F32]] = {}
        self.starts: dict[str, list[tuple[int, F32]]] = {}
        """States that a stream was given: before which of its frames, and which."""
        self.first_seq: dict[str, int] = {}
        self.epochs: dict[str, int] = {}
        self.handles: dict[str, int] = {}
        self._rng = np.random.default_rng(2)

    def opened(self, reply: Reply, names: list[str], states: F32) -> None:
        """Streams opened, in these states [N, 1, hidden size]."""
        assert reply.failures() == []
        self.granted(reply, names)
        for name, seq, state in zip(names, reply.seqs(), states, strict=True):
            self.x[name], self.y[name] = [], []
            self.starts[name] = [(0, state[0])]
            self.first_seq[name] = seq

    def granted(self, reply: Reply, names: list[str]) -> None:
        """Streams were given to this client."""
        assert reply.failures() == []
        self.epochs.update(zip(names, reply.epochs(), strict=True))
        self.handles.update(zip(names, reply.handles().tolist(), strict=True))

    def seqs(self, names: list[str]) -> list[int]:
        """Of the next frames."""
        return [self.first_seq[name] + len(self.y[name]) for name in names]

    async def step(self, client: RawClient, names: list[str], timesteps: int) -> None:
        """A block of frames of -1, 0 and 1."""
        x = self._rng.integers(-1, 2, (timesteps, len(names), FEATURES)).astype(np.float32)
        reply = await client.step([self.handles[name] for name in names], self.seqs(names), x, self.seqs(names))
        assert reply.failures() == []
        y = reply.floats().reshape(timesteps, len(names), HIDDEN)
        for column, name in enumerate(names):
            self.x[name].extend(x[:, column])
            self.y[name].extend(y[:, column])

    async def reset(self, client: RawClient, name: str, state: F32) -> None:
        """A stream is given another state."""
        assert (await client.reset([self.handles[name]], state[None])).kind is Kind.CHANGED
        self.starts[name].append((len(self.y[name]), state[0]))

    async def fork(self, client: RawClient, name: str, new: str) -> None:
        """A stream is copied."""
        reply = await client.fork([self.handles[name]], [new])
        self.opened(reply, [new], np.stack([self.y[name][-1][None]]))

    async def resume(self, client: RawClient, names: list[str], *, take_over: bool = False) -> None:
        """Streams go on after a restart."""
        epochs = [0 if take_over else self.epochs[name] for name in names]
        self.granted(await client.resume(names, self.seqs(names), epochs, take_over=take_over), names)

    async def send_and_be_killed(self, client: RawClient, server: Server, name: str, recording: Path, to: Path) -> None:
        """A frame is sent whose step never ends; once it is recorded the files are copied, as if the engine died."""
        x = np.full((1, 1, FEATURES), GATE_VALUE, np.float32)
        seqs, before = self.seqs([name]), rows(recording, "batches")
        await client.send(*client.step_message([self.handles[name]], seqs, x, seqs))
        while rows(recording, "batches") == before:
            await asyncio.sleep(0.01)
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{recording}{suffix}", f"{to}{suffix}")
        self.x[name].append(x[0, 0])
        server.stop(drain=False)


def rows(recording: Path, table: str) -> int:
    """How many there are."""
    database = sqlite3.connect(recording)
    count = database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    database.close()
    return int(count)


async def write(folder: Path) -> None:
    """Write the recording, and what its clients know."""
    model = load_model(MODEL_FOLDER) if MODEL_FOLDER.exists() else make_golden_model(MODEL_FOLDER)
    clients, rng = Clients(), np.random.default_rng(1)
    first, second, third = (folder / name for name in ("first.instep", "second.instep", "third.instep"))
    zeros, short = np.zeros((2, 1, HIDDEN), np.float32), (rng.integers(-3, 4, (3, 1, HIDDEN)) / 4).astype(np.float32)

    gate = Gate()
    recording = {"path": first, "recovery_target_s": 1e-6}
    async with running(model, stepper=gate.stepper, recording=recording) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            clients.opened(await client.open("plain", "closed"), ["plain", "closed"], zeros)
            clients.opened(await client.open("given", states=short[:1]), ["given"], short[:1])
            await clients.step(client, ["plain", "given", "closed"], 4)
            await clients.fork(client, "plain", "fork")
            await clients.reset(client, "given", short[1])
            await clients.step(client, ["given", "fork"], 3)
            assert (await client.close([clients.handles["closed"]])).kind is Kind.CLOSED
            while not rows(first, "checkpoints"):
                await asyncio.sleep(0.01)
            await clients.step(client, ["plain", "fork", "given"], 2)
            await clients.send_and_be_killed(client, server, "plain", first, second)
            gate.open()

    async with running(model, recording={"path": second}, transport={"heartbeat_s": 0.05}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            names = ["plain", "given", "fork"]
            await clients.resume(client, names)
            have = clients.seqs(["plain"])
            again = await client.step([clients.handles["plain"]], have, np.stack(clients.x["plain"][-1:])[None], have)
            clients.y["plain"].append(again.floats())
            clients.opened(await client.open("late", states=short[2:], first_seqs=[100]), ["late"], short[2:])
            await clients.step(client, [*names, "late"], 3)
        while not rows(second, "events WHERE kind = 'parked'"):
            await asyncio.sleep(0.01)

    gate = Gate()
    async with running(model, stepper=gate.stepper, recording={"path": second}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            await clients.resume(client, ["plain", "late"], take_over=True)
            await clients.step(client, ["late", "plain"], 2)
            await clients.reset(client, "plain", zeros[0])
            await clients.step(client, ["plain"], 1)
            await clients.send_and_be_killed(client, server, "late", second, third)
            gate.open()

    database = sqlite3.connect(third, isolation_level=None)
    database.execute("PRAGMA journal_mode=DELETE")
    database.close()
    shutil.copyfile(third, GOLDEN)
    known: dict[str, F32 | np.uint64 | np.int64] = {}
    for name, x in clients.x.items():
        known[f"{name}/x"], known[f"{name}/y"] = np.array(x), np.array(clients.y[name])
        known[f"{name}/first_seq"] = np.int64(clients.first_seq[name])
        known[f"{name}/epoch"] = np.uint64(clients.epochs[name])
        known[f"{name}/starts"] = np.array([[at, *state] for at, state in clients.starts[name]], np.float32)
    np.savez_compressed(GOLDEN.with_suffix(".npz"), **known)  # type: ignore[arg-type]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(write(Path(folder)))
