import numpy as np
from instep.core.verdict import Admission

from instep.core.typing import I64


def ints(*values: int) -> I64:
    return np.array(values, np.int64)


def verdict(skipped: I64, lengths: I64, timesteps: int = 2) -> Admission:
    columns = len(lengths)
    slots, rows = np.arange(3, 3 + columns), np.arange(timesteps * columns).reshape(timesteps, columns)
    fresh, codes = lengths - skipped, np.arange(columns, dtype=np.int32)
    return Admission(slots, rows, skipped, lengths, codes, 7 + lengths, fresh, bool((fresh == timesteps).all()))


def columns(of: Admission) -> list[list[int]]:
    arrays = of.slots, of.skipped, of.lengths, of.codes, of.expected_seq, of.fresh, *of.rows
    return [[int(value) for value in column] for column in np.array(arrays).T]


def test_what_was_admitted_is_what_is_to_be_computed() -> None:
    slots, fresh = verdict(ints(0, 1, 2), ints(2, 2, 2)).admitted
    assert (slots.tolist(), fresh.tolist()) == ([3, 4], [2, 1])
    slots, fresh = verdict(ints(0, 0), ints(2, 2)).admitted
    assert (slots.tolist(), fresh.tolist()) == ([3, 4], [2, 2])


def test_columns_of_a_verdict_are_in_its_memory() -> None:
    whole = verdict(ints(0, 1, 0), ints(2, 2, 1))
    part = whole.of(slice(1, 3))
    assert columns(part) == columns(whole)[1:]
    part.lengths[0] = 0
    assert whole.lengths.tolist() == [2, 0, 1]
    assert not part.is_whole


def test_verdicts_beside_each_other_have_the_columns_of_both() -> None:
    one, other = verdict(ints(0, 0), ints(2, 2)), verdict(ints(0, 1, 0), ints(2, 2, 1))
    assert columns(Admission.beside([one, other])) == columns(one) + columns(other)
    assert [Admission.beside(each).is_whole for each in ([one, one], [one, other])] == [True, False]
