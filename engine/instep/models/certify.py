"""Certification: which batch sizes give a frame the same bits, found by trying them on this machine.

torch promises none of this, so it is measured at start. Probe rows, each a random frame with a random state, go through
every candidate bucket: at every position, beside hostile neighbours (NaN, infinity, huge values), beside other probes,
and above rows of padding. A bucket in which one probe got two answers is out. Of the others, those that give every
probe the same bits belong together. Before that the model chooses how it steps (`RecurrentModel.select_step`); after
it, whole sequences in one call are compared with stepping.

It is a measurement, not a proof: it notices every difference that these rows show, in any bit of any output or state.
Its numbers are seeded, so a start repeats what the last one found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import BoundStep, RecurrentModel, StateSpec
from instep.models.errors import ModelError, is_no_memory
from instep.models.stepping import (
    answers_of,
    random_frames,
    random_states,
    split_answers,
    step_batches,
    step_frames,
    step_rows,
)
from instep.models.ulp import NOT_COMPARABLE, ulp_distance

Exactness: TypeAlias = Literal["exact", "tolerance", "off"]

_SIZES: Final = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_HOSTILE: Final = (math.nan, math.inf, 1e30, -math.inf, -1e30)
_PADDING: Final = 0.0
_MULTIPLY_ADDS: Final = 3_000_000_000
"""About how much each part, buckets and sequences, may compute where the floors below do not ask for more: 0.1 to 0.2 s
of one core."""
_ENOUGH_PROBES: Final = 512
_LEAST_ELEMENTS: Final = 4096
"""The least probes times values of a state: a kernel that differs shows in some of that many values."""
_MOST_LEAST_PROBES: Final = 1024
"""No more than these for `_LEAST_ELEMENTS`."""
_WARM_STEPS: Final = 8
"""How many frames the states that are reached by stepping have behind them at most."""
_LONGEST_SEQUENCE: Final = 256
_SHORTEST_SEQUENCE: Final = 4
_SEQUENCE_ROWS: Final = 64


@dataclass(frozen=True)
class Certification:
    """The result of certifying a network on this machine.

    `buckets` is ascending and never empty: a batch of up to `buckets[-1]` rows can be run, padded to the first bucket
    that takes it, and no larger batch may be. Under `exact`, a frame's output and new state have the same bits in each
    of them. Where larger candidates did not agree, `buckets[-1]` is below the `max_batch_size` asked for.
    """

    exactness: Exactness
    buckets: tuple[int, ...]
    max_ulp: int
    """The largest distance measured between two answers that ought to be equal; 0 when `exact` and `whole_sequence`.
    Not a bound: other frames and longer streams may differ more."""
    whole_sequence: bool
    """Whether `RecurrentModel.sequence`, over as many rows as a bucket has, gives the bits of stepping. False unless
    `exact`, and where the model has no such call."""


def candidate_buckets(model: RecurrentModel, max_batch_size: int) -> tuple[int, ...]:
    """Batch sizes worth certifying, ascending; the last is `max_batch_size` rounded up to the model's row multiple."""
    multiple = model.row_multiple
    last = -(-max_batch_size // multiple) * multiple
    return (*(size for size in _SIZES if size % multiple == 0 and size < last), last)


@torch.inference_mode()
def certify(model: RecurrentModel, candidates: Sequence[int]) -> Certification:
    """Try every candidate (ascending, multiples of `model.row_multiple`), and whole sequences.

    Keeps the largest group of buckets that agree, but rather a smaller group than less than half the largest batch.
    Where no bucket agrees even with itself, all candidates stay, under `tolerance`.

    What the model chose in `select_step` stays chosen.

    Raises:
        ModelError: when there is no memory for a step of the largest batch.
    """
    try:
        return _certify(model, candidates)
    except (MemoryError, RuntimeError) as error:
        if not is_no_memory(error):
            raise
        raise ModelError(
            f"no memory to step {model.description.in_words()} in batches of up to {candidates[-1]}: make the model "
            "smaller, or lower engine.max_batch_size"
        ) from None


def _certify(model: RecurrentModel, candidates: Sequence[int]) -> Certification:
    count = _probe_count(model, candidates)
    model.select_step(candidates, count)
    steps = {bucket: model.bind(bucket) for bucket in candidates}
    probes = Probes(model, count, steps)
    results = {bucket: probes.through(bucket, step) for bucket, step in steps.items()}
    groups: dict[bytes, list[int]] = {}
    for bucket, (answers, spread) in results.items():
        if spread == 0:
            groups.setdefault(answers.tobytes(), []).append(bucket)
    if groups:
        buckets = max(groups.values(), key=lambda group: (2 * group[-1] >= candidates[-1], len(group), group[-1]))
        stepping_ulp = 0
    else:
        buckets = list(candidates)
        reference, _ = results[buckets[-1]]
        stepping_ulp = max(
            max(spread, _distance(model.state, answers, reference)) for answers, spread in results.values()
        )
    sequence_ulp = sequence_distance(model, {bucket: steps[bucket] for bucket in buckets})
    return Certification(
        exactness="exact" if groups else "tolerance",
        buckets=tuple(buckets),
        max_ulp=max(stepping_ulp, sequence_ulp or 0),
        whole_sequence=bool(groups) and sequence_ulp == 0,
    )


class Probes:
    """Probe rows, whose answers are compared, and the rows beside them in a batch.

    Attributes:
        count: the number of probe rows.
    """

    def __init__(self, model: RecurrentModel, count: int, steps: Mapping[int, BoundStep]) -> None:
        self._model = model
        self.count = count
        features, state = model.description.features, model.state
        random = np.random.default_rng(0)
        beside = np.array([*_HOSTILE, _PADDING], np.float32)
        x = np.repeat(beside[:, None], features, axis=1)
        self._x = np.concatenate([random_frames(features, random, count), x])
        reached = _reached_states(model, random, count // 2, steps)
        drawn = random_states(state, random, count - len(reached), reached)
        self._state = np.concatenate([drawn, reached, _constant_states(state, beside)])
        self._padding = count + len(_HOSTILE)

    def through(self, bucket: int, step: BoundStep) -> tuple[U8, int]:
        """Step every probe at least twice in this bucket, at two positions, beside other rows.

        Returns:
            One answer for every probe, as `answers_of`, and the largest distance, in ULP, between two answers to one.
        """
        spec, outputs = self._model.state, self._model.description.outputs
        batches = self.batches(bucket)
        answered = step_batches(step, spec, self._x, self._state, batches, outputs)
        is_probe = batches.ravel() < self.count
        seen, answered = batches.ravel()[is_probe], answered[is_probe]
        answers = np.zeros((self.count, answered.shape[1]), np.uint8)
        answers[seen] = answered
        return answers, _distance(spec, answered, answers[seen])

    def batches(self, bucket: int) -> I64:
        """The rows of each batch, [K, bucket]: those below `count` are probes, the others are only beside them."""
        position = np.arange(bucket)
        starts = np.arange(0, self.count, bucket)[:, None]
        probes = (starts + position) % self.count
        hostile = self.count + (starts // bucket + position // 2) % len(_HOSTILE)
        at_even = np.where(position % 2 == 0, probes, hostile)
        at_odd = np.where(position % 2 == 1, probes, hostile)
        moved = np.roll(probes, bucket // 2 + 1, axis=1)
        above_padding = np.where(position < bucket // 2, position % self.count, self._padding)
        return np.concatenate([at_even, at_odd, moved, above_padding[None]])


def sequence_distance(model: RecurrentModel, steps: Mapping[int, BoundStep]) -> int | None:
    """Between whole sequences and stepping: long ones over few and some rows, a short one over the most.

    None where the model has no whole-sequence call.
    """
    buckets = list(steps)
    some = max((bucket for bucket in buckets if bucket <= _SEQUENCE_ROWS), default=buckets[0])
    lengths = {buckets[-1]: _SHORTEST_SEQUENCE}
    for rows in (buckets[0], some):
        affordable = _MULTIPLY_ADDS // (4 * rows * model.multiply_adds)
        lengths[rows] = min(max(affordable, _SHORTEST_SEQUENCE), _LONGEST_SEQUENCE)
    found = [_one_sequence_distance(model, steps[rows], rows, count) for rows, count in lengths.items()]
    return max((distance for distance in found if distance is not None), default=None)


def _one_sequence_distance(model: RecurrentModel, step: BoundStep, rows: int, length: int) -> int | None:
    random = np.random.default_rng(1)
    features, outputs = model.description.features, model.description.outputs
    x = random_frames(features, random, length * rows).reshape(length, rows, features)
    state = random_states(model.state, random, rows, model.state.initial(1))
    whole = model.sequence(x, state)
    if whole is None:
        return None
    ways = (whole, step_frames(step, model.state, x, state, outputs))
    return _distance(model.state, *(answers_of(y.swapaxes(0, 1), after) for y, after in ways))


def _reached_states(
    model: RecurrentModel, random: np.random.Generator, count: int, steps: Mapping[int, BoundStep]
) -> U8:
    """States that streams have after 1 to `_WARM_STEPS` frames, in which leaves fit together as drawn ones do not."""
    bucket = max((bucket for bucket in steps if bucket <= count), default=min(steps))
    step, found = steps[bucket], [model.state.initial(0)]
    for start in range(0, count, bucket):
        rows = model.state.initial(bucket)
        reached = rows.copy()
        for behind in range(_WARM_STEPS):
            x = random_frames(model.description.features, random, bucket)
            _, rows = step_rows(step, model.state, x, rows, model.description.outputs)
            reached[behind::_WARM_STEPS] = rows[behind::_WARM_STEPS]
        found.append(reached[: count - start])
    return np.concatenate(found)


def _constant_states(spec: StateSpec, values: F32) -> U8:
    """A state for each value, with that value in all floats; integers and bools as at first."""
    rows = spec.initial(len(values))
    for leaf in spec.unpack(rows).values():
        if leaf.dtype.kind == "f":
            leaf[...] = values.reshape(-1, *[1] * (leaf.ndim - 1))
    return rows


def _distance(spec: StateSpec, one: U8, other: U8) -> int:
    """The largest in ULP, of `answers_of`; leaves that are not float32 are equal or not comparable."""
    if np.array_equal(one, other):
        return 0
    (y, leaves), (other_y, others) = (split_answers(spec, each) for each in (one, other))
    distances = [int(ulp_distance(y, other_y).max())]
    for name, leaf in leaves.items():
        if leaf.dtype == np.float32:
            distances.append(int(ulp_distance(leaf, others[name]).max()))
        elif leaf.tobytes() != others[name].tobytes():
            distances.append(NOT_COMPARABLE)
    return max(distances)


def _probe_count(model: RecurrentModel, candidates: Sequence[int]) -> int:
    steps_per_probe = 3 * len(candidates) + _WARM_STEPS // 2
    affordable = _MULTIPLY_ADDS // (steps_per_probe * model.multiply_adds)
    values = sum(leaf.elements for leaf in model.state.leaves)
    least = max(min(-(-_LEAST_ELEMENTS // values), _MOST_LEAST_PROBES), model.least_probes)
    return max(min(affordable, _ENOUGH_PROBES), least)
