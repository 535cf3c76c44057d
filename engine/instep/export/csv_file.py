"""CSV: a line of column names, then one line a frame; UTF-8.

Each float is written with the fewest digits that read back as the same float32.
"""

from __future__ import annotations

import csv
import io
from typing import BinaryIO

from instep.export.table import FrameTable


def write(table: FrameTable, file: BinaryIO) -> None:
    """Write the whole table.

    Raises:
        OSError: when it cannot be written.
        RecordingError: when the recording is damaged.
    """
    text = io.TextIOWrapper(file, "utf-8", newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(table.columns)
    for chunk in table.chunks():
        names = [table.names[at] for at in chunk.names.tolist()]
        columns = (names, chunk.stream_ids.tolist(), chunk.seqs.tolist(), chunk.times_ns.tolist(), chunk.x, chunk.y)
        for *labels, x, y in zip(*columns, strict=True):
            # The elements stay numpy's float32: their str() is the shortest, a Python float's has a double's digits.
            lines.writerow((*labels, *x, *y))
    text.detach()  # flushes; the file stays the caller's
