import numpy as np

from instep.core.admission import Admission
from instep.core.blocks import BlockTable, admitted_rows
from instep.core.pending import PendingFrames
from instep_client.codes import Code


def admission(lengths: list[int], codes: list[int] | None = None) -> Admission:
    columns = len(lengths)
    return Admission(
        slots=np.arange(1, columns + 1),
        lengths=np.array(lengths, np.int64),
        codes=np.array(codes or [0] * columns, np.int32),
        expected_seq=np.array(lengths, np.int64),
    )


def test_a_block_is_complete_when_its_last_frame_is_answered() -> None:
    blocks = BlockTable(8)
    number = blocks.reserve()
    rows = np.array([[3, 4], [5, -1]], np.int32)
    blocks.add(number, client=1, request=77, rows=rows, admission=admission([2, 1]), now_ns=0)
    assert blocks.answered(np.array([number, number], np.int32)) == []
    (block,) = blocks.answered(np.array([number], np.int32))
    assert (block.request, block.frames) == (77, 3)
    assert admitted_rows(block).tolist() == [3, 4, 5]
    assert len(blocks) == 0


def test_several_blocks_complete_in_one_batch_and_numbers_are_used_again() -> None:
    blocks = BlockTable(2)
    numbers = [blocks.reserve() for _ in range(2)]
    for number in numbers:
        blocks.add(number, 0, number, np.array([[number]], np.int32), admission([1]), 0)
    assert {block.request for block in blocks.answered(np.array(numbers, np.int32))} == set(numbers)
    assert {blocks.reserve(), blocks.reserve()} == set(numbers)


def test_outputs_are_nan_from_the_first_frame_that_was_not_applied() -> None:
    pending = PendingFrames(8, 4, 1, 2)
    pending.y[:] = 1.0
    blocks = BlockTable(8)
    number = blocks.reserve()
    rows = np.array([[0, 1, 2], [3, 4, -1]], np.int32)
    blocks.add(number, 0, 0, rows, admission([2, 2, 1], [0, 0, Code.NOT_FINITE]), 0)
    block = blocks[number]
    assert np.isnan(block.outputs(pending)[:, :, 0]).tolist() == [[False, False, False], [False, False, True]]
    why = np.zeros(8, np.int32)
    why[1], why[4] = Code.STEP_FAILED, Code.SEQ_GAP
    block.fail(why, np.full(8, 10))
    assert np.isnan(block.outputs(pending)[:, :, 0]).tolist() == [[False, True, False], [False, True, True]]
    assert block.codes.tolist() == [0, Code.STEP_FAILED, Code.NOT_FINITE]
    assert block.lengths.tolist() == [2, 0, 1]
    assert block.admission.lengths.tolist() == [2, 2, 1]
    assert block.expected_seq[1] == 10
