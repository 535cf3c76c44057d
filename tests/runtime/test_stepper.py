import numpy as np
import pytest

from instep.core.typing import F32, I64
from instep.models.model import Model
from instep.models.recurrent.step import RecurrentStep
from instep.runtime.state_store import StateStore
from instep.runtime.stepper import Stepper
from tests.support.models import SMALL, plain, whole, with_head
from tests.support.running import CPU, prepared
from tests.support.states import floats_of, rows_of

F, H = 5, 8


def stepper(model: Model) -> Stepper:
    """With 64 slots."""
    ready = prepared(model, 64)
    return Stepper(ready.network, ready.certification.buckets, 64, CPU)


def read(steps: Stepper, slots: I64, layers: int = 1) -> F32:
    return floats_of(steps.read(slots), layers, steps.state.row_bytes // 4 // layers)


def step(steps: Stepper, slots: I64, x: F32) -> F32:
    rows = np.arange(len(slots))
    y = np.full((len(slots), steps.model.description.outputs), np.nan, np.float32)
    steps.step(slots, rows, x, y)
    return y


def test_streams_in_ever_other_batches_equal_their_whole_recording(rng: np.random.Generator) -> None:
    model = plain(F, H, layers=2)
    steps = stepper(model)
    x = rng.standard_normal((9, 20, F)).astype(np.float32)
    outputs = np.zeros((9, 20, H), np.float32)
    at = np.zeros(20, np.int64)
    while (at < 9).any():
        chosen = rng.permutation(np.flatnonzero(at < 9))[: rng.integers(1, 21)]
        outputs[at[chosen], chosen] = step(steps, chosen + 1, x[at[chosen], chosen])
        at[chosen] += 1
    for stream in range(20):
        y, final = whole(model, x[:, stream], max_batch_size=64)
        np.testing.assert_array_equal(outputs[:, stream], y)
        np.testing.assert_array_equal(read(steps, np.array([stream + 1]), 2)[0], final)


def test_every_layer_has_its_own_state(rng: np.random.Generator) -> None:
    model = plain(F, 16, layers=2)
    steps = stepper(model)  # its outputs are one of the states
    x = rng.standard_normal((3, 2, F)).astype(np.float32)
    y = np.stack([step(steps, np.array([7, 4]), frames) for frames in x])
    for stream, slot in enumerate((7, 4)):
        expected, final = whole(model, x[:, stream], max_batch_size=64)
        np.testing.assert_array_equal(y[:, stream], expected)
        np.testing.assert_array_equal(read(steps, np.array([slot]), 2)[0], final)


def test_padding_rows_touch_no_stream(rng: np.random.Generator) -> None:
    steps = stepper(SMALL)
    full = np.arange(5, 5 + steps.buckets[0])  # fills the rows that are padding later
    step(steps, full, np.ones((len(full), F), np.float32))
    everyone = np.arange(1, 65)
    steps.load(everyone, rows_of(rng.standard_normal((64, 1, H))))
    before = read(steps, everyone)
    x = rng.standard_normal((1, F)).astype(np.float32)
    step(steps, np.array([9]), x)
    after = read(steps, everyone)
    changed = np.flatnonzero((before != after).any(axis=(1, 2))) + 1
    assert changed.tolist() == [9]
    np.testing.assert_array_equal(after[8], whole(SMALL, x, before[8], max_batch_size=64)[1])


def test_what_padding_computes_never_grows(rng: np.random.Generator) -> None:
    steps = stepper(SMALL)
    for _ in range(3):
        step(steps, np.array([1]), rng.standard_normal((1, F)).astype(np.float32))
    assert not steps.read(np.array([0])).any()


def test_loading_gives_zeros_or_the_given_state(rng: np.random.Generator) -> None:
    steps = stepper(with_head(F, 10, 3))
    slots = np.array([3, 1])
    states = rng.standard_normal((2, 1, 10)).astype(np.float32)
    steps.load(slots, rows_of(states))
    np.testing.assert_array_equal(read(steps, slots), states)
    steps.load(slots[:1], None)
    assert not steps.read(slots[:1]).any()
    np.testing.assert_array_equal(read(steps, slots[1:]), states[1:])


def test_a_loading_that_raises_changes_no_state(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = stepper(SMALL)
    slots = np.arange(1, 5)
    step(steps, slots, rng.standard_normal((4, F)).astype(np.float32))
    before = steps.read(slots)

    def fails(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(StateStore, "write", fails)
    with pytest.raises(RuntimeError, match="injected"):
        steps.load(slots, rows_of(np.ones((4, 1, H))))
    np.testing.assert_array_equal(steps.read(slots), before)


def test_a_step_that_raises_changes_no_state(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = stepper(SMALL)
    slots = np.arange(1, 5)
    steps.load(slots, rows_of(rng.standard_normal((4, 1, H))))
    before = steps.read(slots)

    def fails(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(RecurrentStep, "run", fails)
        with pytest.raises(RuntimeError, match="injected"):
            step(steps, slots, np.zeros((4, F), np.float32))
    np.testing.assert_array_equal(steps.read(slots), before)


def test_buckets_are_the_smallest_that_fit() -> None:
    steps = Stepper(prepared(SMALL, 64).network, (4, 8, 48, 64), 64, CPU)
    assert [steps.bucket(size) for size in (1, 4, 5, 33, 64)] == [4, 4, 8, 48, 64]
