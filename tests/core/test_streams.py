import numpy as np
import pytest

from instep.core.admission import resolve_handles
from instep.core.streams import StreamTable
from instep.core.tables import make_tables
from instep.core.typing import U64
from instep_client.protocol.codes import Code


class OwnTable(StreamTable):
    """A stream table with the memory that it is in, for four owners."""

    def __init__(self, max_streams: int, generation: int, last_epoch: int) -> None:
        tables = make_tables(max_streams, 4, 4, 1, 1, 8, 8, 8)
        super().__init__(tables, np.full(max_streams + 1, generation, np.uint32), last_epoch)
        self._packed = tuple(tables)

    def resolve(self, handles: U64, owner: int) -> list[int]:
        """For each handle 0, or why the owner may not use it."""
        codes = np.empty(len(handles), np.int32)
        resolve_handles(self._packed, handles, owner, np.empty(len(handles), np.int64), codes)
        return [int(code) for code in codes]


def table_of(max_streams: int, generation: int = 7, last_epoch: int = 0) -> OwnTable:
    return OwnTable(max_streams, generation, last_epoch)


def test_opening_gives_distinct_slots_and_remembers_names_and_owner() -> None:
    table = table_of(4)
    slots, codes = table.open(["a", "b"], owner=3, now_ns=10)
    assert codes.tolist() == [0, 0]
    assert [table.name(slot) for slot in slots.tolist()] == ["a", "b"]
    assert table.owner[slots].tolist() == [3, 3]
    assert table.open_count == 2


def test_a_name_can_be_open_once_only_within_a_request_and_across_owners() -> None:
    table = table_of(4)
    table.open(["a"], owner=0, now_ns=0)
    slots, codes = table.open(["a", "b", "b"], owner=1, now_ns=0)
    assert codes.tolist() == [Code.NAME_IN_USE, 0, Code.NAME_IN_USE]
    assert slots.tolist()[0] == slots.tolist()[2] == 0


def test_opening_beyond_the_capacity_refuses_the_rest() -> None:
    table = table_of(2)
    _, codes = table.open(["a", "b", "c"], owner=0, now_ns=0)
    assert codes.tolist() == [0, 0, Code.TOO_MANY_STREAMS]
    assert table.open_count == 2
    table.release(np.array([1]))
    assert table.open(["c"], owner=0, now_ns=0)[1].tolist() == [0]


def test_resolving_tells_own_from_foreign_from_unknown() -> None:
    table = table_of(4)
    mine, _ = table.open(["mine"], owner=1, now_ns=0)
    theirs, _ = table.open(["theirs"], owner=2, now_ns=0)
    handles = np.concatenate([table.slots.handles(mine), table.slots.handles(theirs), np.array([12345], np.uint64)])
    assert table.resolve(handles, owner=1) == [0, Code.FOREIGN_STREAM, Code.UNKNOWN_STREAM]


def test_closing_and_released_streams_are_unknown() -> None:
    table = table_of(4)
    slots, _ = table.open(["a"], owner=1, now_ns=0)
    handles = table.slots.handles(slots)
    table.closing[slots] = True
    assert table.resolve(handles, 1) == [Code.UNKNOWN_STREAM]
    table.release(slots)
    assert table.resolve(handles, 1) == [Code.UNKNOWN_STREAM]


def test_the_next_owner_of_a_slot_starts_afresh() -> None:
    table = table_of(1)
    slots, _ = table.open(["a"], owner=1, now_ns=0)
    table.next_seq[slots] = 9
    table.step_seq[slots] = 9
    table.lost[slots] = True
    table.release(slots)
    again, _ = table.open(["b"], owner=2, now_ns=5)
    assert again.tolist() == slots.tolist()
    assert (table.next_seq[again[0]], table.step_seq[again[0]]) == (0, 0)
    assert (table.lost[again[0]], table.last_active_ns[again[0]]) == (False, 5)


def test_a_stream_with_pending_frames_is_never_released() -> None:
    table = table_of(1)
    slots, _ = table.open(["a"], owner=1, now_ns=0)
    table.unanswered[slots] = 1
    with pytest.raises(AssertionError, match="unanswered"):
        table.release(slots)


def test_idle_streams_are_those_silent_with_nothing_pending() -> None:
    table = table_of(4)
    slots, _ = table.open(["idle", "busy", "fresh", "closing"], owner=1, now_ns=0)
    table.unanswered[slots[1]] = 1
    table.last_active_ns[slots[2]] = 100
    table.closing[slots[3]] = True
    assert table.idle_since(50).tolist() == [slots[0]]
    assert table.owned_by(1).tolist() == sorted(slots[:3].tolist())


def test_owners_are_told_how_many_streams_they_have() -> None:
    table = table_of(4)
    slots, _ = table.open(["a", "b", "a"], owner=2, now_ns=0)
    assert table.owned.tolist() == [0, 0, 2, 0, 0]
    table.closing[slots[0]] = True
    assert table.owned[2] == 2
    table.release(slots[:2])
    assert table.owned.tolist() == [0, 0, 0, 0, 0]


def test_a_stream_may_begin_with_any_seq() -> None:
    table = table_of(4)
    table.open(["a"], owner=0, now_ns=0)
    slots, codes = table.open(["a", "b", "c"], owner=0, now_ns=0, first_seqs=np.array([7, 8, 2**62 - 1]))
    assert codes.tolist() == [Code.NAME_IN_USE, 0, 0]
    for column in (table.first_seq, table.next_seq, table.step_seq, table.acked):
        assert column[slots[1:]].tolist() == [8, 2**62 - 1]


