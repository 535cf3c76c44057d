"""The end of runs: advances their streams, and finds the messages whose outputs are complete."""

from __future__ import annotations

from typing import Final

from instep.core.compiled import kernel
from instep.core.scheduler import push_ready
from instep.core.tables import PENDING_FRAMES, STRIDE, WINDOW, Packed, Tables
from instep.core.typing import I64
from instep_client.protocol.codes import Code

_SEQ_GAP: Final = int(Code.SEQ_GAP)


@kernel
def finish_run(packed: Packed, slots: I64, steps: int, now_ns: int, has_succeeded: bool) -> int:
    """Record that `steps` steps of a run over `slots`, int64 [B], were applied.

    The streams may step again if the run succeeded. After a run that failed, `fail_run` follows for the steps that were
    not applied.

    Returns:
        The number of messages that are complete now; `complete` begins with their numbers.
    """
    tables = Tables(*packed)
    counts, streams, remaining = tables.counts, tables.streams, tables.messages["remaining"]
    complete, count = tables.complete, 0
    for step in range(steps):
        for slot in slots:
            row = (streams["step_seq"][slot] + step) % counts[WINDOW] * counts[STRIDE] + slot
            number = tables.frame_message[row]
            remaining[number] -= 1
            if remaining[number] == 0:
                complete[count] = number
                count += 1
    counts[PENDING_FRAMES] -= len(slots) * steps
    for slot in slots:
        streams["step_seq"][slot] += steps
        if has_succeeded:
            streams["running"][slot] = 0
            push_ready(tables, slot, now_ns)
    return count


@kernel
def hold(packed: Packed, slots: I64) -> None:
    """Keep streams, int64 [N], from beginning further steps until `release`."""
    tables = Tables(*packed)
    for slot in slots:
        tables.streams["holds"][slot] += 1


@kernel
def release(packed: Packed, slots: I64, now_ns: int) -> None:
    """Undo one `hold` of streams, int64 [N]; those that are no longer held and have frames become ready."""
    tables = Tables(*packed)
    for slot in slots:
        tables.streams["holds"][slot] -= 1
        push_ready(tables, slot, now_ns)


@kernel
def are_running(packed: Packed, slots: I64) -> bool:
    """Whether any of these streams, int64 [N], is in a run."""
    tables = Tables(*packed)
    running = 0
    for slot in slots:
        running |= tables.streams["running"][slot]
    return running != 0


@kernel
def are_pending(packed: Packed, slots: I64) -> bool:
    """Whether any of these streams, int64 [N], has unanswered frames."""
    tables = Tables(*packed)
    pending = 0
    for slot in slots:
        pending |= tables.streams["unanswered"][slot]
    return pending != 0


@kernel
def fail_run(packed: Packed, slots: I64, code: int) -> int:
    """Remove all pending frames of these streams, int64 [B], because they cannot be applied, and end their run.

    The oldest pending frame of each fails with `code`. Those behind it fail with SEQ_GAP, or with the same code where
    the state is lost and the stream is about to end.

    Returns:
        The count of messages that are complete now; `complete` begins with their numbers.
    """
    tables = Tables(*packed)
    counts, streams, messages, columns = tables.counts, tables.streams, tables.messages, tables.columns
    complete, count = tables.complete, 0
    for slot in slots:
        first = streams["step_seq"][slot]
        for seq in range(first, streams["next_seq"][slot]):
            number = tables.frame_message[seq % counts[WINDOW] * counts[STRIDE] + slot]
            column = messages["head"][number]
            while columns["slot"][column] != slot or columns["fresh"][column] == 0:
                column = columns["next"][column]
            timestep = seq - columns["seq"][column]
            if timestep < columns["length"][column]:  # its first frame that fails
                columns["length"][column] = timestep
                columns["code"][column] = code if seq == first or streams["lost"][slot] else _SEQ_GAP
                columns["expected_seq"][column] = first
            messages["remaining"][number] -= 1
            if messages["remaining"][number] == 0:
                complete[count] = number
                count += 1
        counts[PENDING_FRAMES] -= streams["next_seq"][slot] - first
        streams["next_seq"][slot] = first
        streams["running"][slot] = 0
    return count
