from __future__ import annotations

import numpy as np
import pytest

from instep.replay.bound import Limits
from instep.replay.comparison import Comparison
from instep_client.protocol.state_spec import DTYPES, U8, Leaf, StateSpec
from tests.support.states import gru_state

STEPS, ROWS, OUTPUTS = 5, 3, 4
GRU_STATE = gru_state(2, 3)
MIXED = StateSpec((Leaf("count", (), DTYPES["int64"]), Leaf("level", (2,), DTYPES["float32"])))
RECORDED = np.random.default_rng(0).standard_normal((STEPS, ROWS, OUTPUTS)).astype(np.float32)
VALID = np.arange(STEPS)[:, None] < np.array([5, 4, 2])


def limits(distance: float, *shape: int, lossy: bool = False) -> Limits:
    return Limits(np.full(shape, distance), np.full(shape, lossy))


LIMIT = limits(1e-3, STEPS, ROWS)


def starts(seq: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.full(ROWS, seq, np.int64)


def nudged(*places: tuple[int, int, int], ulps: int = 1) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values = RECORDED.copy()
    for place in places:
        values.view(np.int32)[place] += ulps
    return values


def test_equal_bits() -> None:
    found = Comparison("stepped", ROWS, bits_required=True)
    found.add_replay(starts(0), RECORDED, nudged((4, 1, 0), (2, 2, 3)), VALID, LIMIT)  # only where there is no frame
    assert not found.differs.any()
    assert not found.wrong.any()
    assert found.elements == (5 + 4 + 2) * OUTPUTS


def test_the_first_differing_element_of_each_row() -> None:
    found = Comparison("stepped", ROWS, bits_required=True)
    found.add_replay(
        np.array([10, 0, 30]), RECORDED, nudged((3, 0, 1), (1, 0, 2), (1, 0, 3), (0, 2, 0), ulps=3), VALID, LIMIT
    )
    assert found.wrong.tolist() == [True, False, True]
    assert (found.first[0].frame, found.first[0].element) == (11, 2)
    assert (found.first[2].frame, found.first[2].element) == (30, 0)
    assert found.first[0].recorded == RECORDED[1, 0, 2]
    assert (found.max_error > 0).tolist() == [True, False, True]
    assert found.elements == (5 + 4 + 2) * OUTPUTS
    found.add_replay(np.array([15, 5, 35]), RECORDED, nudged((0, 0, 0)), VALID, LIMIT)
    assert found.first[0].frame == 11, "what comes later does not replace it"


def test_within_its_limit_a_difference_is_not_wrong_unless_bits_are_required() -> None:
    found = Comparison("stepped", ROWS, bits_required=False)
    found.add_replay(starts(0), RECORDED, nudged((1, 0, 2)), VALID, LIMIT)
    assert found.differs.tolist() == [True, False, False]
    assert not found.wrong.any()
    assert found.first[0].frame == 1
    values = RECORDED.copy()
    values[3, 0, 1] += 0.002
    found.add_replay(starts(5), RECORDED, values, VALID, LIMIT)
    assert found.wrong.tolist() == [True, False, False]
    assert (found.first[0].frame, found.first[0].element) == (8, 1), "a wrong element counts before one that differs"
    assert found.max_error[0] == pytest.approx(0.002, rel=1e-3)


def test_signs_of_zero_and_payloads_of_nan_are_bits_too() -> None:
    recorded = np.array([[[1.0, np.nan, 0.0, np.nan]]], np.float32)
    replayed = np.array([[[1.0, np.nan, -0.0, np.nan]]], np.float32)
    replayed.view(np.int32)[0, 0, 3] += 1
    one = np.ones((1, 1), np.bool_)
    found = Comparison("stepped", 1, bits_required=True)
    found.add_replay(starts(0), recorded, replayed, one, limits(1.0, 1, 1))
    assert (found.elements, found.first[0].element, found.wrong.tolist()) == (4, 2, [True])
    lenient = Comparison("stepped", 1, bits_required=False)
    lenient.add_replay(starts(0), recorded, replayed, one, limits(1.0, 1, 1))
    assert (lenient.differs.tolist(), lenient.wrong.tolist()) == ([True], [False])
    lenient.add_replay(starts(1), recorded, np.ones_like(replayed), one, limits(1.0, 1, 1))
    assert lenient.wrong.all(), "a NaN is within no tolerance"
    assert (lenient.first[0].frame, lenient.first[0].element) == (1, 1)


def test_final_states() -> None:
    found = Comparison("stepped", ROWS, bits_required=True)
    state = np.arange(6, dtype=np.float32)
    found.add_replayed_state(
        0, 9, GRU_STATE, state.view(np.uint8), state.copy().view(np.uint8), {"h": limits(0.1, ROWS)}
    )
    assert not found.differs.any()
    other = state.copy()
    other[3] += 0.5
    found.add_replayed_state(1, 9, GRU_STATE, state.view(np.uint8), other.view(np.uint8), {"h": limits(0.1, ROWS)})
    assert found.wrong.tolist() == [False, True, False]
    assert (found.first[1].place, found.first[1].frame, found.first[1].element) == ("final state", 9, 3)
    assert found.elements == 12


def mixed(count: int, *level: float) -> U8:
    rows = MIXED.pack({"count": np.array([count]), "level": np.array([level], np.float32)})
    return rows.ravel()


@pytest.mark.parametrize("bits_required", [False, True])
def test_only_floats_of_a_state_may_be_off(bits_required: bool) -> None:
    found = Comparison("stepped", 5, bits_required)
    near, lossy = {"level": limits(1e-3, 5)}, {"level": limits(1e-3, 5, lossy=True)}
    found.add_replayed_state(0, 7, MIXED, mixed(5, 1.0, 2.0), mixed(5, 1.0, 2.0), near)
    found.add_replayed_state(1, 7, MIXED, mixed(5, 1.0, 2.0), mixed(5, 1.0, 2.0001), near)
    found.add_replayed_state(2, 7, MIXED, mixed(5, 1.0, 2.0), mixed(8, 1.0, 2.0), lossy)
    found.add_replayed_state(3, 7, MIXED, mixed(5, 1.0, 2.0), mixed(5, 9.0, 2.0), near)
    found.add_replayed_state(4, 7, MIXED, mixed(2**53, 1.0, 2.0), mixed(2**53 + 1, 1.0, 2.0), lossy)
    assert found.differs.tolist() == [False, True, True, True, True]
    assert found.wrong.tolist() == [False, bits_required, True, True, True]
    assert [found.first[row].element for row in (1, 2, 3, 4)] == [2, 0, 1, 0]
    assert (found.first[2].recorded, found.first[2].replayed) == (5, 8)
    assert found.elements == 5 * 3
    reference = Comparison("float64 reference", 3, bits_required=False)
    level = np.array([1.0, 2.0])
    for row, (recorded, count) in enumerate(((5, 5), (5, 6), (2**53, 2**53 + 1))):
        truth = {"count": np.array(count), "level": level}
        wide = {"level": limits(1e6, 3, lossy=True)}
        reference.add_true_state(row, 7, MIXED, mixed(recorded, 1.0, 2.0), truth, wide)
    assert reference.wrong.tolist() == [False, True, True]


def test_truth() -> None:
    found = Comparison("float64 reference", ROWS, bits_required=False)
    truth = RECORDED.astype(np.float64)
    truth[0, 0, 1] += 5e-4
    truth[2, 1, 3] += 2e-3
    truth[3, 1, 0] += 9e-3
    truth[4, 2, 0] += 1  # no frame there
    found.add_distance(np.array([0, 20, 0]), RECORDED, truth, VALID, LIMIT)
    assert found.max_error == pytest.approx([5e-4, 9e-3, 0])
    assert found.wrong.tolist() == [False, True, False]
    assert (found.first[1].frame, found.first[1].element) == (22, 3)
    assert found.first[1].replayed == truth[2, 1, 3]
    state = np.ones(6, np.float32).view(np.uint8)
    found.add_true_state(0, 5, GRU_STATE, state, {"h": np.ones((2, 3)) + 1e-9}, {"h": limits(1e-8, ROWS)})
    assert not found.wrong[0]
    other = {"h": np.where(np.arange(6).reshape(2, 3) == 4, 2.0, 1.0)}
    found.add_true_state(2, 5, GRU_STATE, state, other, {"h": limits(1e-8, ROWS)})
    assert (found.first[2].place, found.first[2].element, found.max_error[2]) == ("final state", 4, 1.0)


def test_beyond_a_lossy_limit_an_element_is_undecided_unless_bits_are_required() -> None:
    values = RECORDED.copy()
    values[1, 0, 2] += 0.0005
    values[2, 0, 2] = np.nan
    values[1, 2, 0] += 9
    lossy = limits(1e-3, STEPS, ROWS)
    lossy.lossy[2:, 0] = True
    for bits_required in (False, True):
        replay = Comparison("stepped", ROWS, bits_required)
        replay.add_replay(starts(10), RECORDED, values, VALID, lossy)
        assert replay.differs.tolist() == [True, False, True]
        assert replay.wrong.tolist() == [bits_required, False, True]
        assert replay.undecided == ({} if bits_required else {0: 12})
    reference = Comparison("float64 reference", ROWS, bits_required=False)
    reference.add_distance(starts(10), RECORDED, values.astype(np.float64), VALID, lossy)
    assert reference.wrong.tolist() == [False, False, True]
    assert reference.undecided == {0: 12}
    assert reference.max_error == pytest.approx([0.0005, 0, 9], rel=1e-3), "up to where the limit means nothing"
    state = np.ones(6, np.float32).view(np.uint8)
    reference.add_true_state(1, 5, GRU_STATE, state, {"h": np.full((2, 3), 2.0)}, {"h": limits(1e-3, ROWS, lossy=True)})
    assert reference.undecided == {0: 12, 1: 5}
    assert not reference.wrong[1]


def test_blocks_of_rows_become_one_comparison_and_rows_can_be_replaced() -> None:
    random = np.random.default_rng(0)
    recorded = random.standard_normal((6, 5, 3)).astype(np.float32)
    replayed = recorded.copy()
    replayed[2, 1, 0], replayed[4, 3, 2], replayed[5, 3, 0] = 9, np.nan, recorded[5, 3, 0] * 2
    first_seqs, valid, limit = np.arange(5), np.ones((6, 5), np.bool_), limits(1e-3, 6, 5)
    together = Comparison("torch", 5, bits_required=False)
    together.add_replay(first_seqs, recorded, replayed, valid, limit)
    apart = []
    for of in (slice(0, 2), slice(2, 5)):
        apart.append(Comparison("torch", of.stop - of.start, bits_required=False))
        columns = (recorded[:, of], replayed[:, of].copy(), valid[:, of], limits(1e-3, 6, of.stop - of.start))
        apart[-1].add_replay(first_seqs[of], *columns)
    joined = Comparison("torch", 5, bits_required=False)
    for rows, block in zip(([0, 1], [2, 3, 4]), apart, strict=True):
        joined.replace(np.array(rows), block)
    assert joined.first.keys() == {1, 3}
    assert repr(vars(joined)) == repr(vars(together))
    joined.replace(np.array([1, 4]), Comparison("torch", 2, bits_required=False))
    assert joined.wrong.tolist() == [False, False, False, True, False]
    assert joined.first.keys() == {3}
