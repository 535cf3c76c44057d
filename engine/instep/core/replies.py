"""Replies as arrays: the outputs of complete messages, those of one origin next to each other."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.compiled import kernel
from instep.core.histogram import add_to
from instep.core.tables import (
    FREE_COLUMN,
    FREE_COLUMNS,
    FREE_MESSAGE,
    FREE_MESSAGES,
    NOTHING,
    STRIDE,
    WINDOW,
    Tables,
)
from instep.core.typing import F32, I32, I64

# Fields of a group of messages that are answered together, as columns of an int64 array.
ORIGIN_OF: Final = 0
TIMESTEPS: Final = 1
WIDTH: Final = 2  # columns of all its messages
MESSAGES: Final = 3
FIRST_MESSAGE: Final = 4
FIRST_COLUMN: Final = 5
FIRST_VALUE: Final = 6  # of its outputs
FAILED: Final = 7  # columns with a code
FRAMES: Final = 8  # that were to be computed
_FIELDS: Final = 9


@kernel
def group_messages(tables: Tables, numbers: I32, max_frames: int, max_messages: int) -> tuple[I64, I32]:
    """Group complete messages by origin and length, in order.

    Args:
        tables: everything.
        numbers: int32 [M], the messages.
        max_frames: T × N of a group of several messages.
        max_messages: of a group.

    Returns:
        groups: int64 [groups, fields], as the constants above name them.
        group_of: int32 [M].
    """
    messages, newest = tables.messages, tables.origins["group"]
    groups = np.zeros((len(numbers), _FIELDS), np.int64)
    group_of = np.empty(len(numbers), np.int32)
    for number in numbers:
        newest[messages["origin"][number]] = NOTHING
    count = 0
    for place in range(len(numbers)):
        number = numbers[place]
        origin, timesteps = messages["origin"][number], messages["timesteps"][number]
        width = messages["width"][number]
        group = newest[origin]
        if (
            group == NOTHING
            or groups[group, TIMESTEPS] != timesteps
            or groups[group, MESSAGES] == max_messages
            or (groups[group, WIDTH] + width) * timesteps > max_frames
        ):
            group = newest[origin] = count
            groups[group, ORIGIN_OF], groups[group, TIMESTEPS] = origin, timesteps
            count += 1
        group_of[place] = group
        groups[group, WIDTH] += width
        groups[group, MESSAGES] += 1
        groups[group, FRAMES] += messages["frames"][number]
    outputs = tables.y.shape[1]
    for group in range(1, count):
        before = group - 1
        groups[group, FIRST_MESSAGE] = groups[before, FIRST_MESSAGE] + groups[before, MESSAGES]
        groups[group, FIRST_COLUMN] = groups[before, FIRST_COLUMN] + groups[before, WIDTH]
        values = groups[before, WIDTH] * groups[before, TIMESTEPS] * outputs
        groups[group, FIRST_VALUE] = groups[before, FIRST_VALUE] + values
    return groups[:count], group_of


@kernel
def assemble(
    tables: Tables, numbers: I32, groups: I64, group_of: I32, began_ns: int, queue_us: I64
) -> tuple[I64, I64, I64, I64, F32]:
    """Write the replies of complete messages and forget the messages.

    Args:
        tables: everything.
        numbers: int32 [M], the messages.
        groups: as `group_messages` made them; `FAILED` is set.
        group_of: likewise.
        began_ns: when the step of their last frames began; 0 where nothing was computed.
        queue_us: a histogram of the microseconds that messages waited for that step.

    Returns:
        tags: int64 [M], by group.
        widths: int64 [M], likewise.
        arrived_ns: int64 [groups], of the first message of each.
        columns: int64 [3, columns], likewise: codes, lengths and expected seqs.
        y: float32 [values], of each group [T, N, outputs], NaN where a frame was not applied.
    """
    counts, messages, streams, records = tables.counts, tables.messages, tables.streams, tables.columns
    outputs, last = tables.y.shape[1], len(groups) - 1
    tags, widths = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
    columns = np.empty((3, groups[last, FIRST_COLUMN] + groups[last, WIDTH]), np.int64)
    y = np.empty(groups[last, FIRST_VALUE] + groups[last, WIDTH] * groups[last, TIMESTEPS] * outputs, np.float32)
    arrived_ns = np.empty(len(groups), np.int64)
    message_at = groups[:, FIRST_MESSAGE].copy()
    column_at = groups[:, FIRST_COLUMN].copy()
    for place in range(len(numbers)):
        number, group = numbers[place], group_of[place]
        if message_at[group] == groups[group, FIRST_MESSAGE]:
            arrived_ns[group] = messages["arrived_ns"][number]
        tags[message_at[group]], widths[message_at[group]] = messages["tag"][number], messages["width"][number]
        message_at[group] += 1
        timesteps, stride = messages["timesteps"][number], groups[group, WIDTH] * outputs
        column = messages["head"][number]
        for _ in range(messages["width"][number]):
            slot, seq, length = records["slot"][column], records["seq"][column], records["length"][column]
            at = column_at[group]
            column_at[group] += 1
            columns[0, at], columns[1, at] = records["code"][column], length
            columns[2, at] = records["expected_seq"][column]
            groups[group, FAILED] += records["code"][column] != 0
            first = groups[group, FIRST_VALUE] + (at - groups[group, FIRST_COLUMN]) * outputs
            for step in range(length):
                row = (seq + step) % counts[WINDOW] * counts[STRIDE] + slot
                for value in range(outputs):
                    y[first + step * stride + value] = tables.y[row, value]
            for step in range(length, timesteps):
                for value in range(outputs):
                    y[first + step * stride + value] = np.nan
            streams["pending"][slot] -= records["fresh"][column]
            last_column, column = column, records["next"][column]
        records["next"][last_column] = counts[FREE_COLUMN]
        counts[FREE_COLUMN] = messages["head"][number]
        counts[FREE_COLUMNS] += messages["width"][number]
        messages["next_free"][number] = counts[FREE_MESSAGE]
        counts[FREE_MESSAGE] = number
        counts[FREE_MESSAGES] += 1
        origin = messages["origin"][number]
        tables.origins["unanswered"][origin] -= messages["frames"][number]
        tables.origins["messages"][origin] -= 1
        if began_ns:
            add_to(queue_us, (began_ns - messages["arrived_ns"][number]) // 1000, 1)
    return tags, widths, arrived_ns, columns, y


@kernel
def repeated_outputs(tables: Tables, number: int) -> tuple[F32, I64]:
    """The outputs that a pending message only repeats.

    The client may acknowledge them before the message is answered, and later frames take their rows.

    Returns:
        y: float32 [most repeats, N, outputs].
        skipped: int64 [N], how many timesteps of each column `y` holds.
    """
    counts, records, outputs = tables.counts, tables.columns, tables.y.shape[1]
    repeats, width = tables.messages["repeats"][number], tables.messages["width"][number]
    y, skipped = np.empty((repeats, width, outputs), np.float32), np.empty(width, np.int64)
    column = tables.messages["head"][number]
    for place in range(width):
        skipped[place] = records["skipped"][column]
        for step in range(skipped[place]):
            row = (records["seq"][column] + step) % counts[WINDOW] * counts[STRIDE] + records["slot"][column]
            for value in range(outputs):
                y[step, place, value] = tables.y[row, value]
        column = records["next"][column]
    return y, skipped
