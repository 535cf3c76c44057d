from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instep.core.residency import Residency
from instep.core.typing import F32, I64
from instep.models.network import Network
from instep.runtime.state_cache import StateCache
from instep.runtime.stepper import Stepper
from instep.runtime.tiers import Tiers
from instep.runtime.warm_store import WarmStore
from tests.support.models import plain, torch_gru, whole
from tests.support.running import CPU, prepared

F, H = 5, 8
LAYERS, SIZE = 2, 3


@dataclass
class Fault:
    """Makes one copy fail, halfway through."""

    place: str = "nowhere"

    def raise_at(self, place: str) -> None:
        if place == self.place:
            raise RuntimeError(f"injected: {place}")


class FaultyCache(StateCache):
    def __init__(self, rows: int, fault: Fault) -> None:
        super().__init__(rows, LAYERS, SIZE, CPU)
        self.fault = fault

    def read(self, slots: I64) -> F32:
        self.fault.raise_at("hot read")
        return super().read(slots)

    def write(self, slots: I64, states: F32) -> None:
        half = len(slots) // 2 if self.fault.place == "hot write" else len(slots)
        super().write(slots[:half], states[:half])
        self.fault.raise_at("hot write")


class FaultyWarm(WarmStore):
    def __init__(self, max_streams: int, fault: Fault) -> None:
        super().__init__(max_streams, LAYERS, SIZE)
        self.fault = fault

    def read(self, slots: I64) -> F32:
        self.fault.raise_at("warm read")
        return super().read(slots)

    def write(self, slots: I64, states: F32) -> None:
        half = len(slots) // 2 if self.fault.place == "warm write" else len(slots)
        super().write(slots[:half], states[:half])
        self.fault.raise_at("warm write")


class Moved:
    """Tiers, and what their states ought to be."""

    def __init__(self, max_streams: int, rows: int) -> None:
        self.fault = Fault()
        self.hot = FaultyCache(rows, self.fault)
        self.tiers = Tiers(self.hot, FaultyWarm(max_streams, self.fault), Residency(max_streams, rows))
        self.everyone = np.arange(1, max_streams + 1)
        self.states = np.zeros((max_streams + 1, LAYERS, SIZE), np.float32)

    def load(self, slots: I64, states: F32 | None) -> None:
        self.states[slots] = 0.0 if states is None else states
        self.tiers.load(slots, states)

    def step(self, slots: I64) -> None:
        """What a step does: reads the batch's rows and writes something else there."""
        rows = self.tiers.make_hot(slots)
        states = self.hot.read(rows)
        np.testing.assert_array_equal(states, self.states[slots])
        self.states[slots] = states + 1 + slots[:, None, None]
        self.hot.write(rows, self.states[slots])

    def check(self) -> None:
        np.testing.assert_array_equal(self.tiers.read(self.everyone), self.states[1:])


def some(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 12), unique=True, min_size=1, max_size=count)


@given(
    st.lists(
        st.tuples(
            some(4),
            st.sampled_from(["step", "step", "zeros", "states"]),
            st.sampled_from(["nowhere", "nowhere", "hot read", "hot write", "warm read", "warm write"]),
        ),
        max_size=30,
    )
)
def test_no_state_is_mixed_up_whatever_fails(events: list[tuple[list[int], str, str]]) -> None:
    moved = Moved(12, 4)
    for turn, (chosen, event, place) in enumerate(events):
        slots = np.array(chosen)
        if event == "zeros":
            moved.load(slots, None)
        elif event == "states":
            moved.load(slots, np.full((len(slots), LAYERS, SIZE), -turn, np.float32) - slots[:, None, None])
        else:
            moved.fault.place = place
            with contextlib.suppress(RuntimeError):
                moved.tiers.make_hot(slots)
            moved.fault.place = "nowhere"
            moved.check()
            moved.step(slots)
        moved.check()


@pytest.mark.parametrize("place", ["hot read", "hot write", "warm read", "warm write"])
def test_each_copy_can_fail_and_is_made_the_next_time(place: str) -> None:
    moved = Moved(12, 4)
    moved.step(np.arange(1, 5))
    moved.fault.place = place
    with pytest.raises(RuntimeError, match=place):
        moved.tiers.make_hot(np.array([9, 2, 8]))
    moved.fault.place = "nowhere"
    moved.check()
    moved.step(np.array([9, 2, 8]))
    moved.check()


def test_a_hot_state_outlives_a_load_that_fails() -> None:
    moved = Moved(12, 4)
    moved.step(np.arange(1, 5))
    moved.fault.place = "warm write"
    with pytest.raises(RuntimeError, match="warm write"):
        moved.tiers.load(np.array([2, 3, 7, 8]), np.ones((4, LAYERS, SIZE), np.float32))
    np.testing.assert_array_equal(moved.tiers.read(np.arange(1, 5)), moved.states[1:5])


