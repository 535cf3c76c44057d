"""Signals to send when there is nothing real to send: sine, noise, steps.

Every generator is a function of the frame's number: any part of a signal can be made at any time, and the same seed
gives the same frames.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32


class Signal(StrEnum):
    """The signals that can be made."""

    SINE = "sine"
    NOISE = "noise"
    STEPS = "steps"


SINE_PERIOD_FRAMES = 50
STEP_LENGTH_FRAMES = 20

SignalPart = Callable[[int, int], F32]
"""Frames `first` to `first + count - 1` of every stream: float32 [count, streams, features]."""


def make_signal(signal: Signal, streams: int, features: int, seed: int = 0) -> SignalPart:
    """The signal of `streams` streams of `features` numbers a frame.

    * sine: amplitude 1, one period in 50 frames, every stream and every number of a frame at a phase of its own
    * noise: normal distribution, mean 0, standard deviation 1, independent
    * steps: a level drawn evenly from -1 to 1, held for 20 frames
    """
    match signal:
        case Signal.SINE:
            return lambda first, count: _sine(first, count, streams, features)
        case Signal.NOISE:
            return lambda first, count: _noise(first, count, streams, features, seed)
        case Signal.STEPS:
            return lambda first, count: _steps(first, count, streams, features, seed)


def _sine(first: int, count: int, streams: int, features: int) -> F32:
    time: npt.NDArray[np.float64] = np.arange(first, first + count) / SINE_PERIOD_FRAMES
    phase = (np.arange(streams) / streams)[:, None] + (np.arange(features) / features)[None, :]
    return np.sin(2 * np.pi * (time[:, None, None] + phase)).astype(np.float32)


def _noise(first: int, count: int, streams: int, features: int, seed: int) -> F32:
    frames = range(first, first + count)
    return np.stack([_random(seed, frame).standard_normal((streams, features), np.float32) for frame in frames])


def _steps(first: int, count: int, streams: int, features: int, seed: int) -> F32:
    steps = range(first // STEP_LENGTH_FRAMES, -(-(first + count) // STEP_LENGTH_FRAMES))
    levels = np.stack([_random(seed, step).uniform(-1, 1, (streams, features)) for step in steps])
    which = np.arange(first, first + count) // STEP_LENGTH_FRAMES - steps.start
    return levels[which].astype(np.float32)


def _random(seed: int, part: int) -> np.random.Generator:
    return np.random.default_rng([seed, part])
