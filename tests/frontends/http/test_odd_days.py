"""The page against answers that are written here: what a real server says only on a bad day, or after a long life."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.support.browsing import Pages, keep
from tests.support.staged_admin import StagedAdmin, event, model

pytestmark = pytest.mark.heavy

WORDS: dict[str, dict[float, str]] = {
    "count": {0: "0", 0.25: "0.3", 9.96: "10.0", 12.4: "12", 999: "999", 12_345_678: "12,345,678"},
    "short": {0: "0", 950: "950", 2_500: "2.5k", 12_345: "12.3k", 4_000_000: "4M", 7e9: "7G"},
    "micros": {0.5: "0.5 µs", 212.4: "212 µs", 999.6: "1.00 ms", 1_240: "1.24 ms", 16_400: "16.4 ms", 3.1e6: "3.10 s"},
    "microsShort": {0: "0 µs", 500: "500 µs", 1_500: "1.5 ms", 2e6: "2 s"},
    "duration": {0.04: "0.0 s", 12.4: "12 s", 99.4: "99 s", 180: "3 min", 7_500: "2 h 5 min", 273_600: "3 d 4 h"},
    "ago": {0.5: "now", 1: "1.0 s ago", 600: "10 min ago"},
    "bytes": {512: "512 B", 1_200: "1.20 kB", 3_456_789_012: "3.46 GB", 1e14: "100 TB"},
    "percent": {0: "0 %", 0.756: "76 %", 1: "100 %"},
}
DIFFERENCE = "output 1: expected 0.12345678, got 0.12345679; output 2: expected 0, got -0"
HOSTILE = "<img src=x onerror=alert(1)> " + "x" * 150


@pytest.fixture
def admin() -> Iterator[StagedAdmin]:
    with StagedAdmin() as staged:
        yield staged


def test_a_mismatch_is_said_with_both_values_and_the_model_that_has_it(admin: StagedAdmin, pages: Pages) -> None:
    other = model("denoise")
    got = {"stream": HOSTILE, "seq": 48_213, "expected": [0.5, 0.12345678, 0.0], "got": [0.5, 0.12345679, -0.0]}
    other["verification"] |= {"state": "mismatch", "mismatches": 1, "mismatch": got}
    other |= {"exactness": "tolerance", "arithmetic": "torch 2.13.0 on cuda:0"}
    admin.models.append(other)
    for width in (400, 1280):
        page = pages.open(admin.url, width=width)
        expect(page.locator("#streams-open")).to_have_text("1,024")
        expect(page.locator("#verification")).to_have_attribute("data-level", "good")
        expect(page.locator("#alarm")).to_contain_text(f"stream {HOSTILE}, frame 48,213 of model denoise")
        expect(page.locator("#alarm-values")).to_have_text(DIFFERENCE)
        page.get_by_label("Model").select_option("denoise")
        expect(page.locator("#verification")).to_have_attribute("data-level", "bad")
        expect(page.locator("#exactness")).to_have_text("Within tolerance")
        assert page.url.endswith("#model=denoise")
        keep(page, f"mismatch-{width}")


def test_events_are_those_of_the_model_that_is_shown(admin: StagedAdmin, pages: Pages) -> None:
    admin.models.append(model("denoise"))
    page = pages.open(admin.url)
    expect(page.locator("#log li").first).to_contain_text("parked")
    admin.log = [event(number, "evicted") for number in range(1, 30)]
    page.get_by_label("Model").select_option("denoise")
    expect(page.locator("#log li").first).to_contain_text("evicted")
    admin.log = []
    page.get_by_label("Model").select_option("speech")
    expect(page.locator("#no-events")).to_be_visible()
    expect(page.locator("#log")).to_be_hidden()


def test_a_badge_is_not_green_where_frames_are_not_compared(admin: StagedAdmin, pages: Pages) -> None:
    admin.models[0]["verification"] |= {"skipped": 4_100_000}
    page = pages.open(admin.url)
    expect(page.locator("#verification")).to_have_text("75 % compared, all match")
    expect(page.locator("#verification")).to_have_attribute("data-level", "fair")
    expect(page.locator("#verification-detail")).to_contain_text("4,100,000 frames not compared")


def test_large_numbers_refusals_and_crowds_fit(admin: StagedAdmin, pages: Pages) -> None:
    admin.models[0]["numbers"] |= {"streams_open": 12_345_678.0, "recent_refused_per_s": 0.0}
    admin.models[0]["max_streams"] = 20_000_000
    admin.log = [{**event(number, "opened"), "time_s": 1e9} for number in range(1, 4_000)]
    admin.models[0]["verification"] |= {"skipped": 1_234, "notes": ["another CPU"]}
    for width in (1280, 400):
        page = pages.open(admin.url, width=width)
        expect(page.locator("#streams-open")).to_have_text("12,345,678")
        expect(page.locator("#frames-total")).to_have_text("12,345,678")
        expect(page.locator("#verification")).to_have_text("12,300,000 frames match")
        expect(page.locator("#verification")).to_have_attribute("data-level", "fair")
        expect(page.locator("#verification-detail")).to_contain_text("1,234 frames not compared")
        expect(page.locator("#refused")).to_have_text("21 since the start")
        expect(page.locator("#refused-codes dt")).to_have_text(["WINDOW_FULL", "BUSY"])
        expect(page.locator("#log li")).to_have_count(1)
        expect(page.locator("#log li")).to_contain_text("and 3,998 more")
        keep(page, f"large-{width}")
    more = {"refused_seq_gap_total": 3.0, "refused_conflict_total": 1.0}
    admin.models[0]["numbers"] |= {"recent_refused_per_s": 12.0, **more}
    expect(page.locator("#refused")).to_have_text("12 per second")
    expect(page.locator("#refused-codes")).to_have_text("WINDOW_FULL17BUSY4others4")
    admin.draining = True
    expect(page.locator("#banner")).to_contain_text("draining")


def test_an_idle_server_says_what_is_missing(admin: StagedAdmin, pages: Pages) -> None:
    admin.streams, admin.log, admin.history_rows = [], [], 0
    admin.models[0] |= {"recording": None, "verification": None, "durability": "memory"}
    nothing = ("streams_open", "streams_parked", "frames_total", "recent_frames_per_s")
    admin.models[0]["numbers"] = dict.fromkeys(nothing, 0.0)
    page = pages.open(admin.url)
    expect(page.locator("#no-streams")).to_contain_text("No streams are open")
    expect(page.locator("#no-events")).to_be_visible()
    expect(page.locator("#recording")).to_have_text("Off")
    expect(page.locator("#verification")).to_have_text("Off")
    expect(page.locator("#verification-detail")).to_contain_text("verify.live")
    expect(page.locator("#refused")).to_have_text("None since the start")
    expect(page.locator("#p99")).to_have_text("–")
    keep(page, "empty")


def test_numbers_are_in_plain_words(admin: StagedAdmin, pages: Pages) -> None:
    page = pages.open(admin.url)
    for function, words in WORDS.items():
        code = f"async (values) => values.map((await import('/static/format.js')).{function})"
        assert page.evaluate(code, [None, *words]) == ["–", *words.values()], function


def test_what_the_server_refuses_is_said_in_its_words(admin: StagedAdmin, pages: Pages) -> None:
    pages.expected.add("404 (Not Found)")
    page = pages.open(f"{admin.url}#model=nobody")
    expect(page.locator("#banner")).to_contain_text("The server refuses: no model is called 'nobody'")
