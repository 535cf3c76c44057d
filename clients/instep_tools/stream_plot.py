"""Inputs and outputs of streams as a picture: a row for each stream, lines or heat maps over the frames."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from instep_client.protocol.wire import F32
from instep_tools.pictures import save
from instep_tools.problems import BadFile, check_drawable, write_file
from instep_tools.sequences import RecordedSequences
from instep_tools.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_STREAMS: Final = 8
MOST_FRAMES: Final = 20_000
"""More of a stream would be less than a pixel each."""
MOST_LINES: Final = 6
"""More numbers a frame than that are a heat map."""
MOST_NAMES: Final = 16
"""More rows of a heat map have numbers instead."""
SUFFIXES: Final = (".png", ".svg", ".pdf")


def check_plot_path(path: Path) -> None:
    """Find out before the work whether a picture can be made there.

    Raises:
        BadFile: when it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadFile(f"cannot tell from the name {path} how to draw: it must end in {', '.join(SUFFIXES)}")
    check_drawable(path, "a picture")


def plot_streams(sequences: RecordedSequences, path: Path, title: str, outputs: Sequence[str], of: int = 0) -> str:
    """Draw the first streams with their outputs; an older picture of that name is replaced.

    The path ends in .png, .svg or .pdf. `outputs` are the names of the outputs; `of` says how many streams there are,
    where `sequences` are only the first of them.

    Returns:
        What was drawn, to end a sentence.

    Raises:
        BadFile: when it cannot be written.
    """
    from matplotlib.figure import Figure

    shown = sequences.select(range(min(MOST_STREAMS, len(sequences))))
    if not len(shown) or shown.outputs is None:
        return "there was nothing to draw"
    figure = Figure(figsize=(12, 1.2 + 1.7 * len(shown)), layout="constrained")
    figure.suptitle(_plain(title), fontsize=13)
    grid = figure.subplots(len(shown), 2, squeeze=False)
    inputs = [f"x{at}" for at in range(shown.features)]
    sides = ((shown.frames, inputs, "inputs"), (shown.outputs, outputs, "outputs"))
    for column, (values, names, what) in zip(grid.T, sides, strict=True):
        parts = [
            values[start : start + min(int(length), MOST_FRAMES)]
            for start, length in zip(shown.starts, shown.lengths, strict=True)
        ]
        column[0].set_title(f"{what} ({len(names)})", fontsize=11, loc="left")
        column[-1].set_xlabel("frame")
        draw = _draw_lines if len(names) <= MOST_LINES else _draw_maps
        draw(figure, column, parts, [*map(_plain, names)])
    for axes, name in zip(grid[:, 0], shown.names, strict=True):
        axes.set_ylabel(_plain(name if len(name) <= 16 else f"…{name[-15:]}"), fontsize=9)
    write_file(path, rendered(figure, path))
    total = max(of, len(sequences))
    which = counted(total, "stream") if len(shown) == total else f"the first {len(shown)} of {counted(total, 'stream')}"
    cut = f" (the first {MOST_FRAMES:,} frames of each)" if shown.lengths.max() > MOST_FRAMES else ""
    return f"drew {which}{cut} in {path}"


def rendered(figure: Figure, path: Path) -> bytes:
    """The picture in the format that the file's name says."""
    picture = io.BytesIO()
    save(figure, picture, path.suffix)
    return picture.getvalue()


def _draw_lines(figure: Figure, column: Sequence[Axes], parts: Sequence[F32], names: Sequence[str]) -> None:
    """A line for each number, a panel for each stream."""
    for axes, part in zip(column, parts, strict=True):
        _prepare(axes)
        for line, name in zip(part.T, names, strict=True):
            axes.plot(line, label=name, linewidth=1, marker="." if len(line) <= 60 else "")
        axes.set_xlim(-0.5, len(part) - 0.5)
        axes.grid(alpha=0.3)
    column[0].legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), fontsize=8, frameon=False, borderaxespad=0.2
    )


def _draw_maps(figure: Figure, column: Sequence[Axes], parts: Sequence[F32], names: Sequence[str]) -> None:
    """A heat map for each stream, all of one scale: a few outliers are beyond its ends."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    limit = float(np.percentile(np.abs(values), 99.5)) or 1.0 if len(values) else 1.0
    signed = bool((values < 0).any())
    for axes, part in zip(column, parts, strict=True):
        _prepare(axes)
        image = axes.imshow(
            part.T,
            aspect="auto",
            origin="lower",
            cmap="RdBu_r" if signed else "Blues",
            vmin=-limit if signed else 0,
            vmax=limit,
            extent=(-0.5, len(part) - 0.5, -0.5, len(names) - 0.5),
        )
        if len(names) <= MOST_NAMES and not names[0][-1].isdigit():
            axes.set_yticks(range(len(names)), [name[:16] for name in names], fontsize=6)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(image, ax=column, pad=0.01, aspect=12 * len(column), extend="both" if signed else "max")


def _prepare(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _plain(text: str) -> str:
    """Text in which a dollar sign is one, and begins no formula."""
    return text.replace("$", r"\$")
