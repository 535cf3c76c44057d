"""npz: `stream`, `stream_id`, `seq`, `time_ns` [frames], `x` [frames, features], `y` [frames, outputs].

Columns grow in temporary files beside the output and are then copied into it, one after another: no more than a chunk
is ever in memory.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from instep.export.table import FrameTable

_COPY_BYTES: Final = 2**20


def write(table: FrameTable, file: BinaryIO) -> None:
    """Write the whole table.

    Raises:
        OSError: when it cannot be written, or there is no room for as much again while it is made.
        RecordingError: when the recording is damaged.
    """
    longest = max(map(len, table.names), default=0)
    names = np.array(table.names, f"<U{max(longest, 1)}")
    columns: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {
        "stream": (names.dtype, ()),
        "stream_id": (np.dtype("<u4"), ()),
        "seq": (np.dtype("<u8"), ()),
        "time_ns": (np.dtype("<i8"), ()),
        "x": (np.dtype("<f4"), (table.features,)),
        "y": (np.dtype("<f4"), (table.outputs,)),
    }
    with ExitStack() as stack:
        beside = Path(file.name).parent
        held = {name: stack.enter_context(tempfile.TemporaryFile(dir=beside, prefix=".instep-")) for name in columns}
        for chunk in table.chunks():
            rows = (names[chunk.names], chunk.stream_ids, chunk.seqs, chunk.times_ns, chunk.x, chunk.y)
            for (name, (dtype, _)), values in zip(columns.items(), rows, strict=True):
                held[name].write(np.ascontiguousarray(values, dtype).data.cast("B"))
        with zipfile.ZipFile(file, "w") as archive:
            for name, (dtype, width) in columns.items():
                shape = (table.frames, *width)
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    held[name].seek(0)
                    shutil.copyfileobj(held[name], member, _COPY_BYTES)
