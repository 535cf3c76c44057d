import numpy as np
import pytest

from instep.core.admission import RepeatedStream, admit, finite_lengths, resolve_distinct
from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, U64
from instep_client.codes import Code

OWNER = 1


@pytest.fixture
def table() -> StreamTable:
    return StreamTable(8, max_owners=4)


def opened(table: StreamTable, *names: str, owner: int = OWNER) -> tuple[I64, U64]:
    slots, codes = table.open(names, owner, now_ns=0)
    assert not codes.any()
    return slots, table.slots.handles(slots)


def frames(timesteps: int, columns: int) -> F32:
    return np.ones((timesteps, columns, 2), np.float32)


def seqs(*values: int) -> U64:
    return np.array(values, np.uint64)


def test_a_good_block_is_admitted_whole_and_moves_the_expected_seq(table: StreamTable) -> None:
    slots, handles = opened(table, "a", "b")
    verdict = admit(table, OWNER, handles, seqs(0, 0), frames(3, 2))
    assert verdict.lengths.tolist() == [3, 3]
    assert verdict.codes.tolist() == [0, 0]
    assert table.next_seq[slots].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("seq", "code"),
    [
        (4, Code.SEQ_REPEATED),
        (0, Code.SEQ_REPEATED),
        (6, Code.SEQ_GAP),
        (2**63, Code.SEQ_GAP),
        (2**64 - 1, Code.SEQ_GAP),
    ],
)
def test_only_the_expected_seq_is_admitted(table: StreamTable, seq: int, code: Code) -> None:
    slots, handles = opened(table, "a")
    table.next_seq[slots] = 5
    verdict = admit(table, OWNER, handles, seqs(seq), frames(1, 1))
    assert (verdict.codes.tolist(), verdict.lengths.tolist(), verdict.expected_seq.tolist()) == ([code], [0], [5])
    assert table.next_seq[slots].tolist() == [5]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_frame_stops_its_own_column_only(table: StreamTable, bad: float) -> None:
    slots, handles = opened(table, "a", "b", "c")
    x = frames(4, 3)
    x[2, 1, 1] = bad
    verdict = admit(table, OWNER, handles, seqs(0, 0, 0), x)
    assert verdict.lengths.tolist() == [4, 2, 4]
    assert verdict.codes.tolist() == [0, Code.NOT_FINITE, 0]
    assert verdict.expected_seq.tolist() == [4, 2, 4]
    assert table.next_seq[slots].tolist() == [4, 2, 4]


def test_a_foreign_streams_seq_is_neither_moved_nor_told(table: StreamTable) -> None:
    theirs, handles = opened(table, "theirs", owner=2)
    table.next_seq[theirs] = 7
    verdict = admit(table, OWNER, handles, seqs(7), frames(1, 1))
    assert verdict.codes.tolist() == [Code.FOREIGN_STREAM]
    assert verdict.expected_seq.tolist() == [0]
    assert table.next_seq[theirs].tolist() == [7]


def test_unknown_columns_beside_good_ones(table: StreamTable) -> None:
    slots, handles = opened(table, "a")
    mixed = np.concatenate([np.array([0, 99, 2**64 - 1], np.uint64), handles])
    verdict = admit(table, OWNER, mixed, seqs(0, 0, 0, 0), frames(1, 4))
    assert verdict.codes.tolist() == [Code.UNKNOWN_STREAM] * 3 + [0]
    assert table.next_seq[slots].tolist() == [1]
    assert table.next_seq[0] == 0


def test_seq_is_judged_before_values(table: StreamTable) -> None:
    _, handles = opened(table, "a")
    x = np.full((1, 1, 2), np.nan, np.float32)
    assert admit(table, OWNER, handles, seqs(3), x).codes.tolist() == [Code.SEQ_GAP]


def test_a_stream_that_stands_twice_is_found_before_anything_changes(table: StreamTable) -> None:
    slots, handles = opened(table, "a", "b", "c")
    with pytest.raises(RepeatedStream):
        admit(table, OWNER, handles[[0, 1, 0]], seqs(0, 0, 1), frames(1, 3))
    assert table.next_seq[slots].tolist() == [0, 0, 0]
    assert resolve_distinct(table, OWNER, handles)[0].tolist() == slots.tolist()
    unknown = np.array([77, 77], np.uint64)
    assert resolve_distinct(table, OWNER, unknown)[1].tolist() == [Code.UNKNOWN_STREAM] * 2


def test_finite_lengths_counts_leading_good_timesteps() -> None:
    x = frames(3, 3)
    x[0, 1] = np.nan
    x[2, 2] = np.inf
    assert finite_lengths(x).tolist() == [3, 0, 2]
