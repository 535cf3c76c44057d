"""The page in a real browser, against answers that a test writes: what people see, and what they can do."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.staged_admin import StagedAdmin, event, model, stream

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path(__file__).parents[3] / "test-artefacts"
HOSTILE = '<img src=x onerror=alert(1)> & "quotes" 100%/../ä+b ' + "x" * 120
WATCH_LAYOUT = """
    window.shifted = [];
    new PerformanceObserver((list) => {
        const nodes = list.getEntries().flatMap(({ sources }) => sources.map(({ node }) => node));
        shifted.push(...nodes.filter((node) => !node?.closest(".split")).map((node) => node?.outerHTML));
    }).observe({ type: "layout-shift" });
"""
OpenPage = Callable[..., Page]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(CHROMIUM is None, reason="the dashboard is tested in Chromium, which is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages; at the end none of them may have said an error, asked for a dialogue, or scrolled sideways."""
    contexts, complaints = [], []

    def opens(url: str, width: int = 1280, height: int = 800, scheme: str = "light") -> Page:
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.goto(url)
        return page

    yield opens
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        context.close()
    assert [each for each in complaints if "ERR_CONNECTION_REFUSED" not in each] == []


@pytest.fixture
def admin() -> Iterator[StagedAdmin]:
    with StagedAdmin() as staged:
        yield staged


def keep(page: Page, name: str) -> bytes:
    SHOTS.mkdir(exist_ok=True)
    return page.screenshot(path=SHOTS / f"dashboard-{name}.png", full_page=True)


def test_it_shows_the_numbers_and_they_move(admin: StagedAdmin, open_page: OpenPage) -> None:
    page = open_page(admin.url)
    expect(page.locator("#streams-open")).to_have_text("1,024")
    expect(page.locator("#frames-total")).to_have_text("12,345,678")
    expect(page.locator("#frames-rate")).to_have_text(re.compile(r"\d{2,3},\d{3}"))
    expect(page.locator("#exactness")).to_have_text("Exact")
    expect(page.locator("#verification")).to_have_text("12,300,000 frames match")
    expect(page.locator("#refused")).to_have_text("21 since the start")
    expect(page.locator("#refused-codes dt").first).to_have_text("WINDOW_FULL")
    expect(page.locator("#recording-facts")).to_contain_text("42 s ago")
    expect(page.locator("#rows tr")).not_to_have_count(0)
    page.evaluate(WATCH_LAYOUT)
    chart = page.get_by_role("img", name=re.compile(r"Throughput: .*\d"))
    before = chart.get_attribute("aria-label"), chart.locator("canvas").screenshot()
    admin.models[0]["numbers"]["streams_open"] = 2_048.0
    expect(page.locator("#streams-open")).to_have_text("2,048")
    expect(chart).not_to_have_attribute("aria-label", before[0] or "")
    assert chart.locator("canvas").screenshot() != before[1]
    assert page.evaluate("shifted") == []
    page.get_by_role("button", name="log").first.click()
    keep(page, "light")


def test_streams_are_found_sorted_and_turned_over(admin: StagedAdmin, open_page: OpenPage) -> None:
    page = open_page(admin.url)
    names = page.locator("#rows td.name")
    expect(names.first).to_have_text("mic-00000")
    page.get_by_role("button", name="Next").click()
    expect(names.first).not_to_have_text("mic-00000")
    page.get_by_role("button", name="Previous").click()
    expect(names.first).to_have_text("mic-00000")
    page.locator("#heads").get_by_role("button", name="frames", exact=True).click()
    expect(names.first).to_have_text("mic-01233")
    expect(page.locator("th[data-sort=seq]")).to_have_attribute("aria-sort", "descending")
    page.locator("body").press("/")
    page.keyboard.type("0123")
    expect(page.locator("#matched")).to_contain_text("found among 1,234")
    expect(names.first).to_have_text("mic-01233")
    page.get_by_label("Show streams in the state").select_option("parked")
    expect(page.locator("#rows tr").first).to_have_attribute("data-state", "parked")
    page.get_by_role("searchbox").fill("nobody")
    expect(page.locator("#no-streams")).to_be_visible()


def test_a_stream_has_a_page_with_an_address(admin: StagedAdmin, open_page: OpenPage) -> None:
    page = open_page(admin.url)
    page.locator("#rows").get_by_role("link", name="mic-00007").press("Enter")
    assert page.url.endswith("#stream=mic-00007")
    expect(page.locator("#stream-name")).to_have_text("mic-00007")
    expect(page.locator("#stream-state")).to_have_text("open")
    expect(page.get_by_role("img", name=re.compile(r"Norm of the state: .*\d"))).to_be_visible()
    expect(page.locator("#stream-log li")).to_have_count(len(admin.log))
    keep(page, "stream")
    page.get_by_role("link", name="Skip to the numbers").press("Enter")
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("#stream-name")).to_be_visible()
    page.go_back()
    expect(page.locator("#overview")).to_be_visible()
    expect(page.locator("#streams-open")).to_have_text("1,024")
    page.goto(f"{admin.url}#stream=nobody")
    expect(page.locator("#no-stream")).to_be_visible()


