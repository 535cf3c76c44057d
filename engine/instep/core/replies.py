"""Replies as arrays: the outputs of complete messages, side by side for each origin."""

from __future__ import annotations

import numpy as np

from instep.core.compiled import inlined, kernel
from instep.core.histogram import add_to
from instep.core.tables import (
    ARRIVED_NS,
    FAILED,
    FIRST_COLUMN,
    FIRST_MESSAGE,
    FIRST_VALUE,
    FRAMES,
    FREE_COLUMN,
    FREE_COLUMNS,
    FREE_MESSAGE,
    FREE_MESSAGES,
    MESSAGES,
    NOTHING,
    ORIGIN_OF,
    STRIDE,
    TIMESTEPS,
    WIDTH,
    WINDOW,
    Packed,
    Tables,
)
from instep.core.typing import F32, I32, I64


@inlined
def _group(tables: Tables, numbers: I32, max_frames: int, max_messages: int) -> tuple[int, int]:
    """Group messages by origin and length, in order, while their outputs fit; return the numbers of both.

    While they are grouped, `messages["next_free"]` holds the group of each.
    """
    messages, groups, newest = tables.messages, tables.groups, tables.origins["group"]
    outputs, values = tables.y.shape[1], 0
    for number in numbers:
        newest[messages["origin"][number]] = NOTHING
    count = taken = 0
    for number in numbers:
        origin, timesteps = messages["origin"][number], messages["timesteps"][number]
        width = messages["width"][number]
        values += timesteps * width * outputs
        if values > len(tables.reply_y):
            break
        group = newest[origin]
        if (
            group == NOTHING
            or groups[group, TIMESTEPS] != timesteps
            or groups[group, MESSAGES] == max_messages
            or (groups[group, WIDTH] + width) * timesteps > max_frames
        ):
            group = newest[origin] = count
            groups[group, :] = 0
            groups[group, ORIGIN_OF], groups[group, TIMESTEPS] = origin, timesteps
            groups[group, ARRIVED_NS] = messages["arrived_ns"][number]
            count += 1
        messages["next_free"][number] = group
        groups[group, WIDTH] += width
        groups[group, MESSAGES] += 1
        groups[group, FRAMES] += messages["frames"][number]
        taken += 1
    first_message = first_column = first_value = 0
    for group in range(count):
        groups[group, FIRST_MESSAGE], groups[group, FIRST_COLUMN] = first_message, first_column
        groups[group, FIRST_VALUE] = first_value
        first_message += groups[group, MESSAGES]
        first_column += groups[group, WIDTH]
        first_value += groups[group, WIDTH] * groups[group, TIMESTEPS] * outputs
        groups[group, MESSAGES] = 0  # counted again as messages are written
    return count, taken


@kernel
def assemble(
    packed: Packed, numbers: I32, began_ns: int, max_frames: int, max_messages: int, queue_us: I64
) -> tuple[int, int]:
    """Write the replies of complete messages, and free the messages.

    Args:
        packed: all tables.
        numbers: int32 [M], the messages.
        began_ns: the beginning of the step of their last frames; 0 if nothing was computed.
        max_frames: the largest T × N of a group of several messages.
        max_messages: the most messages of a group.
        queue_us: the histogram of the microseconds for which messages waited for that step.

    Returns:
        groups: the count of groups; `reply_messages`, `reply_columns` and `reply_y` have their messages, columns and
            outputs.
        taken: the number of messages answered; fewer than M if the outputs do not fit into `reply_y`.
    """
    tables = Tables(*packed)
    counts, messages, streams, records = tables.counts, tables.messages, tables.streams, tables.columns
    groups, columns, y, outputs = tables.groups, tables.reply_columns, tables.reply_y, tables.y.shape[1]
    count, taken = _group(tables, numbers, max_frames, max_messages)
    for number in numbers[:taken]:
        group, width = messages["next_free"][number], messages["width"][number]
        timesteps, stride = messages["timesteps"][number], groups[group, WIDTH] * outputs
        message_at = groups[group, FIRST_MESSAGE] + groups[group, MESSAGES]
        groups[group, MESSAGES] += 1
        tables.reply_messages[0, message_at] = messages["tag"][number]
        tables.reply_messages[1, message_at] = width
        tables.reply_messages[2, message_at] = number
        column = messages["head"][number]
        for _ in range(width):
            slot, seq, length = records["slot"][column], records["seq"][column], records["length"][column]
            at = groups[group, FIRST_COLUMN]
            groups[group, FIRST_COLUMN] += 1
            columns[0, at], columns[1, at] = records["code"][column], length
            columns[2, at] = records["expected_seq"][column]
            groups[group, FAILED] += records["code"][column] != 0
            first = groups[group, FIRST_VALUE]
            groups[group, FIRST_VALUE] += outputs
            for step in range(length):
                held = tables.y[(seq + step) % counts[WINDOW] * counts[STRIDE] + slot]
                place = y[first + step * stride : first + step * stride + outputs]
                for value in range(outputs):
                    place[value] = held[value]
            for step in range(length, timesteps):
                y[first + step * stride : first + step * stride + outputs] = np.nan
            streams["unanswered"][slot] -= records["fresh"][column]
            last_column, column = column, records["next"][column]
        records["next"][last_column] = counts[FREE_COLUMN]
        counts[FREE_COLUMN] = messages["head"][number]
        counts[FREE_COLUMNS] += width
        messages["next_free"][number] = counts[FREE_MESSAGE]
        counts[FREE_MESSAGE] = number
        counts[FREE_MESSAGES] += 1
        origin = messages["origin"][number]
        tables.origins["unanswered"][origin] -= messages["frames"][number]
        tables.origins["messages"][origin] -= 1
        if began_ns:
            add_to(queue_us, (began_ns - messages["arrived_ns"][number]) // 1000, 1)
    for group in range(count):  # back to the first of each
        groups[group, FIRST_COLUMN] -= groups[group, WIDTH]
        groups[group, FIRST_VALUE] -= groups[group, WIDTH] * outputs
    return count, taken


@kernel
def _copy_repeated(packed: Packed, number: int, y: F32, skipped: I64) -> None:
    tables = Tables(*packed)
    counts, records, outputs = tables.counts, tables.columns, tables.y.shape[1]
    column = tables.messages["head"][number]
    for place in range(len(skipped)):
        skipped[place] = records["skipped"][column]
        for step in range(skipped[place]):
            row = (records["seq"][column] + step) % counts[WINDOW] * counts[STRIDE] + records["slot"][column]
            for value in range(outputs):
                y[step, place, value] = tables.y[row, value]
        column = records["next"][column]


def repeated_outputs(packed: Packed, number: int) -> tuple[F32, I64]:
    """Copy the outputs that a pending message only repeats.

    The client may acknowledge them before the message is answered, and later frames reuse their rows.

    Returns:
        y: float32 [most repeats, N, outputs].
        skipped: int64 [N], the number of timesteps of each column in `y`.
    """
    tables = Tables(*packed)
    message = tables.messages[number]
    y = np.empty((message["repeats"], message["width"], tables.y.shape[1]), np.float32)
    skipped = np.empty(message["width"], np.int64)
    _copy_repeated(packed, number, y, skipped)
    return y, skipped
