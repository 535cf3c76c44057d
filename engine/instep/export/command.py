"""The command `instep export`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from rich.console import Console

from instep.core.typing import F32
from instep.interrupts import Stopped
from instep.recording.commands import say_stopped, write_failure, write_json
from instep.recording.errors import RecordingError, with_advice
from instep.recording.reader import RecordingReader
from instep.recording.records import select_streams
from instep.recording.table import CHUNK_FRAMES, FrameTable, TableChunk
from instep_client.snapshots import rename_to_new
from instep_tools.formats.columns import input_columns, output_columns
from instep_tools.formats.table import StartState, TableHeader, TableRows, about_model
from instep_tools.formats.write import WRITERS, Format, format_of
from instep_tools.problems import CommandProblem, part_of
from instep_tools.sequences import RecordedSequences
from instep_tools.stream_plot import MOST_FRAMES, MOST_STREAMS, check_plot_path, plot_streams
from instep_tools.terminal import say, show_progress
from instep_tools.words import counted

EXPORTED: Final = 0
NOT_EXPORTED: Final = 2


@dataclass(frozen=True, slots=True)
class Export:
    """What to do."""

    file: Path
    """The recording."""
    format: Format | None = None
    """Of the output; None for what its suffix says, or parquet."""
    output: Path | None = None
    """The new file; None for the recording's name with the format's suffix."""
    streams: Sequence[str] = ()
    """Names or numbers; empty for all."""
    plot: Path | None = None
    """A picture of the first streams."""
    json: bool = False
    """Write one JSON object to standard output and nothing else."""
    chunk_frames: int = CHUNK_FRAMES
    """Frames that are read and written at once, about."""


def run(what: Export, console: Console) -> int:
    """Write a recording's frames and outputs into one file, and say what is in it.

    Returns:
        The exit status: 0, or 2 when it could not be exported.
    """
    try:
        done = _export(what)
    except (RecordingError, CommandProblem) as error:
        if what.json:
            write_failure(error, file=str(what.file), exported=False)
        else:
            say(console, f"not exported: {with_advice(error)}", "bold red")
        return NOT_EXPORTED
    except Stopped as stop:
        about = {"file": str(what.file), "exported": False} if what.json else {}
        say_stopped(stop, f"not exported: {stop}, and nothing was written", **about)
        raise
    if what.json:
        write_json(done.as_json(what))
    else:
        say(console, done.sentence(), "bold green")
    return EXPORTED


@dataclass(frozen=True, slots=True)
class Exported:
    """What came of it."""

    path: Path
    kind: Format
    table: FrameTable
    header: TableHeader
    finished: bool
    """Whether the recording was closed."""
    drawn: str
    """What the picture shows; empty without one."""

    def sentence(self) -> str:
        """One line for people."""
        table = self.table
        parts = [
            f"{self.path}: {counted(table.frames, 'frame')} of {counted(len(table.streams), 'stream')}, "
            f"{counted(table.features, 'input')} and {counted(table.outputs, 'output')} each, "
            f"{self.path.stat().st_size:,} bytes"
        ]
        if table.unanswered:
            parts.append(f"the outputs of {counted(table.unanswered, 'frame')} are not recorded, and NaN here")
        if self.kind == "csv" and self.header.states:
            which = counted(len({state.stream_id for state in self.header.states}), "stream")
            parts.append(f"CSV does not hold the states that {which} began with, which replay --check needs")
        if not self.finished:
            parts.append("the recording was not closed: exported up to its last commit")
        if self.drawn:
            parts.append(self.drawn)
        return "; ".join(parts)

    def as_json(self, what: Export) -> dict[str, object]:
        """The same for machines."""
        return {
            "file": str(what.file),
            "exported": True,
            "output": str(self.path),
            "format": self.kind,
            "frames": self.table.frames,
            "streams": len(self.table.streams),
            "features": self.table.features,
            "outputs": self.table.outputs,
            "unanswered": self.table.unanswered,
            "states": len(self.header.states),
            "finished": self.finished,
            "bytes": self.path.stat().st_size,
            "plot": None if what.plot is None else str(what.plot),
        }


def _export(what: Export) -> Exported:
    kind = _format_of(what)
    path = what.output or what.file.with_suffix(f".{kind}")
    with RecordingReader(what.file) as reader, new_file(path) as target:
        picture = None if what.plot is None else FirstFrames(what.plot)
        with show_progress("exporting") as on_progress:
            streams = reader.streams()
            selected = select_streams(streams, what.streams)
            on_share = partial(on_progress, "exporting")
            table = FrameTable(reader, streams, selected, on_share, chunk_frames=what.chunk_frames)
            header = _header(reader, table)
            names = np.array(table.names, np.object_)
            with WRITERS[kind](target, header) as writer:
                for chunk in table.chunks():
                    writer.add(_rows(chunk, names))
                    if picture is not None:
                        picture.add(chunk)
        drawn = "" if picture is None else picture.draw(table, f"{what.file.name} ({reader.header.model_name})", header)
        finished = reader.finished
    return Exported(path, kind, table, header, finished, drawn)


def _format_of(what: Export) -> Format:
    if what.output is None:
        return what.format or "parquet"
    named = format_of(what.output)
    if what.format is not None and named not in (None, what.format):
        raise CommandProblem(
            f"the name {what.output.name!r} says another format than --format {what.format}: leave one of them out"
        )
    kind = what.format or named
    if kind is None:
        raise CommandProblem(
            f"the name {what.output.name!r} says no format: let it end in .parquet, .npz, .csv or .mcap, "
            "or give --format"
        )
    return kind


def _header(reader: RecordingReader, table: FrameTable) -> TableHeader:
    """What goes with the rows: the model, and the states from which they follow."""
    of = reader.header
    chosen = {info.stream for info in table.streams}
    states = [
        StartState(info.stream, info.first_seq, None if info.initial_state is None else info.initial_state.tobytes())
        for info in table.streams
        if info.initial_state is not None
    ]
    states += [
        StartState(reset.stream, reset.seq, None if reset.state is None else reset.state.tobytes())
        for reset in reader.resets()
        if reset.stream in chosen
    ]
    about = about_model(of.model_name, of.model_fingerprint, of.arithmetic, of.instep_version)
    inputs, outputs = input_columns(table.features), output_columns(of, table.outputs)
    return TableHeader(inputs, outputs, about=about, spec=of.state_spec, states=states)


def _rows(chunk: TableChunk, names: np.ndarray[tuple[int, ...], np.dtype[np.object_]]) -> TableRows:
    ids = chunk.stream_ids.astype(np.int64)
    return TableRows(names[chunk.names], ids, chunk.seqs, chunk.times_ns, chunk.x, chunk.y)


class FirstFrames:
    """Keeps as many frames as a picture shows while the whole table goes by.

    Args:
        path: where the picture goes: a PNG, SVG or PDF.

    Raises:
        BadFile: when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        check_plot_path(path)
        self._path = path
        self._kept: dict[int, list[tuple[F32, F32]]] = {}
        self._counts: dict[int, int] = {}

    def add(self, chunk: TableChunk) -> None:
        """Keep what will be shown of these rows."""
        for name in np.unique(chunk.names).tolist():
            count = self._counts.get(name, 0)
            if count <= MOST_FRAMES and (name in self._kept or len(self._kept) < MOST_STREAMS):
                at = np.flatnonzero(chunk.names == name)
                self._kept.setdefault(name, []).append((chunk.x[at], chunk.y[at]))
                self._counts[name] = count + len(at)

    def draw(self, table: FrameTable, title: str, header: TableHeader) -> str:
        """Write the picture; what it shows, to end a sentence.

        Raises:
            BadFile: when it cannot be written.
        """
        chosen = sorted(self._kept)
        parts = [part for name in chosen for part in self._kept[name]]
        sequences = RecordedSequences(
            names=tuple(table.names[name] for name in chosen),
            lengths=np.array([self._counts[name] for name in chosen], np.int64),
            frames=np.concatenate([x for x, _ in parts] or [np.empty((0, table.features), np.float32)]),
            outputs=np.concatenate([y for _, y in parts] or [np.empty((0, table.outputs), np.float32)]),
        )
        return plot_streams(sequences, self._path, title, header.outputs, of=len(table.streams))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write inside; nothing is left when that fails or is interrupted, and nothing is written over.

    Raises:
        CommandProblem: when there is such a file already, or it cannot be written.
    """
    if os.path.lexists(path):
        raise _exists(path)
    unfinished = part_of(path)
    try:
        try:
            with unfinished.open("xb") as file:
                yield file
            try:
                rename_to_new(unfinished, path)
            except FileExistsError:
                raise _exists(path) from None
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise CommandProblem(f"cannot write {path}: {error.strerror or error}") from error


def _exists(path: Path) -> CommandProblem:
    return CommandProblem(f"{path} exists already and is not written over: move it, or name another with --output")
