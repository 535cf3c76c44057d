from __future__ import annotations

import numpy as np
import pytest

from instep_tools.signals import SINE_PERIOD_FRAMES, STEP_LENGTH_FRAMES, Signal, make_signal


@pytest.mark.parametrize("signal", list(Signal))
def test_any_part_equals_the_same_part_of_the_whole(signal: Signal) -> None:
    part = make_signal(signal, streams=3, features=2)
    whole = part(0, 300)
    assert whole.shape == (300, 3, 2)
    assert whole.dtype == np.float32
    for first, count in [(0, 1), (63, 2), (64, 64), (19, 42), (299, 1)]:
        np.testing.assert_array_equal(part(first, count), whole[first : first + count])


@pytest.mark.parametrize("signal", list(Signal))
def test_streams_and_features_differ(signal: Signal) -> None:
    whole = make_signal(signal, streams=4, features=3)(0, 100).reshape(100, 12)
    assert len(np.unique(whole, axis=1).T) == 12


def test_a_sine_is_a_sine() -> None:
    wave = make_signal(Signal.SINE, 1, 1)(0, 2 * SINE_PERIOD_FRAMES)[:, 0, 0]
    assert wave[0] == 0
    np.testing.assert_allclose(wave[:SINE_PERIOD_FRAMES], wave[SINE_PERIOD_FRAMES:], atol=1e-6)
    assert 0.99 < wave.max() <= 1
    assert np.isclose(wave[SINE_PERIOD_FRAMES // 10], np.sin(2 * np.pi / 10), atol=1e-6)


def test_noise_is_normal() -> None:
    noise = make_signal(Signal.NOISE, 10, 10)(0, 1000)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01


def test_steps_hold_their_level() -> None:
    levels = make_signal(Signal.STEPS, 1, 1)(0, 10 * STEP_LENGTH_FRAMES)[:, 0, 0].reshape(10, STEP_LENGTH_FRAMES)
    assert (levels == levels[:, :1]).all()
    assert len(np.unique(levels)) == 10
    assert (np.abs(levels) <= 1).all()
