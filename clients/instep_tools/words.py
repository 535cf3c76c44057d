"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts, in the singular or plural: `1 stream`, `2,048 streams`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
