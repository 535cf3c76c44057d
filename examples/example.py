"""What the examples share: an example as values, files that packages ship, and serving a network to listeners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.typing import F32
from instep.demo.child_server import ChildServer
from instep.models.model import Model
from instep_client import AsyncClient

LISTENERS: Final = 4
SPEECH_RATE: Final = 16_000


class NotInstalled(Exception):
    """A package that an example takes its network or its sound from is missing."""


@dataclass(frozen=True, slots=True)
class Example:
    """A network of a package: how to serve it, and what the package itself computes."""

    make: Callable[[Path], Model]
    """Writes the model folder."""
    sound: Callable[[], F32]
    """A recording that a package ships, [samples]."""
    frames: Callable[[F32], F32]
    """What a client sends for a sound, [frames, features]."""
    finish: Callable[[F32], F32]
    """What a client makes of the answers to a sound's frames, [frames, outputs]."""
    own: Callable[[F32], F32]
    """The same by the package's own code, of a whole sound."""
    hop: int
    """Samples per frame."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the listeners have received, one array each, and what the package computes."""

    exactness: str
    """What the server says of the network's bits: `exact` on a CPU."""
    received: list[F32]
    own: list[F32]

    @property
    def difference(self) -> float:
        """The largest difference between what was received and what the package computes."""
        return max(float(np.abs(ours - own).max()) for ours, own in zip(self.received, self.own, strict=True))


def shipped(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        NotInstalled: saying what to install.
    """
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise _not_installed(package) from None


def read_sound(file: Path) -> F32:
    """A file of sound, [samples], or [samples, channels] if it has several.

    Raises:
        NotInstalled: without soundfile.
    """
    try:
        from soundfile import read
    except ModuleNotFoundError:
        raise _not_installed("soundfile") from None
    sound: F32 = read(file, dtype="float32")[0]
    return sound


def _not_installed(package: str) -> NotInstalled:
    return NotInstalled(f"{package} is not installed; examples/README.md says how to install what the examples need")


def sounds_of_listeners(example: Example, sound: F32) -> list[F32]:
    """What each listener hears of a sound: all of it, or from a later moment on."""
    late = len(sound) // example.hop // (2 * LISTENERS) * example.hop
    return [sound[number * late :] for number in range(LISTENERS)]


def serving(folder: Path, recording: Path) -> ChildServer:
    """A server of a model folder that records, for a `with` statement."""
    return ChildServer(folder, ["--record", str(recording)])


def heard_through_a_server(example: Example, sound: F32, folder: Path, recording: Path) -> Comparison:
    """Serve a model folder to listeners who all hear one sound, each from another moment on.

    Each is a client of its own, and sends one frame at a time. All of them are connected at once.
    """
    sounds = sounds_of_listeners(example, sound)
    with serving(folder, recording) as server:
        answers = asyncio.run(_listen(server.endpoint, [example.frames(heard) for heard in sounds]))
    return Comparison(
        exactness=str(server.started["exactness"]),
        received=[example.finish(each) for each in answers],
        own=[example.own(heard) for heard in sounds],
    )


async def _listen(endpoint: str, sent: list[F32]) -> list[F32]:
    async def listener(number: int, frames: F32) -> F32:
        async with AsyncClient(endpoint) as client:
            stream = await client.open(f"listener-{number}")
            return np.stack([await stream.step(frame) for frame in frames])

    return await asyncio.gather(*(listener(number, frames) for number, frames in enumerate(sent)))


@cache
def speech() -> F32:
    """Thirty seconds of a conversation on the telephone, 16,000 samples a second."""
    return read_sound(shipped("pyannote.audio", "pyannote/audio/sample/sample.wav"))
