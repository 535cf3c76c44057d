"""A report as one HTML page that can be attached to an issue: nothing in it is fetched, and it needs no script.

A command says what is on the page; all text is escaped here, because names of streams come from anybody.
"""

from __future__ import annotations

import datetime
import html
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from instep_tools.machine import machine, machine_line, versions_line
from instep_tools.pictures import save
from instep_tools.problems import BadFile, check_drawable, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS: Final = 50
"""Of a table; the rest is counted."""
LARGEST_BYTES: Final = 2**20
"""No page is larger; so much must be free on the disk before the work begins."""
SUFFIXES: Final = (".html", ".htm")
COLOURS: Final = {
    "#000000": "ink",
    "#1a202c": "ink",
    "#b0b0b0": "line",
    "#cccccc": "line",
    "#808080": "soft",
    "#a0aec0": "grey",
    "#2b6cb0": "blue",
    "#dd6b20": "orange",
    "#90cdf4": "sky",
    "#9ae6b4": "green",
    "#d6bcfa": "violet",
    "#2f855a": "good",
    "#c53030": "bad",
    "#b7791f": "doubt",
    "#ffffff": "paper",
}
"""Colours of pictures, and what the style sheet calls them; there, each has another value in the dark."""
GOOD, BAD, DOUBT, SOFT = "#2f855a", "#c53030", "#b7791f", "#808080"

Tone: TypeAlias = Literal["", "good", "bad", "doubt"]


@dataclass(frozen=True, slots=True)
class Marked:
    """Text in a colour that says how good it is."""

    text: str
    tone: Tone


Cell: TypeAlias = str | Marked


@dataclass(frozen=True, slots=True)
class Table:
    """A table; rows beyond the first `MOST_ROWS` are only counted."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Sequence[str] = ()
    """Headings of columns that are aligned at the right."""
    rest: str = ""
    """A plural noun for the rows left out, with the property that they share."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    values: Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture and what it shows; colours of `COLOURS` follow the page's."""

    figure: Figure
    caption: str


Part: TypeAlias = str | Marked | Table | Facts | Chart


@dataclass(frozen=True, slots=True)
class PageSection:
    """A heading and what is below it; charts that follow each other are side by side where there is room."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Page:
    """A report."""

    program: str
    """The command that made it: `instep verify`."""
    title: str
    verdict: Marked
    """A few words, in large letters."""
    summary: str
    """The grounds of the verdict, in a sentence or two."""
    sections: Sequence[PageSection]
    conditions: Mapping[str, str]
    """The exact command, and what else a reader needs to know of the run; machine and versions are added."""


def check_report_path(path: Path) -> None:
    """Find out before the work whether a page can be written there.

    Raises:
        BadFile: when it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadFile(f"a report is an HTML page, so its name must end in .html, and {path} does not")
    check_drawable(path, "a report")
    if shutil.disk_usage(path.parent).free < LARGEST_BYTES:
        raise BadFile(f"{path} cannot be written: the disk is full")


def write_page(path: Path, page: Page) -> None:
    """Write a page as a whole, in place of an older one of that name.

    Raises:
        BadFile: when it cannot be written.
    """
    write_file(path, as_html(page).encode())


def as_html(page: Page) -> str:
    """The page."""
    found, now = machine(), datetime.datetime.now().astimezone()
    conditions = Facts(
        {
            **page.conditions,
            "machine": machine_line(found),
            "versions": versions_line(found),
            "written": now.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
    )
    sections, verdict = [*page.sections, PageSection("Conditions", [conditions])], page.verdict.text
    style = files("instep_tools").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(page.program)}: {_text(verdict)}</title>",
            f"<style>\n{style}</style>\n</head>\n<body>\n<header>",
            f'<p class="program">{_text(page.program)}</p>\n<h1>{_text(page.title)}</h1>',
            f'<p class="verdict {page.verdict.tone}">{_text(verdict[:1].upper() + verdict[1:])}</p>',
            f"<p>{_text(page.summary)}</p>\n</header>\n<main>",
            *map(_section, sections),
            "</main>\n</body>\n</html>\n",
        )
    )


def _section(section: PageSection) -> str:
    return "\n".join((f"<section>\n<h2>{_text(section.title)}</h2>", *map(_part, section.parts), "</section>"))


def _part(part: Part) -> str:
    match part:
        case Table():
            return _table(part)
        case Facts():
            pairs = (f"<dt>{_text(name)}</dt><dd>{_cell(value)}</dd>" for name, value in part.values.items())
            return "\n".join(("<dl>", *pairs, "</dl>"))
        case Chart():
            return f"<figure>\n<figcaption>{_text(part.caption)}</figcaption>\n{_svg(part.figure)}\n</figure>"
        case _:
            return f"<p>{_cell(part)}</p>"


def _table(table: Table) -> str:
    aligned = [' class="number"' if heading in table.numbers else "" for heading in table.headings]

    def line(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}{how}>{cell}</{tag}>' for how, cell in zip(aligned, cells, strict=True))}</tr>"

    rows = (line(map(_cell, row), "td") for row in table.rows[:MOST_ROWS])
    head = f'<div class="table">\n<table>\n<thead>{line(map(_text, table.headings), "th")}</thead>\n<tbody>'
    left_out = len(table.rows) - MOST_ROWS
    more = f'\n<p class="rest">and {left_out:,} more {_text(table.rest)}</p>' if left_out > 0 else ""
    return "\n".join((head, *rows, f"</tbody>\n</table>\n</div>{more}"))


def _cell(cell: Cell) -> str:
    if isinstance(cell, Marked):
        return f'<span class="{cell.tone}">{_text(cell.text)}</span>' if cell.tone else _text(cell.text)
    return _text(cell)


def printable(text: str) -> str:
    """Text whose control characters, and those that change the direction of writing, are written as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def _text(text: str) -> str:
    return html.escape(printable(text))


def _svg(figure: Figure) -> str:
    """The picture as an element of the page, in the page's colours and letters."""
    import matplotlib as mpl

    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    drawn = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        save(figure, drawn, ".svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg, count=1)
    svg = re.sub(r'<g id="[\w.]+_\d+">', "<g>", svg)  # names that several pictures have; none is referred to
    svg = svg.replace("xlink:href=", "href=")
    return re.sub("<[^>]*>", _in_colours_of_the_page, svg).strip()  # in tags only: a name may look like a colour


def _in_colours_of_the_page(tag: re.Match[str]) -> str:
    return re.sub("|".join(COLOURS), lambda found: f"var(--{COLOURS[found[0]]})", tag[0])
