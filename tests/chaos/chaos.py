"""Kill -9 under load: a server that dies at random, clients that go on, and a verdict on every output.

`run` streams to a server in a process of its own, kills that process at random moments, starts it again on the same
recording and the same port, and at the end compares everything with `nn.GRU` over the whole of what was sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from instep.core.typing import F32
from instep.model.folder import write_model
from instep_client import AsyncClient, AsyncGroup
from tests.chaos.proxy import Proxy
from tests.support.models import SMALL, whole

GROUPS, STREAMS = 4, 8
LEAST_STEPS = 5
"""Steps that every group must make between two kills."""
_START_TIMEOUT_S = 60.0
_PROGRESS_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Outcome:
    """What a run found."""

    rounds: int = 0
    frames: int = 0
    resets: int = 0
    wrong_outputs: int = 0
    wrong_states: int = 0
    recovery_s: list[float] = field(default_factory=list)
    verify_status: int = -1

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, nothing differs, and the recording verifies."""
        return self.wrong_outputs == 0 and self.wrong_states == 0 and self.verify_status == 0

    def line(self) -> str:
        """One line of summary."""
        p99 = float(np.percentile(self.recovery_s, 99)) if self.recovery_s else 0.0
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"{verdict}: {self.rounds} kills, {self.resets} connections reset, {self.frames} frames answered, "
            f"{self.wrong_outputs} outputs differ from nn.GRU over the whole recording, {self.wrong_states} final "
            f"states differ, recovery p99 {p99:.3f} s, instep verify exits {self.verify_status}"
        )


class Victim:
    """A server process on one port and one recording, started and killed again and again.

    Args:
        folder: for its model, its recording and its log.
        durability: what answers wait for.
        arguments: further arguments of `instep serve`.
    """

    def __init__(
        self, folder: Path, durability: str, arguments: Sequence[str] = ("--set", "recording.recovery_target_s=0.05")
    ) -> None:
        write_model(folder / "model", SMALL)
        self.recording = folder / "recording.db"
        self.endpoint = f"tcp://127.0.0.1:{_free_port()}"
        self._command = [
            *(sys.executable, "-m", "instep", "serve", str(folder / "model"), "--endpoint", self.endpoint),
            *("--record", str(self.recording), "--durability", durability, "--set", "log.format=json"),
            *arguments,
        ]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> dict[str, Any]:
        """Start it; what it says of itself when it is ready."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)  # noqa: ASYNC220 (a fork takes no time)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            for line in self._log.read_text().splitlines():
                if line.startswith("{") and (said := json.loads(line))["event"] == "serving":
                    ready: dict[str, Any] = said
                    return ready
            await asyncio.sleep(0.01)
        raise RuntimeError(f"the server did not start: {self._log.read_text()}")

    def kill(self) -> None:
        """Kill -9."""
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """See that it is gone, whatever became of it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Ask it to end, and wait."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(timeout=_START_TIMEOUT_S)
        assert status == 0, self._log.read_text()


class Load:
    """Groups of streams in closed loop, each output kept."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._groups: list[AsyncGroup] = []
        self._sent: list[list[F32]] = [[] for _ in range(GROUPS)]
        self._got: list[list[F32]] = [[] for _ in range(GROUPS)]
        self._stops = False

    @property
    def steps(self) -> list[int]:
        """Steps that each group has had answered."""
        return [len(got) for got in self._got]

    async def open(self, client: AsyncClient) -> None:
        """Open the streams."""
        for index in range(GROUPS):
            self._groups.append(await client.open_group([f"{index}-{number}" for number in range(STREAMS)]))

    async def run(self) -> None:
        """Send until `stop`."""
        await asyncio.gather(*(self._drive(index) for index in range(GROUPS)))

    async def _drive(self, index: int) -> None:
        timesteps = index + 1  # blocks of one timestep and of several
        while not self._stops:
            x = self._rng.standard_normal((timesteps, STREAMS, 5)).astype(np.float32)
            self._sent[index].append(x)
            self._got[index].append(await self._groups[index].step(x))

    def stop(self) -> None:
        """Let every group end with the step it is in."""
        self._stops = True

    async def compare(self, outcome: Outcome) -> None:
        """Close the streams; hold outputs and final states against `nn.GRU` over everything that was sent."""
        for group, sent, got in zip(self._groups, self._sent, self._got, strict=True):
            finals = await group.close()
            x, y = np.concatenate(sent), np.concatenate(got)
            outcome.frames += x.shape[0] * x.shape[1]
            for column in range(STREAMS):
                expected, final = whole(SMALL, x[:, column])
                outcome.wrong_outputs += int((expected != y[:, column]).any(axis=1).sum())
                outcome.wrong_states += int((final != finals[column]).any())


async def run(
    folder: Path,
    rounds: int,
    seed: int,
    *,
    durability: str = "commit",
    resets: int = 0,
    on_round: Callable[[], object] = lambda: None,
) -> Outcome:
    """Kill the server `rounds` times under load, and with `resets` break that many connections on the way.

    Raises:
        AssertionError: when a group makes no progress between two kills.
    """
    random_ = random.Random(seed)
    outcome, victim, load = Outcome(), Victim(folder, durability), Load(seed)
    await victim.start()
    async with Proxy(victim.endpoint, random_, enabled=resets > 0) as proxy:
        async with AsyncClient(proxy.endpoint, timeout_s=5.0, reconnect_s=_PROGRESS_TIMEOUT_S) as client:
            await load.open(client)
            running = asyncio.create_task(load.run())
            try:
                while outcome.rounds < rounds:
                    await _progress(load, running)
                    await asyncio.sleep(random_.uniform(0, 0.15))
                    victim.kill()
                    outcome.rounds += 1
                    ready = await victim.start()
                    outcome.recovery_s.append(float(ready["recovery_s"]))
                    on_round()
                while proxy.resets < resets:
                    await _progress(load, running)
                    on_round()
                await _progress(load, running)
            finally:
                load.stop()
            proxy.behave()
            await running
            await load.compare(outcome)
        outcome.resets = proxy.resets
    victim.stop()
    verify = [sys.executable, "-m", "instep", "verify", str(victim.recording)]
    outcome.verify_status = (await _wait(verify))[0]
    return outcome


async def _progress(load: Load, running: Awaitable[None]) -> None:
    """Until every group has made some steps more."""
    assert isinstance(running, asyncio.Task)
    target = [steps + LEAST_STEPS for steps in load.steps]
    deadline = time.monotonic() + _PROGRESS_TIMEOUT_S
    while any(steps < least for steps, least in zip(load.steps, target, strict=True)):
        if running.done():
            running.result()
        assert time.monotonic() < deadline, f"no progress: {load.steps} steps, {target} were expected"
        await asyncio.sleep(0.002)


async def _wait(command: list[str]) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said = (await process.communicate())[0]
    assert process.returncode is not None
    return process.returncode, said


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
