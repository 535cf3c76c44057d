from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import pytest
import torch

from instep.core.typing import F32, U8
from instep.models.certify import Certification, candidate_buckets, certify
from instep.models.folder import make_model
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from instep.models.recurrent.network import RecurrentNetwork
from instep.models.recurrent.step import RecurrentStep
from tests.support.models import in_one_call, stepped

CPU = torch.device("cpu")
CANDIDATES = (4, 8, 16, 24, 32, 48, 64)

PLAIN = GruDescription(features=5, gru=GruLayers(hidden_size=16, num_layers=2))
DENSE = GruDescription(features=5, gru=GruLayers(hidden_size=7), after=(DenseLayer(size=3, activation="sigmoid"),))

Tamper: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Changes y and h' in place, given x and h."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Tampered(RecurrentNetwork):
    """A network whose steps, sequences, or both are changed; counts the rows it steps.

    In place of the GRU it computes something whose rows have the same bits in every batch size, on every CPU: products
    and sums of single elements, each rounded by itself.
    """

    def __init__(self, description: GruDescription, step: Tamper | None = None, sequence: Tamper | None = None) -> None:
        super().__init__(make_model(description, "random", name="tampered", seed=1), CPU)
        self._tamper_step, self._tamper_sequence = step, sequence
        self.rows: dict[int, int] = {}
        self.sequences: list[tuple[int, int]] = []

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """It has one step."""

    def bind(self, rows: int) -> RecurrentStep:
        return TamperedStep(self, super().bind(rows), rows)  # type: ignore[return-value]

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8]:
        h = torch.from_numpy(self.state.unpack(state)["h"].copy())
        y = np.zeros((*x.shape[:2], self.description.outputs), np.float32)
        for frames, outputs in zip(torch.from_numpy(x), y, strict=True):
            h = in_place_of_the_gru(frames, h)
            outputs[:] = h[:, -1]
        after = self.state.pack({"h": h.numpy()})
        self.sequences.append(x.shape[:2])
        if self._tamper_sequence is not None:
            before, after_h = (torch.from_numpy(self.state.unpack(rows)["h"].swapaxes(0, 1)) for rows in (state, after))
            self._tamper_sequence(torch.from_numpy(y), after_h, torch.from_numpy(x), before)
        return y, after


class TamperedStep:
    """A step that does not work in place."""

    def __init__(self, network: Tampered, step: RecurrentStep, rows: int) -> None:
        self._network, self._rows = network, rows
        self.x, self.state = step.x, {"h": torch.zeros_like(step.state["h"])}
        self.y, self.new_state = torch.zeros_like(step.y), {"h": torch.zeros_like(step.state["h"])}

    def run(self) -> None:
        network = self._network
        network.rows[self._rows] = network.rows.get(self._rows, 0) + self._rows
        in_place_of_the_gru(self.x, self.state["h"], out=self.new_state["h"])
        self.y.copy_(self.new_state["h"][:, -1])
        if network._tamper_step is not None:
            after, before = (state["h"].transpose(0, 1) for state in (self.new_state, self.state))
            network._tamper_step(self.y, after, self.x, before)


