"""Numbers in sentences."""

from __future__ import annotations

import math


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts, in the singular or plural: `1 stream`, `2,048 streams`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def three_digits(value: float) -> str:
    """With three significant digits; – for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:#.3g}" if value >= 1e-3 else "0"