class Torn(np.ndarray[tuple[int, ...], np.dtype[np.float32]]):
    """Writes half of the rows, then raises."""

    def __setitem__(self, slots: Any, states: Any) -> None:
        self.view(np.ndarray)[slots[: len(slots) // 2]] = states[: len(slots) // 2]
        raise MemoryError


def test_what_a_torn_write_left_is_cleared() -> None:
    warm = WarmStore(4, LAYERS, SIZE)
    intact, slots = warm._states, np.array([1, 3, 4])
    warm._states = intact.view(Torn)
    with pytest.raises(MemoryError):
        warm.write(slots, np.ones((3, LAYERS, SIZE), np.float32))
    warm._states = intact
    assert warm.read(slots).any()
    warm.clear(slots)
    assert not warm.read(slots).any()


def test_moves_are_counted_and_what_is_there_already_is_not_moved() -> None:
    moved = Moved(12, 4)
    for slots, loaded, spilled in [([1, 2, 3], 3, 0), ([1, 2, 3], 3, 0), ([4, 5], 5, 1), ([4, 5, 2, 3], 5, 1)]:
        moved.step(np.array(slots))
        assert (moved.tiers.states_loaded_total, moved.tiers.states_spilled_total) == (loaded, spilled)
    assert sorted(moved.tiers.hot_slots.tolist()) == [2, 3, 4, 5]


def test_a_new_stream_of_a_slot_takes_no_row_until_it_is_stepped() -> None:
    moved = Moved(12, 4)
    moved.step(np.arange(1, 5))
    moved.load(np.array([2, 7]), None)
    assert sorted(moved.tiers.hot_slots.tolist()) == [0, 1, 3, 4]
    moved.step(np.array([9]))
    assert moved.tiers.states_spilled_total == 0
    moved.check()


def test_moved_states_keep_their_padding() -> None:
    moved = Moved(6, 2)
    for slots in ([1, 2], [3, 4], [5, 6]):
        moved.step(np.array(slots))
        rows = moved.tiers.make_hot(np.array([1]))
        assert moved.hot.read(rows).shape == (1, LAYERS, SIZE)
    assert not moved.hot.read(np.array([0])).any()
    moved.check()


def test_twenty_thousand_streams_over_a_thousand_rows_equal_their_whole_recordings(rng: np.random.Generator) -> None:
    streams, timesteps = 20_000, 5
    model = plain(F, H, layers=2)
    steps = Stepper(Network(model, CPU), prepared(model, 256).certification.buckets, streams, CPU, device_streams=1000)
    x = rng.standard_normal((timesteps, streams, F)).astype(np.float32)
    initial = rng.standard_normal((streams, 2, H)).astype(np.float32)
    initial[::3] = 0.0
    steps.load(np.arange(0, streams, 3) + 1, None)
    given_one = np.flatnonzero(np.arange(streams) % 3)
    steps.load(given_one + 1, initial[given_one])
    frames, outputs = x.reshape(-1, F), np.full((timesteps * streams, H), np.nan, np.float32)
    at = np.zeros(streams, np.int64)
    while len(left := np.flatnonzero(at < timesteps)):
        chosen = left[rng.integers(0, len(left), 256)] if len(left) > 2000 else left[:256]
        chosen = rng.permutation(np.unique(chosen))
        steps.step(chosen + 1, (at[chosen] * streams + chosen).astype(np.int32), frames, outputs)
        at[chosen] += 1
    finals = steps.read(np.arange(1, streams + 1))
    with torch.inference_mode():
        y, h = torch_gru(model)(torch.from_numpy(x), torch.from_numpy(initial).transpose(0, 1).contiguous())
    np.testing.assert_array_equal(outputs.reshape(timesteps, streams, H), y.numpy())
    np.testing.assert_array_equal(finals, h.transpose(0, 1).numpy())
    for stream in rng.integers(0, streams, 50).tolist():
        y_alone, final = whole(model, x[:, stream], initial[stream])
        np.testing.assert_array_equal(outputs.reshape(timesteps, streams, H)[:, stream], y_alone)
        np.testing.assert_array_equal(finals[stream], final)
    assert steps.tiers is not None
    assert steps.tiers.states_spilled_total == steps.tiers.states_loaded_total - 1000 > 50_000


def test_a_million_streams_are_open_and_cost_no_memory_until_they_are_stepped(rng: np.random.Generator) -> None:
    streams = 1_000_000
    model = plain(F, 128)
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    steps = Stepper(Network(model, CPU), (256,), streams, CPU, device_streams=1024)
    steps.load(np.arange(1, streams + 1), None)
    assert process.memory_info().rss - before_bytes < 0.25 * streams * 128 * 4
    chosen = rng.permutation(streams)[:4096]
    x = rng.standard_normal((2, 4096, F)).astype(np.float32)
    y = np.zeros((4096, 128), np.float32)
    for timestep in range(2):
        for batch in np.arange(4096).reshape(16, 256):
            steps.step(chosen[batch] + 1, batch.astype(np.int32), x[timestep], y)
    with torch.inference_mode():
        _, final = torch_gru(model)(torch.from_numpy(x))
    np.testing.assert_array_equal(steps.read(chosen + 1)[:, 0], final[0].numpy())
    assert not steps.read(np.setdiff1d(np.arange(streams), chosen)[:1000] + 1).any()