def in_place_of_the_gru(x: torch.Tensor, h: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Frames [B, features] and states [B, layers, hidden] to new states."""
    return torch.mul(h, 0.5, out=out).add_(x[:, :1, None] * 0.25)


def nudge(values: torch.Tensor) -> None:
    """To the next float32 above, in place; NaN stays."""
    values.copy_(torch.nextafter(values, torch.tensor(torch.inf)))


def nudge_at(bucket: int, position: int, element: int, in_state: bool) -> Tamper:
    def tamper(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
        if len(x) == bucket:
            nudge(after[1, position, element : element + 1] if in_state else y[position, element : element + 1])

    return tamper


@pytest.mark.parametrize(
    ("size", "dense", "expected"),
    [
        (256, False, (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)),
        (100, False, (4, 8, 16, 24, 32, 48, 64, 96, 100)),
        (97, False, (4, 8, 16, 24, 32, 48, 64, 96, 100)),
        (96, False, (4, 8, 16, 24, 32, 48, 64, 96)),
        (1, False, (4,)),
        (5, False, (4, 8)),
        (1, True, (32,)),
        (33, True, (32, 64)),
        (256, True, (32, 64, 96, 128, 192, 256)),
        (1000, True, (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)),
    ],
)
def test_candidates(size: int, dense: bool, expected: tuple[int, ...]) -> None:
    assert candidate_buckets(Tampered(DENSE if dense else PLAIN), size) == expected


def test_the_largest_batch_size_has_few_candidates() -> None:
    candidates = candidate_buckets(Tampered(PLAIN), 4096)
    assert candidates[-1] == 4096
    assert len(candidates) < 20


def test_where_no_bit_ever_differs_all_candidates_are_exact() -> None:
    assert certify(Tampered(PLAIN), CANDIDATES) == Certification("exact", CANDIDATES, 0, True)


@pytest.mark.parametrize("description", [PLAIN, DENSE], ids=["plain", "dense"])
def test_what_is_certified_holds_for_other_rows(description: GruDescription, rng: np.random.Generator) -> None:
    network = RecurrentNetwork(make_model(description, "random", name="n", seed=1), CPU)
    found = certify(network, candidate_buckets(network, 96))
    smallest, count = found.buckets[0], 4 * found.buckets[-1]
    x = rng.standard_normal((6, count, 5)).astype(np.float32)
    h = rng.uniform(-1, 1, (description.gru.num_layers, count, description.gru.hidden_size)).astype(np.float32)

    def answers(bucket: int) -> F32:
        """In batches of this size; the last one overlaps the one before it."""
        y = np.zeros((6, count, description.outputs), np.float32)
        for first in range(0, count, bucket):
            rows = slice(min(first, count - bucket), min(first, count - bucket) + bucket)
            y[:, rows], _ = stepped(network, x[:, rows], h[:, rows])
        return y

    expected = answers(smallest)
    for bucket in found.buckets:
        if found.exactness == "exact":
            assert answers(bucket).tobytes() == expected.tobytes()
        if found.whole_sequence:
            y, _ = in_one_call(network, np.ascontiguousarray(x[:, :bucket]), h[:, :bucket])
            assert y.tobytes() == expected[:, :bucket].tobytes()


@pytest.mark.parametrize(
    ("bucket", "position", "element", "in_state"),
    [
        (4, 0, 0, False),
        (4, 3, 7, True),
        (8, 4, 0, True),
        (24, 13, 5, False),
        (32, 31, 7, False),
        (48, 16, 0, False),
        (64, 0, 2, True),
        (64, 37, 7, False),
        (64, 63, 3, True),
    ],
)
def test_one_ulp_at_one_place_of_one_bucket_drops_that_bucket(
    bucket: int, position: int, element: int, in_state: bool
) -> None:
    network = Tampered(PLAIN, step=nudge_at(bucket, position, element, in_state))
    rest = tuple(size for size in CANDIDATES if size != bucket)
    assert certify(network, CANDIDATES) == Certification("exact", rest, 0, True)


@pytest.mark.parametrize("bucket", [4, 24, 64])
def test_a_bucket_with_other_bits_throughout_is_dropped_in_favour_of_the_rest(bucket: int) -> None:
    network = grouped(lambda rows: rows == bucket)
    assert certify(network, CANDIDATES).buckets == tuple(size for size in CANDIDATES if size != bucket)


def grouped(group_of: Callable[[int], int]) -> Tampered:
    def tamper(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
        for _ in range(group_of(len(x))):
            nudge(y)

    return Tampered(PLAIN, step=tamper)


def test_the_largest_group_that_agrees_stays() -> None:
    assert certify(grouped(lambda rows: rows >= 24), CANDIDATES).buckets == (24, 32, 48, 64)
    assert certify(grouped(lambda rows: rows >= 48), CANDIDATES).buckets == (4, 8, 16, 24, 32)


def test_but_never_for_less_than_half_the_largest_batch() -> None:
    assert certify(grouped(lambda rows: rows >= 32), CANDIDATES).buckets == (32, 48, 64)
    alone = certify(grouped(CANDIDATES.index), CANDIDATES)
    assert (alone.exactness, alone.buckets) == ("exact", (64,))


def leak_of_a_neighbour(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    neighbour = x.roll(1, 0)[:, :1]
    y += torch.where(neighbour.abs() < 100, neighbour * 1e-6, 0)


def leak_of_nan(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    if bool(x[:-1].isnan().any()):
        nudge(after[:, -1])


def leak_of_huge_states(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    if bool((h == 1e30).any()):
        nudge(y)


def leak_of_padding(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    if not bool(x[-1].any()):
        nudge(y)


LEAKS = [leak_of_a_neighbour, leak_of_nan, leak_of_huge_states, leak_of_padding]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_network_whose_rows_feel_each_other_is_not_exact(leak: Tamper) -> None:
    result = certify(Tampered(PLAIN, step=leak), CANDIDATES)
    assert (result.exactness, result.buckets, result.whole_sequence) == ("tolerance", CANDIDATES, False)
    assert result.max_ulp > 0


@pytest.mark.parametrize("leak", LEAKS)
def test_a_bucket_whose_rows_feel_each_other_is_dropped(leak: Tamper) -> None:
    def tamper(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
        if len(x) == 32:
            leak(y, after, x, h)

    assert certify(Tampered(PLAIN, step=tamper), CANDIDATES).buckets == (4, 8, 16, 24, 48, 64)


def test_bits_that_depend_on_the_position_in_every_bucket_are_not_exact() -> None:
    def tamper(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
        nudge(y[len(y) // 2 :])

    assert certify(Tampered(PLAIN, step=tamper), CANDIDATES) == Certification("tolerance", CANDIDATES, 1, False)


def test_the_distance_is_the_largest_of_any_two_buckets_measured() -> None:
    def tamper(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
        first_half = y[: len(y) // 2]
        for _ in range(5 if len(y) == 16 else 1):
            nudge(first_half)

    result = certify(Tampered(PLAIN, step=tamper), CANDIDATES)
    assert (result.exactness, result.max_ulp) == ("tolerance", 5)


@pytest.mark.parametrize("where", ["output", "state", "smallest bucket", "late"])
def test_a_whole_sequence_with_other_bits_is_noticed(where: str) -> None:
    def tamper(y: torch.Tensor, after: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
        if where == "output":
            nudge(y[3, 2, 4:5])
        elif where == "state":
            nudge(after[0, 1, 3:4])
        elif where == "late":
            nudge(y[200:, 0, 0])
        elif y.shape[1] == 4:
            nudge(y[:, 0])

    result = certify(Tampered(PLAIN, sequence=tamper), CANDIDATES)
    assert result == Certification("exact", CANDIDATES, 1, False)


def test_sequences_are_compared_over_row_numbers_that_are_left() -> None:
    network = grouped(lambda rows: rows < 16 or rows == 64)
    assert certify(network, CANDIDATES).buckets == (16, 24, 32, 48)
    assert {rows for _, rows in network.sequences} == {16, 48}
    assert max(steps for steps, _ in network.sequences) == 256


def test_certifying_again_finds_the_same_and_leaves_torchs_and_numpys_randomness_alone() -> None:
    network = grouped(CANDIDATES.index)
    torch.manual_seed(5)
    np.random.seed(5)
    results = [certify(network, CANDIDATES) for _ in range(2)]
    assert results[0] == results[1]
    after = torch.rand(1).item(), np.random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    assert after == (torch.rand(1).item(), np.random.random())


def test_every_bucket_compares_enough_values() -> None:
    for description in (PLAIN, GruDescription(features=5, gru=GruLayers(hidden_size=300))):
        network = Tampered(description)
        certify(network, CANDIDATES)
        for bucket in CANDIDATES:
            assert network.rows[bucket] * network.state.row_bytes // 4 >= 2 * 4096


def test_work_for_a_large_network_is_bounded() -> None:
    description = GruDescription(features=64, gru=GruLayers(hidden_size=1024))
    network = Tampered(description)
    buckets = (4, 64, 128)
    assert certify(network, buckets).exactness == "exact"
    multiply_adds = 3 * 1024 * (64 + 1024) * sum(network.rows.values())
    assert multiply_adds <= 4 * 3 * 1024 * (64 + 1024) * sum(buckets) + 2 * 3e9
