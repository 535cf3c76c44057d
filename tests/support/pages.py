"""A report as a browser reads it: its tables, facts and text, and whatever it refers to."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Final

VOID: Final = {"meta", "br", "link", "img", "hr", "input"}
LARGEST_BYTES: Final = 2**20


class ReadPage(HTMLParser):
    """A page, which must be well formed.

    Attributes:
        text: of each element that is no picture, by tag, in order.
        tables: rows of cells, the headings first.
        facts: by name.
        references: values of attributes that could fetch something.
        tags: how many elements of each kind there are.
        pictures: the text in all pictures.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.facts: dict[str, str] = {}
        self.references: list[str] = []
        self.tags: dict[str, int] = {}
        self.pictures = ""
        self.style = ""
        self._open: list[tuple[str, list[str]]] = []
        content = path.read_bytes()
        assert len(content) < LARGEST_BYTES
        self.source = content.decode()
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            assert not name.startswith("on"), "a script"
            if name in ("href", "src", "srcset", "action", "data", "xlink:href", "poster"):
                self.references.append(value or "")
            if name == "style" and value is not None:
                self.style += value
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        if tag not in VOID:
            self._open.append((tag, []))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)

    def handle_endtag(self, tag: str) -> None:
        opened, parts = self._open.pop()
        assert opened == tag
        text = "".join(parts)
        if any(each == "svg" for each, _ in self._open):
            self.pictures += f"{text}\n" if tag == "text" else ""
            return
        if tag == "style":
            self.style += text
            return
        self.text.setdefault(tag, []).append(text)
        if tag in ("td", "th"):
            self.tables[-1][-1].append(text)
        elif tag == "dd":
            self.facts[self.text["dt"][-1]] = text
        elif tag == "span":
            self._open[-1][1].append(text)

    def table(self, *headings: str) -> list[dict[str, str]]:
        """The rows of the table that begins with these headings, by heading."""
        (found,) = (table for table in self.tables if table[0][: len(headings)] == list(headings))
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]

    @property
    def verdict(self) -> str:
        """In large letters."""
        return self.text["p"][1]


def read_page(path: Path) -> ReadPage:
    """A page that stands alone: without scripts, and without anything to fetch."""
    page = ReadPage(path)
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & page.tags.keys()
    assert "://" not in page.style
    assert "@import" not in page.style
    return page
