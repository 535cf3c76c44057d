from __future__ import annotations

import io

from rich.console import Console

from instep.replay.rendering import render
from instep.replay.report import Report, StreamReport
from tests.replay.test_report import report, stream


def text_of(found: Report, width: int = 100, color: bool = False) -> str:
    file = io.StringIO()
    render(found, Console(file=file, width=width, force_terminal=color, color_system="standard" if color else None))
    return file.getvalue()


def test_the_table_has_only_streams_that_differ() -> None:
    streams = [stream(number, "mismatch" if number in (30, 77) else "exact") for number in range(1, 101)]
    text = text_of(report(*streams))
    shown = [line.split("│")[2].strip() for line in text.splitlines() if "mic-" in line and "│" in line]
    assert shown == ["mic-30", "mic-77"]
    assert "2 of 100 streams" in text
    assert "│" not in text_of(report(stream(1, "exact"), stream(2, "within tolerance")))
    assert "and 80 more" in text_of(report(*(stream(number, "mismatch") for number in range(100))))
    assert "mismatch in stream 30 (mic-30):\n  frame 3 is missing\nmismatch in stream 77 (mic-77):\n" in text
    assert text.splitlines()[-1] == report(*streams).summary()


def test_a_failed_report_fits_into_80_columns() -> None:
    long = "frame 1,234, element 123,456: recorded -0.12345678901, float64 reference 0.12345679012345678"
    streams = [
        stream(number, "mismatch", 1_234_567, problems=[long, "frame 7 is missing"], max_distance=1.5)
        for number in (99_998, 99_999)
    ]
    name = "room/microphone-" + "x" * 60
    long_named = StreamReport(3, name, 5, 0, "not checked")
    text = text_of(report(*streams, long_named, elements={"torch": 1}), width=80)
    table = [line for line in text.splitlines() if set(line) & set("┃│━─")]
    assert table
    assert max(map(len, table)) <= 80
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table if "│" in line]
    assert ["99998", "mic-99998", "1,234,567", "1.5e+00", "1.2e-02", "mismatch"] in cells
    assert "".join(row[1] for row in cells if len(row) == 6).endswith(name)
    assert f"mismatch in stream 99999 (mic-99999):\n  {long}\n  frame 7 is missing\n" in text


def test_the_last_line_is_the_summary_in_one_piece_and_green_only_when_all_matched() -> None:
    good, bad = report(stream(1, "exact")), report(stream(1, "mismatch"))
    assert text_of(good, width=30).splitlines()[-1] == good.summary()
    assert "\x1b[1;32mverified" in text_of(good, color=True)
    assert "\x1b[1;31mnot verified" in text_of(bad, color=True)


def test_sentences_are_wrapped_on_a_terminal_and_nowhere_else() -> None:
    long = "frame 1,234, element 123,456: recorded -0.12345678901, float64 reference 0.12345679012345678"
    found = report(
        stream(1, "mismatch", problems=[long, "frame 7 is missing"]),
        stream(2, "exact", not_compared=12),
        trimmed="begins at position 1,201 (2026-11-28 09:16:55 UTC); what came before was trimmed or cut off",
    )
    for briefly in (False, True):
        said = {}
        for width in (80, 300):
            file = io.StringIO()
            console = Console(file=file, width=width, force_terminal=width == 80, color_system=None)
            render(found, console, briefly=briefly)
            lines = file.getvalue().splitlines()
            assert (max(map(len, lines)) > 80) == (width > 80)
            start = next(at for at, line in enumerate(lines) if "mismatch in stream" in line)
            said[width] = lines[start:]
        assert " ".join(said[80]).split() == " ".join(said[300]).split()
        inner = "    " if briefly else "  "
        assert [line for line in said[80] if "frame 7" in line] == [f"{inner}frame 7 is missing"]
        assert next(line for line in said[80] if "79012345678" in line).startswith(f"{inner}  ")


def test_names_are_only_names() -> None:
    text = text_of(report(stream(1, "exact"), stream(2, "mismatch", problems=["[bold]odd[/bold]"])))
    assert "[bold]odd[/bold]" in text