def test_names_of_strangers_are_only_text(admin: StagedAdmin, open_page: OpenPage) -> None:
    admin.streams = [stream(HOSTILE, 1)]
    admin.log = [{**event(1, "refused"), "stream": HOSTILE, "detail": HOSTILE}]
    admin.models[0] |= {"name": HOSTILE, "kind": HOSTILE, "exactness_detail": HOSTILE}
    for width in (1280, 400):
        page = open_page(admin.url, width=width)
        page.get_by_role("link", name=HOSTILE).first.click()
        expect(page.locator("#stream-name")).to_have_text(HOSTILE)
        keep(page, f"hostile-{width}")
        assert page.url.endswith(f"stream={quote(HOSTILE, safe='!()*')}")
        page.reload()
        expect(page.locator("#stream-name")).to_have_text(HOSTILE)
        expect(page.locator("#stream-state")).to_have_text("open")
        assert page.locator("main img").count() == 0


def test_a_stopped_server_is_said_and_found_again(admin: StagedAdmin, open_page: OpenPage) -> None:
    page = open_page(admin.url)
    expect(page.locator("#link")).to_have_text("Live")
    admin.stop()
    expect(page.locator("#banner")).to_contain_text("These numbers are")
    expect(page.locator("#link")).to_have_text(re.compile("No answer|Stopped"))
    expect(page.locator("body")).to_have_class("stale")
    keep(page, "stopped")
    admin.models[0]["numbers"]["streams_open"] = 7.0
    admin.start()
    expect(page.locator("#link")).to_have_text("Live")
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#streams-open")).to_have_text("7")
    admin.draining = True
    expect(page.locator("#banner")).to_contain_text("draining")


def test_a_mismatch_is_said_with_both_values_and_the_model_that_has_it(admin: StagedAdmin, open_page: OpenPage) -> None:
    other = model("denoise")
    got = {"stream": "mic-00007", "seq": 48_213, "expected": [0.5, 0.12345678], "got": [0.5, 0.12345679]}
    other["verification"] |= {"state": "mismatch", "mismatches": 1, "mismatch": got}
    other |= {"exactness": "tolerance", "exactness_detail": "up to 3 ULP"}
    admin.models.append(other)
    page = open_page(admin.url)
    expect(page.locator("#streams-open")).to_have_text("1,024")
    expect(page.locator("#verification")).to_have_attribute("data-level", "good")
    expect(page.locator("#alarm")).to_contain_text("stream mic-00007, frame 48,213 of model denoise")
    expect(page.locator("#alarm-values")).to_have_text("output 1: expected 0.12345678, got 0.12345679")
    page.get_by_label("Model").select_option("denoise")
    expect(page.locator("#verification")).to_have_attribute("data-level", "bad")
    expect(page.locator("#exactness")).to_have_text("Within tolerance")
    assert page.url.endswith("#model=denoise")
    keep(page, "mismatch")


def test_it_has_two_themes_and_fits_a_telephone(admin: StagedAdmin, open_page: OpenPage) -> None:
    background = "getComputedStyle(document.documentElement).backgroundColor"
    page = open_page(admin.url, width=400, scheme="dark")
    expect(page.locator("#streams-open")).to_have_text("1,024")
    dark = page.evaluate(background)
    keep(page, "narrow-dark")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(background) != dark
    page.reload()
    assert page.evaluate(background) != dark
    light = open_page(admin.url, width=400)
    assert light.evaluate(background) == page.evaluate(background)


def test_an_idle_server_says_what_is_missing(admin: StagedAdmin, open_page: OpenPage) -> None:
    admin.streams, admin.log, admin.history_rows = [], [], 0
    admin.models[0] |= {"recording": None, "verification": None, "durability": "memory", "exactness": "off"}
    nothing = ("streams_open", "streams_parked", "frames_total", "recent_frames_per_s")
    admin.models[0]["numbers"] = dict.fromkeys(nothing, 0.0)
    page = open_page(admin.url)
    expect(page.locator("#no-streams")).to_contain_text("No streams yet")
    expect(page.locator("#no-events")).to_be_visible()
    expect(page.locator("#recording")).to_have_text("Off")
    expect(page.locator("#verification")).to_have_text("Off")
    expect(page.locator("#refused")).to_have_text("None since the start")
    expect(page.locator("#p99")).to_have_text("–")
    keep(page, "empty")
