"""`instep recordings state`: a recorded stream before any of its frames, on the terminal, in a file, as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.text import Text

from instep.core.typing import U8
from instep.recording.commands import write_json
from instep.recording.reader import RecordingReader
from instep.recording.schema import RecordingHeader
from instep.timetravel.past import Moment, NoSuchMoment, Past, in_words
from instep.verify.recorded_model import recorded_model
from instep_client.protocol.state_spec import StateSpec
from instep_client.snapshots import StreamSnapshot
from instep_client.states import as_state
from instep_tools.formats.columns import input_columns, output_columns
from instep_tools.state import check_new, plain, save_new, state_lines
from instep_tools.stream_plot import MOST_FRAMES, Panel, check_plot_path, plot_panels
from instep_tools.terminal import show_progress
from instep_tools.words import folded

DRAWN_FRAMES: Final = 200
"""Frames before the moment that are drawn where no others are asked for."""
DRAWN_VALUES: Final = 64
"""Of a state; all of them are in its norm."""


@dataclass(frozen=True, slots=True)
class Look:
    """The arguments of the command."""

    file: Path
    """The recording."""
    stream: str
    """Name or number."""
    seq: int | None = None
    """Of the frame; None for after the last one."""
    model_folder: Path | None = None
    """None for where the recording says."""
    out: Path | None = None
    """A new snapshot file."""
    plot: Path | None = None
    frames: tuple[int, int] | None = None
    """Of the picture: the first one and the one after the last."""
    json: bool = False
    """Write one JSON object to standard output and nothing else."""


def run(what: Look, console: Console) -> None:
    """Show a recorded stream's state before a frame, and save and draw it where that is asked for.

    Raises:
        RecordingError, CannotVerify, CommandProblem: when the state cannot be had exactly, or a file not be written.
    """
    if what.out is not None:
        check_new(what.out, "--out")
    if what.plot is not None:
        check_plot_path(what.plot)
    with travelling(what.file, what.stream, what.model_folder) as (past, header):
        moment = past.before(what.seq)
        taken = as_snapshot(moment, header)
        if what.out is not None:
            save_new(taken, what.out, "--out")
        drawn = "" if what.plot is None else _draw(what, what.plot, past, moment, header)
    norms = _norms(moment.state[None], header.state_spec)
    if what.json:
        write_json(_as_json(what, moment, taken, {leaf: float(norm[0]) for leaf, norm in norms.items()}))
        return
    leaves = ", ".join(
        f"{leaf.name} {leaf.dtype} {list(leaf.shape)} with norm {norms[leaf.name][0]:.6g}"
        for leaf in header.state_spec.leaves
    )
    several = f", the newest of {moment.openings} of this name," if moment.openings > 1 else ""
    about = f"stream {moment.info.stream} ({moment.info.name!r}){several} before frame {moment.seq}: {leaves}"
    results = [in_words(moment), f"saved in {what.out}" if what.out is not None else "", drawn]
    for line in [*folded(about), *state_lines(taken.state, header.state_spec)]:
        console.print(Text(line), soft_wrap=True, highlight=False)
    for line in folded("; ".join(filter(None, results))):
        console.print(Text(line, "bold green"), soft_wrap=True, highlight=False)


@contextmanager
def travelling(file: Path, stream: str, model_folder: Path | None) -> Iterator[tuple[Past, RecordingHeader]]:
    """The past of a stream, with the header of its recording; it shows how far that is read."""
    with RecordingReader(file) as reader:
        model = recorded_model(reader.header, model_folder)
        with show_progress("reading") as on_progress:
            past = Past(reader, model, stream, partial(on_progress, "reading"))
        yield past, reader.header


def as_snapshot(moment: Moment, header: RecordingHeader) -> StreamSnapshot:
    """The state as a client takes it from a live stream."""
    state = as_state(moment.state[None], header.state_spec, single=True)
    return StreamSnapshot(moment.info.name, moment.seq, state, header.model_fingerprint, header.model_name)


def _as_json(what: Look, moment: Moment, taken: StreamSnapshot, norms: dict[str, float]) -> dict[str, Any]:
    return {
        "file": str(what.file),
        "stream": moment.info.name,
        "number": moment.info.stream,
        "seq": moment.seq,
        "model": taken.model,
        "fingerprint": taken.fingerprint,
        "origin": moment.origin,
        "origin_seq": moment.origin_seq,
        "replayed_frames": moment.replayed,
        "compared_frames": moment.compared,
        "norm": {leaf: plain(norm) for leaf, norm in norms.items()},
        "state": plain(taken.state),
        "out": None if what.out is None else str(what.out),
        "plot": None if what.plot is None else str(what.plot),
    }


def _draw(what: Look, path: Path, past: Past, moment: Moment, header: RecordingHeader) -> str:
    """Inputs, outputs and states of a range of frames; what was drawn, to end a sentence."""
    first, end = what.frames or (max(moment.first_seq, moment.seq - DRAWN_FRAMES), moment.seq)
    if not 0 <= first < end:
        raise NoSuchMoment(
            f"there are no frames from {first} to {end} to draw: name a first one and the one after the last with "
            "--frames A:B"
        )
    if end - first > MOST_FRAMES:
        raise NoSuchMoment(f"{end - first:,} frames are too many for a picture: draw at most {MOST_FRAMES:,}")
    span, states = past.states(first, end)
    norms, values = _norms(states, header.state_spec), _values(states, header.state_spec)
    inputs, outputs = input_columns(header.features), output_columns(header, header.outputs)
    panels = [
        Panel("inputs", span.x, inputs),
        Panel("outputs", span.y, outputs),
        Panel("norm of the state", np.stack(list(norms.values()), axis=1).astype(np.float32), list(norms)),
        Panel(
            "state" if len(values) <= DRAWN_VALUES else f"state, the first {DRAWN_VALUES} of {len(values)}",
            np.stack(list(values.values())[:DRAWN_VALUES], axis=1).astype(np.float32),
            list(values)[:DRAWN_VALUES],
        ),
    ]
    plot_panels(path, f"{moment.info.name} in {what.file.name}, after each frame", first, panels)
    return f"frames {first:,} to {end - 1:,} drawn in {path}"


def _norms(rows: U8, spec: StateSpec) -> dict[str, Any]:
    """The Euclidean norm of each leaf, float64 [N], by name."""
    with np.errstate(all="ignore"):  # a network may have computed NaN or infinity
        return {
            name: np.linalg.norm(leaf.reshape(len(rows), -1).astype(np.float64), axis=1)
            for name, leaf in spec.unpack(rows).items()
        }


def _values(rows: U8, spec: StateSpec) -> dict[str, Any]:
    """Each element of the state, [N], by the name of its leaf and its number there."""
    leaves = {name: leaf.reshape(len(rows), -1) for name, leaf in spec.unpack(rows).items()}
    return {f"{name}{at}": leaf[:, at] for name, leaf in leaves.items() for at in range(leaf.shape[1])}
