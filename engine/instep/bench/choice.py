"""The names of the suite's rows, and which of them are asked for."""

from __future__ import annotations

import difflib
from typing import Final

NAMES: Final = (
    "blocks-bare",
    "blocks-seed",
    "blocks-2x256",
    "single-frames",
    "one-stream",
    "paced",
    "many-open",
    "exact-off",
    "chunks",
    "verify",
    "start",
)


class NoSuchRow(ValueError):
    """No row has this name; the message says which is meant, perhaps."""


def chosen(text: str | None) -> tuple[str, ...]:
    """The rows that a list of names with commas between means, in the suite's order; None means all.

    Raises:
        NoSuchRow: naming the first that is none.
    """
    if text is None:
        return NAMES
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}"
            raise NoSuchRow(f"there is no row {name!r}; {advice}")
    return tuple(name for name in NAMES if name in wanted)
