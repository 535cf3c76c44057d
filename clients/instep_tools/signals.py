"""Signals to send when there is nothing real to send: sine, noise, steps.

Every generator is a function of the frame's number: any part of a signal can be made at any time.
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


def make_signal(signal: Signal, streams: int, features: int) -> SignalPart:
    """The signal of `streams` streams of `features` numbers a frame, the same every time.

    * sine: amplitude 1, one period in 50 frames, every stream and every number of a frame at a phase of its own
    * noise: normal distribution, mean 0, standard deviation 1, independent
    * steps: a level drawn evenly from -1 to 1, held for 20 frames
    """
    make = {Signal.SINE: _sine, Signal.NOISE: _noise, Signal.STEPS: _steps}[signal]
    return lambda first, count: make(first, count, streams, features)


def _sine(first: int, count: int, streams: int, features: int) -> F32:
    time: npt.NDArray[np.float64] = np.arange(first, first + count) / SINE_PERIOD_FRAMES
    phase = (np.arange(streams) / streams)[:, None] + (np.arange(features) / features)[None, :]
    return np.sin(2 * np.pi * (time[:, None, None] + phase)).astype(np.float32)


def _noise(first: int, count: int, streams: int, features: int) -> F32:
    frames = range(first, first + count)
    return np.stack([np.random.default_rng(frame).standard_normal((streams, features), np.float32) for frame in frames])


def _steps(first: int, count: int, streams: int, features: int) -> F32:
    steps = range(first // STEP_LENGTH_FRAMES, -(-(first + count) // STEP_LENGTH_FRAMES))
    levels = np.stack([np.random.default_rng(step).uniform(-1, 1, (streams, features)) for step in steps])
    which = np.arange(first, first + count) // STEP_LENGTH_FRAMES - steps.start
    return levels[which].astype(np.float32)
