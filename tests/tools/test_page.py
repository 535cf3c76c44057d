"""The page itself: what is escaped, bounded and refused, whoever fills it."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from instep_tools.machine import typed_command
from instep_tools.page import (
    COLOURS,
    LARGEST_BYTES,
    MOST_ROWS,
    Chart,
    Facts,
    Marked,
    Page,
    PageSection,
    Table,
    check_report_path,
    write_page,
)
from instep_tools.problems import BadFile
from tests.support.pages import read_page
from tests.support.small_files import files_of_at_most

HOSTILE = "</td><script>alert('$x$')</script><b a=\"\x1b[2J\u202e\x00&amp;"
SHOWN = "</td><script>alert('$x$')</script><b a=\"\\x1b[2J\\u202e\\x00&amp;"


def figure(text: str = "") -> Figure:
    drawn = Figure()
    axes = drawn.subplots()
    axes.plot([1, 2], [3, 4], color="#2b6cb0", label="line", marker="o")
    axes.text(1, 3, text, parse_math=False)
    axes.grid()
    axes.legend()
    return drawn


def page(*sections: PageSection) -> Page:
    return Page("instep test", "a test", Marked("well", "good"), "A summary.", [*sections], {"command": "instep test"})


def test_all_text_is_escaped_wherever_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    parts = (HOSTILE, Marked(HOSTILE, "bad"), Facts({HOSTILE: HOSTILE}), Table([HOSTILE], [[HOSTILE]], rest=HOSTILE))
    chart = Chart(figure("</text><script>&#c53030"), HOSTILE)
    write_page(file, Page(HOSTILE, HOSTILE, Marked(HOSTILE, ""), HOSTILE, [PageSection(HOSTILE, [*parts, chart])], {}))
    found = read_page(file)
    assert found.facts[SHOWN] == SHOWN
    assert found.table(SHOWN) == [{SHOWN: SHOWN}]
    assert found.text["p"] == [SHOWN] * 5
    assert (found.text["h1"], found.text["h2"][0], found.text["figcaption"]) == ([SHOWN], SHOWN, [SHOWN])
    assert "</text><script>&#c53030" in found.pictures


def test_machine_versions_and_command_are_on_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/instep", "verify", "to day.instep", "--streams", "a'b"])
    assert shlex.split(typed_command("instep")) == ["instep", *sys.argv[1:]]
    write_page(tmp_path / "a.html", page())
    found = read_page(tmp_path / "a.html")
    assert found.facts["command"] == "instep test"
    assert re.search(r"\d cores, ", found.facts["machine"])
    assert "libzmq" in found.facts["versions"]


def test_pictures_follow_the_colours_of_the_page_and_share_no_names(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", page(PageSection("Pictures", [Chart(figure(), "one"), Chart(figure(), "another")])))
    found = read_page(tmp_path / "a.html")
    assert found.tags["svg"] == 2
    assert not re.search("#[0-9a-f]{6}", "".join(re.findall("<svg.*?</svg>", found.source, re.DOTALL)))
    light, dark = (set(re.findall(r"--(\w+):", part)) for part in found.style.split("prefers-color-scheme")[:2])
    assert light == dark
    assert set(re.findall(r"var\(--(\w+)\)", found.source)) <= light
    assert set(COLOURS.values()) <= light
    ids = re.findall(r' id="([^"]+)"', found.source)
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in found.references} <= set(ids)


def test_long_tables_are_cut_and_the_rest_is_counted(tmp_path: Path) -> None:
    rows = [[str(number), "x" * 100] for number in range(100_000)]
    write_page(
        tmp_path / "a.html", page(PageSection("Rows", [Table(("number", "text"), rows, ("number",), "numbers")]))
    )
    found = read_page(tmp_path / "a.html")
    assert [row["number"] for row in found.table("number")] == [str(number) for number in range(MOST_ROWS)]
    assert f"and {100_000 - MOST_ROWS:,} more numbers" in found.text["p"]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.html").mkdir()
    for name in ("a.instep", "absent/a.html", "folder.html"):
        with pytest.raises(BadFile, match=name):
            check_report_path(tmp_path / name)
    check_report_path(tmp_path / "a.html")
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, LARGEST_BYTES - 1))
    with pytest.raises(BadFile, match=r"a.html"):
        check_report_path(tmp_path / "a.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html"]


def test_an_older_page_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / f"{'a' * 250}.html"  # the longest name that a file may have
    file.write_text("older")
    with files_of_at_most(1000), pytest.raises(BadFile, match="File too large"):
        write_page(file, page())
    assert file.read_text() == "older"
    write_page(file, page())
    assert read_page(file).text["h1"] == ["a test"]
