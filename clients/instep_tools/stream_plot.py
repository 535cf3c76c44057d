"""Inputs and outputs of streams as a picture: a row for each stream, lines or heat maps over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from instep_client.protocol.wire import F32
from instep_tools.problems import BadFile, check_writable
from instep_tools.sequences import RecordedSequences
from instep_tools.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MOST_STREAMS: Final = 8
MOST_FRAMES: Final = 20_000
"""More of a stream would be less than a pixel each."""
MOST_LINES: Final = 6
"""More numbers a frame than that are a heat map."""
SUFFIXES: Final = (".png", ".svg", ".pdf")


def check_plot_path(path: Path) -> None:
    """Find out before the work whether a picture can be made there.

    Raises:
        BadFile: when it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadFile(f"cannot tell from the name {path} how to draw: it must end in {', '.join(SUFFIXES)}")
    check_writable(path)


def plot_streams(sequences: RecordedSequences, path: Path, title: str, outputs: Sequence[str], of: int = 0) -> str:
    """Draw the first streams with their outputs; an older picture of that name is replaced.

    Args:
        sequences: what to draw, with outputs.
        path: a PNG, SVG or PDF.
        title: of the whole picture.
        outputs: names of the outputs.
        of: how many streams there are, where `sequences` are only the first of them.

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
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(len(shown), 2, squeeze=False)
    inputs = [f"x{at}" for at in range(shown.features)]
    for side, (values, names, what) in enumerate(
        ((shown.frames, inputs, "inputs"), (shown.outputs, outputs, "outputs"))
    ):
        column = list(grid[:, side])
        image = None
        limit = _limit(values)
        for axes, start, length in zip(column, shown.starts, shown.lengths, strict=True):
            part = values[start : start + min(int(length), MOST_FRAMES)]
            image = _draw(axes, part, names, limit)
        column[0].set_title(f"{what} ({len(names)})", fontsize=11)
        column[-1].set_xlabel("frame")
        if image is not None:
            figure.colorbar(image, ax=column, pad=0.01, aspect=12 * len(shown), extend="both")
        else:
            column[0].legend(loc="lower right", ncols=len(names), fontsize=7, framealpha=0.8)
    for axes, name in zip(grid[:, 0], shown.names, strict=True):
        axes.set_ylabel(name if len(name) <= 16 else f"…{name[-15:]}", fontsize=9)
    try:
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=110)
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None
    total = max(of, len(sequences))
    which = counted(total, "stream") if len(shown) == total else f"the first {len(shown)} of {counted(total, 'stream')}"
    return f"drew {which} in {path}"


def _limit(values: F32) -> float:
    """The largest magnitude, a few outliers left out, so that all heat maps of one side have one scale."""
    finite = np.abs(values[np.isfinite(values)])
    return float(np.percentile(finite, 99.5)) or 1.0 if len(finite) else 1.0


def _draw(axes: Axes, values: F32, names: Sequence[str], limit: float) -> AxesImage | None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if len(names) <= MOST_LINES:
        for line, name in zip(values.T, names, strict=True):
            axes.plot(line, label=name, linewidth=1, marker="." if len(line) <= 60 else "")
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.grid(alpha=0.3)
        return None
    image = axes.imshow(
        values.T, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="auto"
    )
    if len(names) <= 16 and list(names) != [f"{names[0][0]}{at}" for at in range(len(names))]:
        axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
        axes.set_yticklabels(names, fontsize=6)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return image
