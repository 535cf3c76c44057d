"""Certification: which batch sizes give a frame the same bits, found by trying them on this machine.

torch promises none of this, so it is measured at start. Probe rows, each a random frame with a random state, go through
every candidate bucket: at every position, beside hostile neighbours (NaN, infinity, huge values), beside other probes,
and above rows of padding. A bucket in which one probe got two answers is out. Of the others, those that give every
probe the same bits belong together. Before that the fused step is compared with torch's, over as many rows in a small
bucket as in a large one; after it, whole sequences in one call with stepping.

It is a measurement, not a proof: it notices every difference that these rows show, in any bit of any output or state.
Its numbers are seeded, so a start repeats what the last one found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import torch

from instep.core.typing import F32, I64
from instep.models.network import Network
from instep.models.ulp import ulp_distance

Exactness: TypeAlias = Literal["exact", "tolerance", "off"]

_SIZES: Final = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_HOSTILE: Final = (math.nan, math.inf, 1e30, -math.inf, -1e30)
_PADDING: Final = 0.0
_MULTIPLY_ADDS: Final = 3_000_000_000
"""About how much each part, buckets and sequences, may compute where the floors below do not ask for more: 0.1 to 0.2 s
of one core. The fused step is compared over fewer rows than the buckets."""
_ENOUGH_PROBES: Final = 512
_LEAST_ELEMENTS: Final = 4096
"""The least probes times hidden units: a kernel that differs shows in some of so many values."""
_LEAST_PROBES: Final = (8, 1024)
"""Bounds of what `_LEAST_ELEMENTS` asks for."""
_LONGEST_SEQUENCE: Final = 256
_SHORTEST_SEQUENCE: Final = 4
_SEQUENCE_ROWS: Final = 64


@dataclass(frozen=True)
class Certification:
    """What holds for a network's bits on this machine.

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
    """Whether `Network.sequence`, over as many rows as a bucket has, gives the bits of `Network.step`. False unless
    `exact`."""