def test_every_ownership_has_an_epoch_of_its_own_and_epochs_only_rise() -> None:
    table = table_of(4, last_epoch=41)
    slots, _ = table.open(["a", "b"], owner=1, now_ns=0)
    assert table.epoch[slots].tolist() == [42, 43]
    table.hand_over(slots[:1], owner=2, now_ns=0)
    assert table.epoch[slots].tolist() == [44, 43]
    table.release(slots[1:])
    again, _ = table.open(["b"], owner=1, now_ns=0)
    assert table.epoch[again].tolist() == [45]
    assert table.last_epoch == 45


def test_handing_over_fences_former_handles_and_gives_new_ones() -> None:
    table = table_of(4)
    slots, _ = table.open(["a", "b"], owner=1, now_ns=0)
    handles = [table.slots.handles(slots)]
    for owner in (2, 2, 3):
        table.hand_over(slots, owner, now_ns=0)
        handles.append(table.slots.handles(slots))
    for former in handles[:-1]:
        for owner in range(4):
            assert table.resolve(former, owner) == [Code.FENCED] * 2
    assert table.resolve(handles[-1], 3) == [0, 0]
    assert table.resolve(handles[-1], 2) == [Code.FOREIGN_STREAM] * 2
    assert table.owned.tolist() == [0, 0, 0, 2, 0]


def test_handles_from_before_the_slots_stream_are_unknown_rather_than_fenced() -> None:
    table = table_of(1)
    slots, _ = table.open(["former"], owner=1, now_ns=0)
    former = table.slots.handles(slots)
    table.hand_over(slots, 1, now_ns=0)
    handed_over = table.slots.handles(slots)
    table.release(slots)
    assert table.resolve(handed_over, 1) == [Code.UNKNOWN_STREAM]
    table.open(["present"], owner=1, now_ns=0)
    table.hand_over(slots, 1, now_ns=0)
    both = np.concatenate([former, handed_over, table.slots.handles(slots) + np.uint64(1 << 32)])
    assert table.resolve(both, 1) == [Code.UNKNOWN_STREAM] * 3


def test_generations_that_wrap_round_still_tell_fenced_from_unknown() -> None:
    table = table_of(1, generation=2**32 - 2)
    slots, _ = table.open(["a"], owner=1, now_ns=0)
    fenced = []
    for _ in range(3):
        fenced.append(table.slots.handles(slots))
        table.hand_over(slots, 1, now_ns=0)
    before = fenced[0] - np.uint64(1 << 32)
    codes = table.resolve(np.concatenate([*fenced, before, table.slots.handles(slots)]), 1)
    assert codes == [Code.FENCED] * 3 + [Code.UNKNOWN_STREAM, 0]


def test_a_parked_stream_is_nobodys_but_keeps_its_handle_and_epoch() -> None:
    table = table_of(4)
    slots, _ = table.open(["a"], owner=1, now_ns=0)
    handles, epoch = table.slots.handles(slots), table.epoch[slots].tolist()
    table.park(slots, now_ns=5)
    assert table.owned.tolist() == [0, 0, 0, 0, 1]
    assert table.resolve(handles, 1) == [Code.FOREIGN_STREAM]
    assert (table.epoch[slots].tolist(), table.find(["a"]).tolist()) == (epoch, slots.tolist())
    assert table.owned_by(1).tolist() == []


def test_parked_streams_do_not_idle_and_connected_ones_are_not_parked_too_long() -> None:
    table = table_of(4)
    slots, _ = table.open(["parked", "connected", "busy", "closing"], owner=1, now_ns=0)
    table.park(slots[[0, 2, 3]], now_ns=10)
    table.unanswered[slots[2]] = 1
    table.closing[slots[3]] = True
    assert table.parked_since(10).tolist() == []
    assert table.parked_since(11).tolist() == [slots[0]]
    assert table.idle_since(11).tolist() == [slots[1]]
    table.hand_over(slots[:1], 1, now_ns=20)
    assert table.parked_since(100).tolist() == []
    assert table.idle_since(20).tolist() == [slots[1]]


def test_the_next_stream_of_a_slot_is_another_incarnation_and_a_new_owner_is_not() -> None:
    table = table_of(2)
    slots, _ = table.open(["a", "b"], owner=1, now_ns=0)
    incarnations = table.incarnations(slots)
    table.hand_over(slots, 2, now_ns=0)
    table.closing[slots[0]] = True
    assert table.are_open(slots, incarnations).tolist() == [True, True]
    table.release(slots[:1])
    assert table.are_open(slots, incarnations).tolist() == [False, True]
    table.open(["c"], owner=1, now_ns=0)
    assert table.are_open(slots, incarnations).tolist() == [False, True]
    assert table.open_slots().tolist() == [1, 2]


def test_numbers_in_the_recording_are_signed_as_seqs_are() -> None:
    table = table_of(2)
    slots, _ = table.open(["a", "b"], owner=1, now_ns=0)
    table.recording_id[slots] = [5, 2**32 - 1]
    assert table.recording_ids(slots).tolist() == [5, 2**32 - 1]
    assert table.recording_ids(slots).dtype == np.int64
