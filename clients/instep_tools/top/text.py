"""Numbers, times and names in few columns."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len, set_cell_size

from instep_tools.words import three_digits

_BARS: Final = "▁▂▃▄▅▆▇█"
_UNITS: Final = ("", "k", "M", "G", "T", "P")


def plain(text: str) -> str:
    """The text without characters that would move the cursor, reorder the line or have no certain width."""
    shown = (
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else char
        for char in unicodedata.normalize("NFC", text)
        if not "\ufe00" <= char <= "\ufe0f"  # asks for another form of the character before it, perhaps a wider one
    )
    return "".join(shown)


def fitted(text: str, width: int, middle: bool = False) -> str:
    """The text in exactly `width` columns, however wide its characters are; … stands for its end, or its middle."""
    if cell_len(text) > width > 0:
        tail = text[len(text) - width // 3 :] if middle else ""
        while cell_len(tail) > width // 3:
            tail = tail[1:]
        text = set_cell_size(text, width - 1 - cell_len(tail)).rstrip() + "…" + tail
    return set_cell_size(text, max(0, width))


def short(number: float) -> str:
    """A count or a rate in at most 7 columns: `12,345`, `1.23M`, `0.500`; – for NaN."""
    if math.isnan(number):
        return "–"
    if abs(number) < 100 and number % 1:
        return three_digits(number)
    if abs(number) < 999_999.5:
        return f"{number:,.0f}"
    return scaled(number)


def amount(number: float, one: str) -> str:
    """A number as `short` writes it, and a noun in the singular or plural: `1 stream`, `1.23M streams`."""
    return f"{short(number)} {one}{'s' * (number != 1)}"


def scaled(number: float, gap: str = "") -> str:
    """With three digits and the letter of its size: `1.23M`; – for NaN."""
    if math.isnan(number):
        return "–"
    size = 0
    while abs(number) >= 999.5 and size < len(_UNITS) - 1:
        number, size = number / 1000, size + 1
    return f"{three_digits(number) if size else f'{number:.0f}'}{gap}{_UNITS[size]}"


def percent(share: float) -> str:
    """Of 1, rounded: `98%`; – for NaN."""
    return "–" if math.isnan(share) else f"{share:.0%}"


def period(seconds: float) -> str:
    """In at most 7 columns: `3.2 s`, `4m 12s`, `3h 12m`, `12d 3h`; – for NaN."""
    if math.isnan(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}h {minutes % 60}m" if hours else f"{minutes}m {round(seconds) % 60}s"


def sparkline(values: Sequence[float], width: int) -> str:
    """The newest values in `width` columns, as bars from 0 to the largest of them."""
    shown = list(values)[-width:] if width > 0 else []
    most = max(shown, default=0.0)
    bars = "".join(_BARS[round(value / most * (len(_BARS) - 1)) if most > 0 else 0] for value in shown)
    return f"{bars:>{max(0, width)}}"
