"""Rules of delivery, broken one by one in the running process: the property test notices each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from instep.core.admission import admit, resolve_handles
from instep.core.dirty import DirtyTracker
from instep.core.ownership import check_resume
from instep.core.replies import repeated_outputs
from instep.core.runs import are_pending, are_running, fail_run
from instep.core.scheduler import begin_run
from instep.core.slots import SlotAllocator
from instep.core.tables import Packed, Tables, rows_of
from instep.core.typing import F32, I32, I64, U8, U64
from instep.frontends.zmq import encode
from instep.recording.recovery import Recovered
from instep.replay.recovery import resume_recording
from instep.streaming.api import Grants
from instep.streaming.journal import Journal
from instep.streaming.operations import StreamOperations
from instep.streaming.states import StreamStates
from instep_client.protocol.codes import HAVE_ALL
from tests.delivery import test_delivery
from tests.delivery.machine import Faults, numbers, run
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.heavy

STEPS = 60


def killed() -> None:
    @settings(
        max_examples=test_delivery.EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(numbers(STEPS))
    def lives(example: list[int]) -> None:
        run(Faults("commit"), example)

    lives()


def _sent_otherwise(change: Callable[[Tables, Any, I64, I64], None]) -> Callable[..., Any]:
    """A variant of `admit` that changes the columns that were sent: of known slots, with their origins."""

    def variant(original: Any, packed: Packed, messages: Any, sent: Any, x: Any) -> Any:
        tables, sent = Tables(*packed), sent.copy()
        slots = (sent["handle"] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
        change(tables, sent, slots, np.repeat(messages["origin"], messages["width"]))
        return original(packed, messages, sent, x)

    return variant


def repeats_are_new(tables: Tables, sent: Any, slots: I64, origins: I64) -> None:
    sent["seq"] = np.maximum(sent["seq"], tables.streams["next_seq"][slots])


def gaps_are_closed(tables: Tables, sent: Any, slots: I64, origins: I64) -> None:
    sent["seq"] = np.minimum(sent["seq"], tables.streams["next_seq"][slots])


def everything_is_acknowledged(tables: Tables, sent: Any, slots: I64, origins: I64) -> None:
    sent["acked"] = tables.streams["step_seq"][slots]


def every_handle_is_good(original: Any, packed: Packed, messages: Any, sent: Any, x: Any) -> Any:
    streams, sent = Tables(*packed).streams, sent[: messages["width"].sum()].copy()
    slots = (sent["handle"] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
    owners = streams["owner"].copy()
    is_open = owners[slots] >= 0
    sent["handle"][is_open] = streams["handle"][slots[is_open]]
    streams["owner"][slots[is_open]] = np.repeat(messages["origin"], messages["width"])[is_open]
    try:
        return original(packed, messages, sent, x)
    finally:
        streams["owner"][:] = owners


def next_frame_as_well(original: Any, packed: Packed, max_batch_size: int, max_steps: int) -> tuple[int, int]:
    tables = Tables(*packed)
    size, steps = original(packed, max_batch_size, max_steps)
    if steps == 1 and 0 < size < max_batch_size:
        slots = tables.run_slots[:size]
        behind = slots[tables.streams["next_seq"][slots] > tables.streams["step_seq"][slots] + 1][:1]
        if len(behind):
            tables.run_slots[size] = behind[0]
            tables.run_rows[size] = rows_of(tables, behind, tables.streams["step_seq"][behind] + 1)[0]
            return size + 1, 1
    return size, steps


@asynccontextmanager
async def for_a_moment(original: Any, states: StreamStates, slots: I64) -> AsyncIterator[None]:
    async with original(states, slots):
        pass
    yield


def forgetting_repeats(original: Any, packed: Packed, number: int) -> tuple[F32, I64]:
    y, skipped = original(packed, number)
    return y[:0], skipped


def keeping_frames_behind(original: Any, packed: Packed, slots: I64, codes: I32) -> Any:
    """Those behind a failed frame are answered as failed, but stay."""
    streams = Tables(*packed).streams
    step_seqs, next_seqs = streams["step_seq"][slots], streams["next_seq"][slots]
    count = original(packed, slots, codes)
    streams["next_seq"][slots] = streams["step_seq"][slots] = np.minimum(next_seqs, step_seqs + 1)
    return count


async def at_once(original: Any, journal: Journal, lsn: int) -> None:
    pass


def without_waiting(original: Any, *arguments: Any, waits: bool) -> None:
    original(*arguments, waits=False)


def one_less(original: Any, kind: Any, request: int, grants: Grants, durability: str) -> Any:
    return original(kind, request, replace(grants, next_seqs=np.maximum(grants.next_seqs - 1, 0)), durability)


def present_epochs(
    original: Any, table: Any, window: int, expired: Any, names: Any, have: Any, epochs: Any, *rest: Any
) -> Any:
    return original(table, window, expired, names, have, np.minimum(epochs, table.epoch[table.find(names)]), *rest)


def acknowledging_first(original: Any, table: Any, window: int, expired: Any, names: Any, have: Any, *rest: Any) -> Any:
    decision = original(table, window, expired, names, have, *rest)
    slots = decision.slots[decision.codes == 0]
    table.acked[slots] = np.maximum(table.acked[slots], decision.have[decision.codes == 0])
    return decision


def forgetting_what_was_replayed(
    original: Any, path: Any, header: Any, tables: Any, table: Any, dirty: Any, *rest: Any, **options: Any
) -> Any:
    result = original(path, header, tables, table, dirty, *rest, **options)
    dirty.mark_clean(np.arange(1, len(table.owner)))
    return result


def without_its_outputs(original: Any, operations: StreamOperations, origin: Any, handles: U64, have: U64) -> Any:
    return original(operations, origin, handles, np.full_like(have, HAVE_ALL))


def present_handles(original: Any, packed: Packed, handles: U64, origin: int, slots: I64, codes: I32) -> bool:
    streams = Tables(*packed).streams
    named = SlotAllocator.slots_named(handles)
    owners = streams["owner"].copy()
    is_open = owners[named] >= 0
    streams["owner"][named[is_open]] = origin
    try:
        has_repeated: bool = original(
            packed, np.where(is_open, streams["handle"][named], handles), origin, slots, codes
        )
    finally:
        streams["owner"][:] = owners
    return has_repeated


def at_no_time(original: Any, journal: Journal, slots: I64, states: U8 | None) -> int:
    original(journal, slots, states)
    return 0


def as_if_clean(original: Any, journal: Journal, slots: I64, states: U8 | None) -> int:
    lsn: int = original(journal, slots, states)
    journal.dirty.mark_clean(slots)
    return lsn


def without_resets(original: Any, recovered: Recovered) -> Iterator[Any]:
    return (replace(segment, marks=()) for segment in original(recovered))


def without_states(original: Any, journal: Journal, slots: I64, names: Sequence[str], states: U8 | None) -> int:
    lsn: int = original(journal, slots, names, None)
    return lsn


def from_the_first_frame(
    original: Any,
    operations: StreamOperations,
    origin: Any,
    names: Any,
    states: U8 | None,
    first_seqs: Any,
    *others: Any,
) -> Any:
    return original(operations, origin, names, states, None, *others)


RULES = (
    BrokenRule("a reply does not wait for what it rests on", Journal.record, without_waiting, [killed]),
    BrokenRule("an epoch is granted before it is durable", Journal.durable, at_once, [killed]),
    BrokenRule("a new owner is not recorded", Journal.resumed, lambda original, journal, slots: 0, [killed]),
    BrokenRule("a failed step is not recorded", Journal.failed, lambda original, journal, lsn, detail: lsn, [killed]),
    BrokenRule("a frame that was applied is applied again", admit, _sent_otherwise(repeats_are_new), [killed]),
    BrokenRule("a gap is taken for the next frame", admit, _sent_otherwise(gaps_are_closed), [killed]),
    BrokenRule(
        "the window is counted from the server's progress", admit, _sent_otherwise(everything_is_acknowledged), [killed]
    ),
    BrokenRule("a fenced owner's frames are applied", admit, every_handle_is_good, [killed]),
    BrokenRule("two frames of a stream are in one step", begin_run, next_frame_as_well, [killed]),
    BrokenRule(
        "a stream steps while its state is used",
        StreamStates.settled,
        for_a_moment,
        [test_delivery.test_a_stream_does_not_step_while_its_state_is_read],
    ),
    BrokenRule("a state is used while its stream steps", are_running, lambda original, packed, slots: False, [killed]),
    BrokenRule(
        "a stream changes hands while frames are pending", are_pending, lambda original, packed, slots: False, [killed]
    ),
    BrokenRule("a failed frame counts as applied", fail_run, keeping_frames_behind, [killed]),
    BrokenRule("a handle outlives its stream", SlotAllocator.renew, lambda original, slots, renewed: None, [killed]),
    BrokenRule(
        "a repeated frame is answered with what is in its place by then",
        repeated_outputs,
        forgetting_repeats,
        [test_delivery.test_a_repeated_frame_is_answered_although_another_has_taken_its_place],
    ),
    BrokenRule("a close loses outputs", StreamOperations.close, without_its_outputs, [killed]),
    BrokenRule("a resume expects a frame too early", encode.granted, one_less, [killed]),
    BrokenRule(
        "a resume acknowledges pending frames",
        check_resume,
        acknowledging_first,
        [test_delivery.test_a_pending_frame_is_not_acknowledged_by_a_takeover],
    ),
    BrokenRule(
        "an epoch that the server lost is taken for that of the stream it has",
        check_resume,
        present_epochs,
        [test_delivery.test_a_stream_of_before_a_power_loss_is_not_taken_for_a_later_one_of_its_name],
    ),
    BrokenRule(
        "a checkpoint forgets what changed while it was written",
        DirtyTracker.flushed,
        lambda original, tracker, slots: tracker.mark_clean(slots),
        [killed],
    ),
    BrokenRule(
        "a stream goes to sleep without its last frames",
        DirtyTracker.are_dirty,
        lambda original, tracker, slots: np.zeros(len(slots), np.bool_),
        [killed],
    ),
    BrokenRule("a sleeper is read before the recording has it", Journal.committed, at_once, [killed]),
    BrokenRule(
        "a checkpoint forgets what a restart replayed", resume_recording, forgetting_what_was_replayed, [killed]
    ),
    BrokenRule("a request of a fenced owner is done", resolve_handles, present_handles, [killed]),
    BrokenRule("a RESET is not recorded", Journal.reset, lambda original, journal, slots, states: 0, [killed]),
    BrokenRule("a RESET is answered before it is durable", Journal.reset, at_no_time, [killed]),
    BrokenRule("a checkpoint leaves out a RESET", Journal.reset, as_if_clean, [killed]),
    BrokenRule("a restart leaves out a RESET", Recovered.segments, without_resets, [killed]),
    BrokenRule("the first state of a copy is not recorded", Journal.opened, without_states, [killed]),
    BrokenRule("a copy begins with the first frame", StreamOperations.open, from_the_first_frame, [killed]),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_the_property_test_notices(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
