import numpy as np
from instep.core.blocks import Block, BlockTable
from instep.core.rings import Rings
from instep.core.verdict import Admission

from instep.core.streams import StreamTable
from instep.core.typing import I64
from instep_client.protocol.codes import Code

RINGS = Rings(StreamTable(8, max_owners=1), 4, 8, 1, 1, max_pending=10)
"""Where the frames of blocks lie."""


def ints(*values: int) -> I64:
    return np.array(values, np.int64)


def block(
    lengths: list[int], skipped: list[int] | None = None, codes: list[int] | None = None, timesteps: int = 3
) -> Block[str]:
    columns = len(lengths)
    slots, fresh = np.arange(1, columns + 1), ints(*lengths) - ints(*(skipped or [0] * columns))
    verdict = Admission(
        slots=slots,
        rows=RINGS.rows(slots, np.arange(timesteps)[:, None]),
        skipped=ints(*(skipped or [0] * columns)),
        lengths=ints(*lengths),
        codes=np.array(codes or [0] * columns, np.int32),
        expected_seq=ints(*lengths),
        fresh=fresh,
        is_whole=bool((fresh == timesteps).all()),
    )
    return Block("client", 77, timesteps, verdict, 0, columns, int(verdict.fresh.sum()), came_ns=0)


def test_a_block_is_complete_when_its_last_frame_is_answered() -> None:
    blocks: BlockTable[str] = BlockTable(8)
    (number,) = blocks.add([block([2, 1])]).tolist()
    assert blocks.answered(np.array([number, number], np.int32)) == []
    assert len(blocks) == 1
    (complete,) = blocks.answered(np.array([number], np.int32))
    assert (complete.client, complete.request, complete.frames) == ("client", 77, 3)
    assert len(blocks) == 0


def test_frames_that_were_applied_before_are_not_waited_for() -> None:
    resent = block([3, 2], skipped=[2, 2])
    assert resent.frames == 1
    blocks: BlockTable[str] = BlockTable(8)
    (number,) = blocks.add([resent]).tolist()
    assert blocks.answered(np.array([number], np.int32)) == [resent]


def test_several_blocks_complete_in_one_batch_and_numbers_are_used_again() -> None:
    blocks: BlockTable[str] = BlockTable(2)
    numbers = blocks.add([block([1]) for _ in range(2)]).tolist()
    assert blocks[numbers[1]] is not blocks[numbers[0]]
    assert len(blocks.answered(np.array(numbers, np.int32))) == 2
    assert {blocks.add([block([1])]).item() for _ in range(2)} == set(numbers)


def test_a_column_fails_from_the_first_frame_that_was_not_applied() -> None:
    mixed = block([2, 2, 1], skipped=[0, 1, 0], codes=[0, 0, Code.NOT_FINITE], timesteps=2)
    failed = [RINGS.rows(ints(slot), ints(1)).item() for slot in (1, 2)]
    order = np.argsort(failed)
    codes, expected = np.array([Code.STEP_FAILED, Code.SEQ_GAP], np.int32), ints(10, 20)
    mixed.fail(ints(*failed)[order], codes[order], expected[order])
    verdict = mixed.verdict
    assert verdict.codes.tolist() == [Code.STEP_FAILED, Code.SEQ_GAP, Code.NOT_FINITE]
    assert verdict.lengths.tolist() == [1, 1, 1]
    assert verdict.expected_seq.tolist() == [10, 20, 1]
    assert verdict.fresh.tolist() == [2, 1, 1]
    assert mixed.frames == 4


def test_a_block_fails_in_its_own_columns_of_a_verdict_only() -> None:
    both = block([1, 1], timesteps=1)
    behind = Block("client", 78, 1, both.verdict, 1, 1, 1, came_ns=0)
    rows = np.sort(np.concatenate([RINGS.rows(ints(slot), ints(0)) for slot in (1, 2)]))
    behind.fail(rows, np.full(2, Code.STEP_FAILED, np.int32), ints(5, 5))
    assert both.verdict.codes.tolist() == [0, Code.STEP_FAILED]
    assert both.verdict.expected_seq.tolist() == [1, 5]
    assert (behind.columns, both.columns) == (slice(1, 2), slice(0, 2))


def test_a_frame_that_was_applied_before_does_not_fail_with_another_in_its_place() -> None:
    """A window later, a frame of another block lies in the row of one that is answered again."""
    resent = block([2], skipped=[1], timesteps=2)
    row = RINGS.rows(ints(1), ints(4))
    resent.fail(row, np.array([Code.STEP_FAILED], np.int32), ints(4))
    assert (resent.verdict.codes.tolist(), resent.verdict.lengths.tolist()) == ([0], [2])
