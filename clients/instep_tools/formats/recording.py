"""Reading an engine's recording, with the engine's own reader: it needs nothing but sqlite3 and numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from instep_tools.formats.grouping import grouped
from instep_tools.formats.table import StartState, TableHeader
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences


def read_recording(path: Path) -> RecordedSequences:
    """All streams of a recording, in the order in which they opened; of one still being written, up to its last commit.

    Where the state of a stream was reset, what follows is a sequence of its own. Sequences without a frame are left
    out, and so are the frames of steps that failed. Times are nanoseconds since 1970.

    Raises:
        BadFile: it is no recording, it is damaged, or it holds no frames.
    """
    from instep.recording.errors import RecordingError
    from instep.recording.reader import RecordingReader
    from instep.recording.records import RecordedFrames
    from instep.recording.table import StreamIndex, known_outputs, read_frames

    try:
        with RecordingReader(path) as reader:
            streams, header = reader.streams(), reader.header
            frames = RecordedFrames.join(list(read_frames(reader, streams, range(len(streams)))))
            resets = list(reader.resets())
            states = [StartState(*start) for start in reader.start_states(streams)]
    except RecordingError as error:
        bag = " (a ROS 2 bag has to be converted: `mcap convert BAG.db3 BAG.mcap`)" if path.suffix == ".db3" else ""
        raise BadFile(f"{error}{bag}") from None
    if not len(frames):
        raise BadFile(f"{path} holds no frames")
    rows = StreamIndex(streams).rows(frames.streams)
    present, codes = np.unique(rows, return_inverse=True)
    opened = [(streams[row].name, streams[row].stream) for row in present.tolist()]
    begins = {(info.stream, info.first_seq): (info.opened_position, info.opened_ns) for info in streams}
    begins |= {(stream, seq): (reset.position, reset.time_ns) for stream, seq, reset in resets}
    about = {"fingerprint": header.model_fingerprint, "model": header.model_name}
    table = TableHeader(about=about, spec=header.state_spec, states=states)
    columns = (frames.seqs, frames.times_ns, frames.x, known_outputs(frames), frames.answered)
    sequences, keys = grouped(path, opened, codes, *columns, table)
    sequences = replace(sequences, opened_ns=np.array([begins[key][1] for key in keys], np.int64))
    order = sorted(range(len(keys)), key=lambda row: begins[keys[row]][0])
    return sequences if order == list(range(len(keys))) else sequences.select(order)
