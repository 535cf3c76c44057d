"""A server that dies at random, connections that break in the middle of a message, and a verdict on every output.

`run` streams to a server in a process of its own, with keys, kills that process at random moments and starts it again
on the same recording and the same port, or breaks connections, and at the end holds everything that clients got against
`nn.GRU` over the whole of what they sent, and against what the recording says that they sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instep.recording.reader import RecordingReader
from instep_client import AsyncClient
from tests.chaos.load import LEAST_STEPS, PATIENCE_S, Kept, Load, until_progress
from tests.chaos.proxy import Proxy
from tests.chaos.repeater import Repeater
from tests.chaos.victim import QUICK, Victim
from tests.support.batches import batches_of
from tests.support.keys import KeyRing
from tests.support.warm import WarmProcess

MOST_RECOVERY_S = 1.0
GROUPS, STREAMS = 4, 8


@dataclass(slots=True)
class Outcome:
    """What a run found."""

    kills: int = 0
    resets: int = 0
    outputs: int = 0
    """Outputs that clients got."""
    lost: int = 0
    """Frames that were answered and that the recording, or a server that was started again, does not have."""
    differing: int = 0
    """Outputs that are not those of `nn.GRU` over all that was sent."""
    repeated: int = 0
    """Outputs that came more than once."""
    repeated_otherwise: int = 0
    """Those of them that were others then."""
    wrong_states: int = 0
    """Final states that are not those of `nn.GRU`."""
    recovery_s: list[float] = field(default_factory=list)
    """What each start took to load and to replay the recording."""
    away_s: list[float] = field(default_factory=list)
    """From each kill until every group had an answer again."""
    verify_status: int | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, nothing differs, and the recording verifies."""
        wrong = self.lost + self.differing + self.repeated_otherwise + self.wrong_states
        return wrong == 0 and self.outputs > 0 and self.repeated > 0 and self.verify_status == 0

    @property
    def recovery_p99_s(self) -> float:
        """The 99th percentile of `recovery_s`; 0 without kills."""
        return _p99(self.recovery_s)

    def line(self) -> str:
        """One line of summary."""
        times = ""
        if self.kills:
            times = (
                f"recovery p99 {self.recovery_p99_s:.3f} s, answers again p99 {_p99(self.away_s):.2f} s after a kill; "
            )
        return (
            f"{'passed' if self.passed else 'FAILED'}: {self.kills} kills, {self.resets} connections reset; of "
            f"{self.outputs} outputs {self.lost} lost, {self.differing} differ from the replay of the whole; of "
            f"{self.repeated} that came again {self.repeated_otherwise} differ; {self.wrong_states} final states "
            f"differ; {times}instep verify exits {self.verify_status}"
        )


async def run(
    folder: Path,
    kills: int,
    seed: int,
    *,
    durability: str = "commit",
    resets: int = 0,
    on_event: Callable[[], object] = lambda: None,
) -> Outcome:
    """Kill the server `kills` times under load, then break at least `resets` connections.

    Args:
        folder: for everything.
        kills: how often to kill.
        seed: decides when.
        durability: what answers wait for.
        resets: how many connections to break.
        on_event: called after each of them.

    Raises:
        AssertionError: when a group makes no progress between two kills or resets, or anything is refused.
    """
    random_ = random.Random(seed)
    ring = KeyRing(folder, mic={})
    names = [[f"{group}-{number}" for number in range(STREAMS)] for group in range(GROUPS)]
    outcome, load, repeater = Outcome(), Load(seed, names), Repeater(seed, curve=ring.curve("mic"))
    with contextlib.closing(Victim(folder, durability, [*QUICK, *ring.arguments])) as victim:
        await victim.start()
        async with Proxy(victim.endpoint, random_) as proxy:
            endpoint = proxy.endpoint if resets else victim.endpoint
            own = ring.of_client("mic")
            async with AsyncClient(endpoint, timeout_s=5.0, reconnect_s=PATIENCE_S, **own) as client:
                await load.open(client)
                await repeater.open(endpoint)
                async with asyncio.TaskGroup() as group:
                    group.create_task(load.run())
                    group.create_task(repeater.run(endpoint))
                    await _kill(victim, kills, random_, load, repeater, outcome, on_event)
                    proxy.misbehave()
                    while proxy.resets < resets:
                        broken = proxy.resets
                        await _progress(load, repeater)
                        for _ in range(broken, proxy.resets):
                            on_event()
                    proxy.behave()
                    await _progress(load, repeater)
                    load.stop()
                    repeater.stop()
            outcome.resets = proxy.resets
        victim.stop()
        _judge([*load.kept, repeater.kept], victim.recording, outcome)
    outcome.lost += repeater.lost
    outcome.repeated, outcome.repeated_otherwise = repeater.repeated, repeater.differing
    outcome.verify_status = await verify(victim.recording, folder / "verify.log")
    return outcome


async def _kill(
    victim: Victim,
    kills: int,
    random_: random.Random,
    load: Load,
    repeater: Repeater,
    outcome: Outcome,
    on_event: Callable[[], object],
) -> None:
    for _ in range(kills):
        await _progress(load, repeater)
        await asyncio.sleep(random_.uniform(0, 0.15))
        victim.kill()
        killed = time.monotonic()
        outcome.kills += 1
        recovered = await victim.start()
        outcome.recovery_s.append(float(recovered["seconds"]))
        await _progress(load, repeater, steps=1)
        outcome.away_s.append(time.monotonic() - killed)
        on_event()


async def _progress(load: Load, repeater: Repeater, steps: int = LEAST_STEPS) -> None:
    """Until every group has made some steps more."""
    await until_progress(lambda: [*load.steps, len(repeater.kept.got)], steps)


def _judge(all_kept: list[Kept], recording: Path, outcome: Outcome) -> None:
    """Hold what clients sent and got against `nn.GRU` and against the recording."""
    recorded = _recorded(recording)
    for kept in all_kept:
        differing, wrong_states = kept.differing()
        outcome.outputs += kept.outputs
        outcome.differing += differing
        outcome.wrong_states += wrong_states
        sent = np.concatenate(kept.sent)
        for column, name in enumerate(kept.names):
            frames = recorded.get(name, {})
            outcome.lost += sum(frames.get(seq) != x.tobytes() for seq, x in enumerate(sent[:, column]))
            assert len(frames) <= len(sent), f"stream {name!r} has frames in the recording that nobody sent"


def _recorded(recording: Path) -> dict[str, dict[int, bytes]]:
    """The inputs in a recording by stream and seq.

    Raises:
        AssertionError: when a frame is there twice.
    """
    frames: dict[str, dict[int, bytes]] = {}
    with RecordingReader(recording) as reader:
        names = {info.stream: info.name for info in reader.streams()}
        for batch in batches_of(reader):
            for stream, seq, x in zip(batch.streams.tolist(), batch.seqs.tolist(), batch.x, strict=True):
                of_stream = frames.setdefault(names[stream], {})
                assert seq not in of_stream, f"frame {seq} of stream {names[stream]!r} was applied twice"
                of_stream[seq] = x.tobytes()
    return frames


async def verify(recording: Path, log: Path) -> int:
    """The exit status of `instep verify`, of a file or of a folder of them."""
    process = await asyncio.to_thread(WarmProcess, ("verify", str(recording)), output=log)
    return await asyncio.to_thread(process.wait)


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0
