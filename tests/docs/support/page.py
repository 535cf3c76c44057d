"""A page of the documentation as a test reads it: its fenced blocks, its tables and its sections."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"

_FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^#{2,} (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of a table, without the backticks around them."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def column(self, name: str) -> list[str]:
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


class Page:
    """One Markdown file; a bare name is a file under `docs`."""

    def __init__(self, name: str) -> None:
        self.text = (DOCS / name).read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text outside fenced blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[tuple[str, str]]:
        """(label, text) of each fenced block of a language."""
        return [(label or "", text) for kind, label, text in _FENCE.findall(self.text) if kind == language]

    @cached_property
    def sections(self) -> dict[str, str]:
        """The prose of each section, by its heading."""
        pieces = _SECTION.split(self.prose)
        return dict(zip(pieces[1::2], pieces[2::2], strict=True))

    def table(self, section: str, first_column: str) -> Table:
        """The section's table whose first column has this heading."""
        tables = []
        for lines in re.findall(r"(?:^\|.*\|$\n?)+", self.sections[section], re.MULTILINE):
            head, _, *rows = (_cells(line) for line in lines.strip().split("\n"))
            assert all(len(row) == len(head) for row in rows), f"a ragged table in {section}"
            tables.append(Table(head, rows))
        (found,) = [table for table in tables if table.columns[0] == first_column]
        return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1])
