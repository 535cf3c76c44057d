import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.core.ownership import ResumeDecision, check_resume
from instep.core.streams import StreamTable
from instep.core.tables import make_tables
from instep.core.typing import I64
from instep_client.protocol.codes import HAVE_ALL, Code
from tests.support.core_streams import u64

W = 4


def table_of(max_streams: int) -> StreamTable:
    tables = make_tables(max_streams, 4, W, 1, 1, 8, 8, 8)
    return StreamTable(tables, np.full(max_streams + 1, 7, np.uint32), 100)


def slot_of(table: StreamTable) -> I64:
    return table.find(["s"])


@pytest.fixture
def table() -> StreamTable:
    """Stream `s` of epoch 101: frames 10 … 29 were admitted, outputs before 27 acknowledged, all are computed."""
    table = table_of(4)
    slots, _ = table.open(["s"], owner=1, now_ns=0, first_seqs=np.array([10]))
    table.next_seq[slots] = table.step_seq[slots] = 30
    table.acked[slots] = 27
    return table


def decided(
    table: StreamTable, have: int, epoch: int, *, take_over: bool = False, name: str = "s", arrival: int = 9
) -> ResumeDecision:
    return check_resume(table, W, {"expired"}, [name], u64(have), u64(epoch), take_over, arrival)


@pytest.mark.parametrize("have", [27, 28, 30])
def test_the_holder_of_the_present_epoch_is_the_owner(table: StreamTable, have: int) -> None:
    decision = decided(table, have, 101)
    assert (decision.codes.tolist(), decision.slots.tolist()) == ([0], slot_of(table).tolist())
    assert (decision.have.tolist(), decision.expected_seq.tolist()) == ([have], [30])


@pytest.mark.parametrize("epoch", [102, 2**64 - 1])
def test_an_epoch_that_the_server_lost_may_be_of_another_stream_of_that_name(table: StreamTable, epoch: int) -> None:
    refused = decided(table, 30, epoch)
    assert (refused.codes.tolist(), refused.expected_seq.tolist()) == ([Code.DATA_LOSS], [30])
    taken = decided(table, 30, epoch, take_over=True)
    assert (taken.codes.tolist(), taken.have.tolist()) == ([0], [30])


@pytest.mark.parametrize("epoch", [0, 1, 100])
def test_an_older_epoch_is_fenced_unless_it_takes_over(table: StreamTable, epoch: int) -> None:
    refused = decided(table, 30, epoch)
    assert (refused.codes.tolist(), refused.slots.tolist()) == ([Code.FENCED], [0])
    assert refused.expected_seq.tolist() == [30]
    assert decided(table, 30, epoch, take_over=True).codes.tolist() == [0]


def test_the_former_epoch_is_good_until_a_frame_was_sent_under_the_present_one(table: StreamTable) -> None:
    slots = slot_of(table)
    table.hand_over(slots, 2, now_ns=0, former_epochs=u64(101))
    again = decided(table, 30, 101)
    assert (again.codes.tolist(), again.former_epochs.tolist()) == ([0], [101])
    assert decided(table, 30, 100).codes.tolist() == [Code.FENCED]
    table.next_seq[slots] += 1
    assert decided(table, 30, 101).codes.tolist() == [Code.FENCED]


def test_an_older_connection_that_names_the_former_epoch_is_late(table: StreamTable) -> None:
    slots = slot_of(table)
    table.hand_over(slots, 2, now_ns=0, former_epochs=u64(101), arrival=5)
    late = decided(table, 30, 101, arrival=4)
    assert (late.codes.tolist(), late.slots.tolist()) == ([Code.FENCED], [0])
    for arrival in (5, 6):
        assert decided(table, 30, 101, arrival=arrival).codes.tolist() == [0]
    table.park(slots, now_ns=1)
    assert decided(table, 30, 101, arrival=4).codes.tolist() == [Code.FENCED]
    assert decided(table, 30, 102, arrival=4).codes.tolist() == [0], "the owner's on any connection"
    assert decided(table, 30, 101, arrival=4, take_over=True).codes.tolist() == [0]


def test_after_a_restart_no_connection_is_older(table: StreamTable) -> None:
    slots = slot_of(table)
    table.former_epoch[slots] = 77
    table.granted_seq[slots] = 30
    assert decided(table, 30, 77, arrival=1).codes.tolist() == [0]


