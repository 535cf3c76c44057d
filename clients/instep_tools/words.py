"""Numbers and text for sentences and JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, Final

COLUMNS: Final = 80


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun in the singular or plural: `1 stream`, `2,048 streams`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def folded(sentence: str) -> list[str]:
    """Wrap text to 80 columns without breaking long words, such as paths."""
    return textwrap.wrap(sentence, COLUMNS, break_long_words=False, break_on_hyphens=False)


def three_digits(value: float) -> str:
    """Format with three significant digits; – for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:#.3g}" if value >= 1e-3 else "0"


def wrapped(sentence: str) -> str:
    """The sentence in lines of 80 columns; from the second on they are indented by two more columns."""
    indent = " " * (len(sentence) - len(sentence.lstrip(" ")) + 2)
    return textwrap.fill(sentence, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def printable(text: str) -> str:
    """Text with control characters as escapes, for example in a name from a foreign file."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def finite(value: Any) -> Any:
    """The value with null for every non-finite number in it, because JSON has no others."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value
