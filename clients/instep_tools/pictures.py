"""Pictures of matplotlib, drawn once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI: Final = 110


def save(figure: Figure, file: IO[Any] | Path, suffix: str, **options: Any) -> None:
    """Write a figure in the format of this suffix; further options of `savefig`.

    `savefig` draws a figure that lays itself out twice, once only for its layout, which is made here without drawing.
    """
    figure.dpi = DPI
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in any script; boxes where the font has none
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(file, format=suffix.removeprefix(".").lower(), dpi=DPI, **options)
