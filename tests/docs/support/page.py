"""A page of the documentation as a test reads it: its fenced blocks, its tables and its sections."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[3] / "docs"

_FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^#{2,} (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of a table, without the backticks around them."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def column(self, name: str) -> list[str]:
        """One column's cells."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def numbers(self, name: str) -> list[int]:
        """One column's cells as integers."""
        return [int(cell) for cell in self.column(name)]


@dataclass(frozen=True, slots=True)
class Example:
    """One message, as the page shows it."""

    frames: list[bytes]
    said: list[Any]
    """What the comment above the header says it holds."""


class Page:
    """One file under `docs`."""

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
    def examples(self) -> dict[str, Example]:
        """The messages in hexadecimal, by label."""
        blocks = self.blocks("hex")
        examples = {label: _example(text) for label, text in blocks}
        assert len(examples) == len(blocks), "two examples have the same label"
        return examples

    @cached_property
    def sections(self) -> dict[str, str]:
        """The prose of each section, by its heading."""
        pieces = _SECTION.split(self.prose)
        return dict(zip(pieces[1::2], pieces[2::2], strict=True))

    def tables(self, section: str) -> list[Table]:
        """The tables of a section."""
        tables = []
        for lines in re.findall(r"(?:^\|.*\|$\n?)+", self.sections[section], re.MULTILINE):
            head, _, *rows = (_cells(line) for line in lines.strip().split("\n"))
            assert all(len(row) == len(head) for row in rows), f"a ragged table in {section}"
            tables.append(Table(head, rows))
        return tables

    def table(self, section: str, first_column: str) -> Table:
        """The section's table whose first column is called so."""
        (found,) = [table for table in self.tables(section) if table.columns[0] == first_column]
        return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().strip("`") for cell in line.strip("|").split("|"))


def _example(text: str) -> Example:
    """Frames begin at `# frame K: …`; everything else behind a `#` is a comment."""
    frames: list[bytes] = []
    said = ""
    for line in text.splitlines():
        start = re.match(r"# frame (\d+): (.*)", line)
        if start:
            assert int(start[1]) == len(frames), f"frames out of order: {line}"
            frames.append(b"")
            said = start[2] if len(frames) == 1 else said
        elif line.startswith("#"):
            said += line.lstrip("# ")
        else:
            frames[-1] += bytes.fromhex(line.partition("#")[0])
    values = json.loads(said)
    assert isinstance(values, list)
    return Example(frames, values)