def test_the_next_stream_of_a_slot_was_granted_to_no_connection_before(table: StreamTable) -> None:
    slots = slot_of(table)
    table.hand_over(slots, 2, now_ns=0, former_epochs=u64(101), arrival=5)
    table.release(slots)
    assert table.open(["s"], owner=1, now_ns=0)[0] == slots
    assert table.granted_to[slots] == 0


def test_an_owner_whose_stream_was_taken_over_is_fenced_at_once(table: StreamTable) -> None:
    taken = decided(table, 30, 0, take_over=True)
    assert taken.former_epochs.tolist() == [0]
    table.hand_over(taken.slots, 2, now_ns=0, former_epochs=taken.former_epochs)
    assert decided(table, 30, 101).codes.tolist() == [Code.FENCED]
    assert decided(table, 30, 0).codes.tolist() == [Code.FENCED]


def test_an_older_epoch_is_fenced_before_it_learns_anything_else(table: StreamTable) -> None:
    assert decided(table, 99, 100).codes.tolist() == [Code.FENCED]
    assert decided(table, 0, 100).codes.tolist() == [Code.FENCED]


@pytest.mark.parametrize("have", [31, 2**63, 2**64 - 2])
def test_outputs_that_the_server_does_not_know_of_are_data_loss(table: StreamTable, have: int) -> None:
    refused = decided(table, have, 101)
    assert (refused.codes.tolist(), refused.expected_seq.tolist()) == ([Code.DATA_LOSS], [30])
    taken = decided(table, have, 101, take_over=True)
    assert (taken.codes.tolist(), taken.have.tolist()) == ([0], [30])


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("have", [26, 0])
def test_outputs_that_are_no_longer_kept_cannot_be_sent_again(table: StreamTable, have: int, take_over: bool) -> None:
    refused = decided(table, have, 101, take_over=take_over)
    assert (refused.codes.tolist(), refused.expected_seq.tolist()) == ([Code.OUTPUTS_GONE], [30])


def test_outputs_beyond_the_frame_buffer_are_gone_though_they_were_not_acknowledged(table: StreamTable) -> None:
    table.acked[:] = 0
    assert decided(table, 26, 101).codes.tolist() == [0]
    assert decided(table, 25, 101).codes.tolist() == [Code.OUTPUTS_GONE]


def test_a_claimant_that_does_not_know_what_it_holds_gets_what_is_next(table: StreamTable) -> None:
    decision = decided(table, HAVE_ALL, 101)
    assert (decision.codes.tolist(), decision.have.tolist()) == ([0], [30])


def test_streams_that_are_not_there_are_unknown_or_expired(table: StreamTable) -> None:
    for take_over in (False, True):
        decision = check_resume(
            table, W, {"expired", "s"}, ["expired", "never", "s"], u64(0, 0, 30), u64(0, 0, 101), take_over, 9
        )
        assert decision.codes.tolist() == [Code.EXPIRED, Code.UNKNOWN_STREAM, 0]
        assert decision.expected_seq.tolist() == [0, 0, 30]


def test_a_stream_that_is_closing_is_there_no_more(table: StreamTable) -> None:
    table.closing[slot_of(table)] = True
    assert decided(table, 30, 101).codes.tolist() == [Code.UNKNOWN_STREAM]
    assert check_resume(table, W, {"s"}, ["s"], u64(30), u64(101), True, 9).codes.tolist() == [Code.EXPIRED]


@given(
    st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(99, 103), st.booleans()
)
def test_a_claim_is_granted_only_if_every_frame_after_it_can_be_answered(
    first: int, length: int, acked: int, have: int, epoch: int, take_over: bool
) -> None:
    table = table_of(1)
    slots, _ = table.open(["s"], owner=0, now_ns=0, first_seqs=np.array([first]))
    table.next_seq[slots] = table.step_seq[slots] = first + length
    table.acked[slots] = first + min(acked, length)
    decision = check_resume(table, W, (), ["s"], u64(have), u64(epoch), take_over, 1)
    if decision.codes[0] == 0:
        assert epoch == 101 or take_over
        assert first + length - W <= decision.have[0] <= first + length
        assert decision.have[0] >= table.acked[slots[0]]
        assert decision.have[0] == have or (take_over and have > first + length)
    else:
        assert decision.slots.tolist() == [0]