def candidate_buckets(network: Network, max_batch_size: int) -> tuple[int, ...]:
    """Batch sizes worth certifying, ascending; the last is `max_batch_size` rounded up to the smallest bucket."""
    smallest = network.smallest_bucket
    last = -(-max_batch_size // smallest) * smallest
    return (*(size for size in _SIZES if size % smallest == 0 and size < last), last)


@torch.inference_mode()
def certify(network: Network, candidates: Sequence[int]) -> Certification:
    """Try every candidate (ascending, multiples of `network.smallest_bucket`), and whole sequences.

    Keeps the largest group of buckets that agree, but rather a smaller group than less than half the largest batch.
    Where no bucket agrees even with itself, all candidates stay, under `tolerance`.

    The network steps with `FusedGru` from here on where that gave the bits of `torch.gru` in every candidate. (What
    they agree in may still depend on the bucket: the rest is found out with whichever is used.)
    """
    count = _probe_count(network, candidates)
    network.uses_fused = network.may_fuse and all(_fused_is_same(network, bucket, count) for bucket in candidates)
    probes = _Probes(network, count)
    results = {bucket: probes.through(bucket) for bucket in candidates}
    groups: dict[bytes, list[int]] = {}
    for bucket, result in results.items():
        if result.spread == 0:
            groups.setdefault(result.answers.tobytes(), []).append(bucket)
    if groups:
        buckets = max(groups.values(), key=lambda group: (2 * group[-1] >= candidates[-1], len(group), group[-1]))
        stepping_ulp = 0
    else:
        buckets = list(candidates)
        reference = results[buckets[-1]].answers
        stepping_ulp = max(max(result.spread, _distance(result.answers, reference)) for result in results.values())
    sequence_ulp = _sequence_distance(network, buckets)
    return Certification(
        exactness="exact" if groups else "tolerance",
        buckets=tuple(buckets),
        max_ulp=max(stepping_ulp, sequence_ulp),
        whole_sequence=bool(groups) and sequence_ulp == 0,
    )


def _fused_is_same(network: Network, bucket: int, count: int) -> bool:
    """Whether both steps give at least `count` rows, in ever other batches of this size, the same bits."""
    random = np.random.default_rng(2)
    for _ in range(0, count, bucket):
        x = torch.from_numpy(_random_frames(network, random, bucket)).to(network.device)
        before = torch.from_numpy(_random_states(network, random, bucket)).to(network.device)
        answers = []
        for fused in (False, True):
            network.uses_fused = fused
            h = before.clone()
            answers.append(_joined(network, network.advance(x, h), h))
        if _distance(*answers) != 0:
            return False
    return True


@dataclass(frozen=True)
class _Result:
    answers: F32
    """One answer of every probe: output and states in one row."""
    spread: int
    """The largest distance, in ULP, between two answers to one probe."""


class _Probes:
    """Rows whose answers are compared, and the rows that are put beside them."""

    def __init__(self, network: Network, count: int) -> None:
        self._network = network
        self._count = count
        random = np.random.default_rng(0)
        x, h = _random_frames(network, random, count), _random_states(network, random, count)
        beside = np.array([*_HOSTILE, _PADDING], np.float32)[:, None]
        beside_x = np.broadcast_to(beside, (len(beside), network.input_width))
        beside_h = np.broadcast_to(beside, (network.state_layers, len(beside), network.state_width))
        self._x = torch.from_numpy(np.concatenate([x, beside_x])).to(network.device)
        self._h = torch.from_numpy(np.concatenate([h, beside_h], axis=1)).to(network.device)
        self._padding = count + len(_HOSTILE)

    def through(self, bucket: int) -> _Result:
        """Step every probe at least twice in this bucket, at two positions, beside other rows."""
        indices, rows = [], []
        for batch in self._batches(bucket):
            index = torch.from_numpy(batch).to(self._network.device)
            y, h = self._network.step(self._x.index_select(0, index), self._h.index_select(1, index))
            is_probe = batch < self._count
            indices.append(batch[is_probe])
            rows.append(_joined(self._network, y, h)[is_probe])
        seen, answered = np.concatenate(indices), np.concatenate(rows)
        answers = np.zeros((self._count, answered.shape[1]), np.float32)
        answers[seen] = answered
        return _Result(answers, _distance(answered, answers[seen]))

    def _batches(self, bucket: int) -> Iterator[I64]:
        position = np.arange(bucket)
        for block, start in enumerate(range(0, self._count, bucket)):
            probes = (start + position) % self._count
            hostile = self._count + (block + position // 2) % len(_HOSTILE)
            yield np.where(position % 2 == 0, probes, hostile)
            yield np.where(position % 2 == 1, probes, hostile)
            yield np.roll(probes, bucket // 2 + 1)
        yield np.where(position < bucket // 2, position % self._count, self._padding)


def _sequence_distance(network: Network, buckets: Sequence[int]) -> int:
    """Between whole sequences and stepping: long ones over few and some rows, a short one over the most."""
    some = max((bucket for bucket in buckets if bucket <= _SEQUENCE_ROWS), default=buckets[0])
    steps = {buckets[-1]: _SHORTEST_SEQUENCE}
    for rows in (buckets[0], some):
        affordable = _MULTIPLY_ADDS // (4 * rows * _multiply_adds(network))
        steps[rows] = min(max(affordable, _SHORTEST_SEQUENCE), _LONGEST_SEQUENCE)
    return max(_one_sequence_distance(network, rows, count) for rows, count in steps.items())


def _one_sequence_distance(network: Network, rows: int, steps: int) -> int:
    random = np.random.default_rng(1)
    x = torch.from_numpy(_random_frames(network, random, steps * rows)).to(network.device).view(steps, rows, -1)
    h = torch.from_numpy(_random_states(network, random, rows)).to(network.device)
    whole_y, whole_h = network.sequence(x, h)
    outputs = []
    for frame in x:
        y, h = network.step(frame, h)
        outputs.append(y[:, : network.outputs])
    return max(
        _distance(whole_y[:, :, : network.outputs].cpu().numpy(), torch.stack(outputs).cpu().numpy()),
        _distance(whole_h.cpu().numpy(), h.cpu().numpy()),
    )


def _random_frames(network: Network, random: np.random.Generator, count: int) -> F32:
    """Frames [count, input_width] of several magnitudes, zero where padded."""
    x = np.zeros((count, network.input_width), np.float32)
    scale = random.choice([0.1, 1, 1, 5], (count, 1))
    x[:, : network.features] = scale * random.standard_normal((count, network.features))
    return x


def _random_states(network: Network, random: np.random.Generator, count: int) -> F32:
    """States [L, count, state_width] of several magnitudes, some all zero, zero where padded."""
    h = np.zeros((network.state_layers, count, network.state_width), np.float32)
    scale = random.choice([0, 0.1, 1, 1], (count, 1))
    h[:, :, : network.state_size] = scale * random.uniform(-1, 1, (network.state_layers, count, network.state_size))
    return h


def _joined(network: Network, y: torch.Tensor, h: torch.Tensor) -> F32:
    """Outputs and states as one row a frame, on the CPU."""
    joined: F32 = torch.cat([y[:, : network.outputs], h.transpose(0, 1).flatten(1)], dim=1).cpu().numpy()
    return joined


def _distance(one: F32, other: F32) -> int:
    if np.array_equal(one.view(np.int32), other.view(np.int32)):
        return 0
    return int(ulp_distance(one, other).max())


def _probe_count(network: Network, candidates: Sequence[int]) -> int:
    affordable = _MULTIPLY_ADDS // (3 * len(candidates) * _multiply_adds(network))
    fewest, most = _LEAST_PROBES
    least = min(max(-(-_LEAST_ELEMENTS // network.state_size), fewest), most)
    return max(min(affordable, _ENOUGH_PROBES), least)


def _multiply_adds(network: Network) -> int:
    """Of one row in one step."""
    return sum(math.prod(shape) for shape in network.description.tensor_shapes().values() if len(shape) == 2)
