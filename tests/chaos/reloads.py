"""A server that dies while it reloads its model: two versions take turns, and every stream goes on with every frame.

Which version has computed a frame, and from which state on, is what the recordings say; that is computed again with
the definition of each version, and compared with what clients got.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.models.model import Model
from instep.recording.reader import RecordingReader
from tests.chaos.chaos import Outcome, verify
from tests.chaos.load import LEAST_STEPS, Kept, until_progress
from tests.chaos.repeater import Repeater
from tests.chaos.victim import QUICK, Victim
from tests.support.batches import batches_of
from tests.support.models import plain, whole

REPEATERS = 4
VERSIONS = plain(5, 8, seed=1), plain(5, 8, seed=2)
FEATURES = 5
POLICIES = ("move", "move", "replay:20")
_AFTER_FILE_S = 0.03
"""For about as long a reload goes on after it has made its file."""


async def run_reloads(
    folder: Path, reloads: int, seed: int, *, on_event: Callable[[], object] = lambda: None
) -> Outcome:
    """Have the server reload its model under load, and kill it in the middle, `reloads` times.

    Raises:
        AssertionError: when a stream makes no progress after that, or anything is refused.
        RuntimeError: when a start does not succeed.
    """
    random_, outcome = random.Random(seed), Outcome()
    folders = [folder / f"version-{number}" for number in (1, 2)]
    for version, its_folder in zip(VERSIONS, folders, strict=True):
        write_model(its_folder, version)
    config, recordings = folder / "c.yaml", folder / "recordings"
    recordings.mkdir()

    def configure(number: int) -> None:
        config.write_text(f"model: {{folder: {{ears: {folders[number]}}}, on_reload: {random_.choice(POLICIES)}}}\n")

    configure(0)
    arguments = ("--config", str(config), *QUICK)
    repeaters = [Repeater(seed + number, f"again-{number}") for number in range(REPEATERS)]
    with contextlib.closing(Victim(folder, "commit", arguments, None, recordings)) as victim:
        await victim.start()
        for repeater in repeaters:
            await repeater.open(victim.endpoint)
        async with asyncio.TaskGroup() as group:
            for repeater in repeaters:
                group.create_task(repeater.run(victim.endpoint))
            longest_s = 1.0
            for number in range(1, reloads + 1):
                await _progress(repeaters)
                configure(number % 2)
                files, began_s = len(os.listdir(recordings)), time.monotonic()
                victim.hang_up()
                if number % 2:
                    await asyncio.sleep(random_.uniform(0, longest_s))
                else:
                    while len(os.listdir(recordings)) == files:
                        await asyncio.sleep(0.0005)
                    longest_s = time.monotonic() - began_s + _AFTER_FILE_S
                    await asyncio.sleep(random_.uniform(0, _AFTER_FILE_S))
                victim.kill()
                outcome.kills += 1
                await victim.start()
                assert "streams not served" not in victim.said(), victim.said()
                await _progress(repeaters, steps=1)
                on_event()
            await _progress(repeaters)
            for repeater in repeaters:
                repeater.stop()
        victim.stop()
    _judge([repeater.kept for repeater in repeaters], recordings, outcome)
    outcome.lost += sum(repeater.lost for repeater in repeaters)
    outcome.repeated = sum(repeater.repeated for repeater in repeaters)
    outcome.repeated_otherwise = sum(repeater.differing for repeater in repeaters)
    outcome.verify_status = await verify(recordings, folder / "verify.log")
    return outcome


async def _progress(repeaters: list[Repeater], steps: int = LEAST_STEPS) -> None:
    await until_progress(lambda: [len(repeater.kept.got) for repeater in repeaters], steps)


def _judge(all_kept: list[Kept], recordings: Path, outcome: Outcome) -> None:
    truth = _Truth(recordings)
    for kept in all_kept:
        sent, got = np.concatenate(kept.sent), np.concatenate(kept.got)
        assert kept.finals is not None
        for column, name in enumerate(kept.names):
            frames, expected, final = truth.of(name)
            outcome.outputs += len(got)
            outcome.lost += int((frames[: len(sent)] != sent[: len(frames), column]).any(axis=1).sum())
            outcome.lost += abs(len(sent) - len(frames))
            differs = expected[: len(got)].view(np.int32) != got[: len(expected), column].view(np.int32)
            outcome.differing += int(differs.any(axis=1).sum())
            outcome.wrong_states += int((final.view(np.int32) != kept.finals[column].view(np.int32)).any())


class _Truth:
    """What the streams in the recordings of a model had to be answered."""

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[tuple[Model, int, int | None, F32]]] = {}
        """By name, for each version in turn: its first seq, the frame that a replay began with, and the frames."""
        files = [name for name in os.listdir(folder) if name.endswith(".instep")]
        for file in sorted(files, key=lambda name: int(name.removesuffix(".instep").partition("@")[2] or 1)):
            with RecordingReader(folder / file) as reader:
                version = next(each for each in VERSIONS if each.fingerprint == reader.header.model_fingerprint)
                came = {event.stream: event.seq for event in reader.events() if event.kind == "moved"}
                frames: dict[int, list[F32]] = {}
                for batch in batches_of(reader):
                    for stream, x in zip(batch.streams.tolist(), batch.x, strict=True):
                        frames.setdefault(stream, []).append(x)
                for info in reader.streams():
                    x = np.array(frames.get(info.stream, []), np.float32).reshape(-1, FEATURES)
                    self._parts.setdefault(info.name, []).append((version, info.first_seq, came.get(info.stream), x))

    def of(self, name: str) -> tuple[F32, F32, F32]:
        """The frames of a stream, its outputs and its final state."""
        frames, y = np.zeros((0, FEATURES), np.float32), list[F32]()
        state: F32 | None = None
        for version, first_seq, replayed_from, x in self._parts[name]:
            assert first_seq == len(frames), f"{name!r} has lost or repeated frames before {first_seq}"
            if replayed_from is not None:
                state = whole(version, frames[replayed_from:])[1] if replayed_from < first_seq else None
            frames = np.concatenate([frames, x])
            if len(x):
                outputs, state = whole(version, x, state)
                y.append(outputs)
        assert state is not None
        return frames, np.concatenate(y), state
