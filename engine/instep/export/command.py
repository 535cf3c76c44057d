"""The command `instep export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from instep.recording.reader import RecordingReader
from instep.recording.records import StreamInfo, select_streams
from instep.recording.table import PART_FRAMES, StreamIndex, known_outputs, read_frames
from instep_tools.formats.columns import input_columns, output_columns
from instep_tools.formats.table import StartState, TableHeader, TableRows, about_model
from instep_tools.formats.write import written_table
from instep_tools.terminal import say, show_progress
from instep_tools.words import counted


@dataclass(frozen=True, slots=True)
class Export:
    """The arguments of the command."""

    file: Path
    """The recording."""
    output: Path | None = None
    """The new file, whose suffix selects its format; None for Parquet next to the recording."""
    streams: Sequence[str] = ()
    """Names or numbers; empty for all."""
    part_frames: int = PART_FRAMES
    """The approximate number of frames read and written at once."""


def run(what: Export, console: Console) -> None:
    """Write a recording's frames and outputs into one file, and print a summary of it.

    Raises:
        CommandProblem, RecordingError: when it cannot be exported; the file is then removed.
    """
    say(console, _export(what), "bold green")


def _export(what: Export) -> str:
    path = what.output or what.file.with_suffix(".parquet")
    frames = unanswered = 0
    with RecordingReader(what.file) as reader, show_progress("exporting") as on_progress:
        streams = reader.streams()
        selected = select_streams(streams, what.streams)
        chosen = [streams[at] for at in selected]
        header = _header(reader, chosen)
        names = np.array([info.name for info in chosen], np.object_)
        index = StreamIndex(chosen)
        with written_table(path, header, new="--output") as writer:
            for part in read_frames(reader, streams, selected, on_progress, part_frames=what.part_frames):
                labels = (names[index.rows(part.streams)], part.streams, part.seqs.astype(np.uint64), part.times_ns)
                writer.write(TableRows(*labels, part.x, known_outputs(part)))
                frames, unanswered = frames + len(part), unanswered + int((~part.answered).sum())
        parts = [
            f"{path}: {counted(frames, 'frame')} of {counted(len(chosen), 'stream')}, "
            f"{counted(len(header.inputs), 'input')} and {counted(len(header.outputs), 'output')} each"
        ]
        if unanswered:
            parts.append(f"the outputs of {counted(unanswered, 'frame')} are not recorded, and NaN here")
        if path.suffix.lower() == ".csv" and header.states:
            which = counted(len({state.stream_id for state in header.states}), "stream")
            parts.append(f"CSV does not hold the states that {which} began with, which replay --check needs")
        if not reader.finished:
            parts.append("the recording was not closed: exported up to its last commit")
    return "; ".join(parts)


def _header(reader: RecordingReader, streams: Sequence[StreamInfo]) -> TableHeader:
    """The model, and the states from which the rows follow."""
    of = reader.header
    about = about_model(of.model_name, of.model_fingerprint, of.arithmetic, of.instep_version)
    inputs, outputs = input_columns(of.features), output_columns(of, of.outputs)
    states = [StartState(*start) for start in reader.start_states(streams)]
    return TableHeader(inputs, outputs, about=about, spec=of.state_spec, states=states)
