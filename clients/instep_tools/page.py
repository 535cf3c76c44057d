"""A report as one HTML page that can be attached to an issue: it fetches nothing and needs no script.

The command supplies the content. The template escapes all text, because anybody may choose names of streams.
"""

from __future__ import annotations

import datetime
import io
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import jinja2
from markupsafe import Markup

from instep_tools.machine import machine, machine_line, versions_line
from instep_tools.problems import BadFile, check_writable, write_file
from instep_tools.words import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS: Final = 50
"""The most rows of a table; further rows are counted."""
LARGEST_BYTES: Final = 2**20
"""The largest page; this much must be free on the disk before the work begins."""
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
"""Colours of pictures, and their names in the style sheet, which replaces them in the dark theme."""
GOOD, BAD, DOUBT, SOFT = "#2f855a", "#c53030", "#b7791f", "#808080"

Tone: TypeAlias = Literal["", "good", "bad", "doubt"]


@dataclass(frozen=True, slots=True)
class Marked:
    """Text with a colour that rates it."""

    text: str
    tone: Tone


Cell: TypeAlias = str | Marked


@dataclass(frozen=True, slots=True)
class Table:
    """A table; rows beyond the first `MOST_ROWS` are only counted."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Sequence[str] = ()
    """Headings of right-aligned columns."""
    rest: str = ""
    """A plural noun for the omitted rows, with the property that they share."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    facts: Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its caption; colours of `COLOURS` follow the page's theme."""

    figure: Figure
    caption: str


Part: TypeAlias = str | Marked | Table | Facts | Chart


@dataclass(frozen=True, slots=True)
class PageSection:
    """A heading and its content; consecutive charts share a row if there is room."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Page:
    """A report."""

    program: str
    """The command that made it, such as `instep verify`."""
    title: str
    verdict: Marked
    """A few words, in large letters."""
    summary: str
    """The grounds of the verdict in a sentence or two."""
    sections: list[PageSection]
    conditions: Mapping[str, str]
    """The exact command and other conditions of the run; machine and versions are added."""


def check_report_path(path: Path) -> None:
    """Check, before the work begins, whether a page can be written at a path.

    Raises:
        BadFile: when it cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadFile(f"a report is an HTML page, so its name must end in .html, and {path} does not")
    check_writable(path)
    if shutil.disk_usage(path.parent).free < LARGEST_BYTES:
        raise BadFile(f"{path} cannot be written: the disk is full")


def write_page(path: Path, page: Page) -> None:
    """Write a page, replacing an older one of that name at once.

    Raises:
        BadFile: when it cannot be written.
    """
    found, now = machine(), datetime.datetime.now().astimezone()
    conditions = {
        **page.conditions,
        "machine": machine_line(found),
        "versions": versions_line(found),
        "written": now.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("instep_tools", "."),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("page.html")
    section = PageSection("Conditions", [Facts(conditions)])
    text = template.render(page=page, conditions=section, most_rows=MOST_ROWS, svg=_svg)
    write_file(path, text.encode())


def _shown(value: Any) -> Any:
    """Text with control characters, including those for the direction of writing, as escapes."""
    return value if isinstance(value, Markup) else printable(str(value))


def _svg(figure: Figure) -> Markup:
    import matplotlib as mpl

    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    drawn = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in any script; boxes where the font has none
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg, count=1)
    svg = re.sub(r'<g id="[\w.]+_\d+">', "<g>", svg)  # names that several pictures have; none is referred to
    svg = svg.replace("xlink:href=", "href=")
    return Markup(
        re.sub("<[^>]*>", _in_colours_of_the_page, svg).strip()
    )  # in tags only: a name may look like a colour


def _in_colours_of_the_page(tag: re.Match[str]) -> str:
    return re.sub("|".join(COLOURS), lambda found: f"var(--{COLOURS[found[0]]})", tag[0])
