"""The page of a real server, in a real browser, under load: what people see, and what they can do."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from playwright.sync_api import expect

from instep.models.folder import make_model, write_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep_client import Client
from tests.support.browsing import Pages, keep
from tests.support.served import WarmServer

pytestmark = pytest.mark.heavy

F = 6
HOSTILE = '<img src=x onerror=alert(1)> & "quotes" 100%/../ä+b ' + "x" * 120
WORDS: dict[str, dict[float, str]] = {
    "count": {0: "0", 0.25: "0.3", 9.96: "10.0", 999: "999", 12_345_678: "12,345,678"},
    "short": {950: "950", 12_345: "12.3k", 4_000_000: "4M", 7e9: "7G"},
    "micros": {0.5: "0.5 µs", 999.6: "1.00 ms", 16_400: "16.4 ms", 3.1e6: "3.10 s"},
    "microsShort": {500: "500 µs", 1_500: "1.5 ms", 2e6: "2 s"},
    "duration": {0.04: "0.0 s", 99.4: "99 s", 7_500: "2 h 5 min", 273_600: "3 d 4 h"},
    "ago": {0.5: "now", 1: "1.0 s ago", 600: "10 min ago"},
    "bytes": {512: "512 B", 3_456_789_012: "3.46 GB", 1e14: "100 TB"},
    "percent": {0: "0 %", 0.756: "76 %"},
}
DIFFERENCE = "output 1: expected 0.12345678, got 0.12345679; output 2: expected 0, got -0"
NAMES = [f"mic-{number:03d}" for number in range(60)]
WATCH_LAYOUT = """
    window.shifted = [];
    new PerformanceObserver((list) => {
        const nodes = list.getEntries().flatMap(({ sources }) => sources.map(({ node }) => node));
        shifted.push(...nodes.filter((node) => !node?.closest(".split, .log")).map((node) => node?.outerHTML));
    }).observe({ type: "layout-shift" });
"""
"""Collects what moves, except the parts of the bars and the entries of the log, which are meant to."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "speech"
    write_model(folder, make_model(GruDescription(features=F, gru=GruLayers(hidden_size=8)), "random", name="speech"))
    return folder


def serving(folder: Path, address: str = "127.0.0.1:0") -> WarmServer:
    settings = [f"recording.path={folder.with_suffix('.instep')}", "transport.heartbeat_s=0.5"]
    return WarmServer(folder, ["--http", address, *(part for each in settings for part in ("--set", each))])


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[WarmServer]:
    with serving(folder) as server:
        yield server


@contextmanager
def load(server: WarmServer, names: Sequence[str]) -> Iterator[None]:
    """Streams of one connection that step about a hundred times a second; they are parked at the end."""
    is_over = threading.Event()

    def step() -> None:
        with Client(server.endpoint) as client:
            group = client.open_group(names)
            for turn in range(10**9):
                group.step(np.sin(turn / 20 + np.arange(len(names) * F)).reshape(1, len(names), F))
                if is_over.wait(0.01):
                    client.close(park=True)
                    return

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_it_shows_what_the_server_does_as_it_does_it(server: WarmServer, pages: Pages) -> None:
    with load(server, NAMES):
        page = pages.open(server.started["http"])
        expect(page.locator("#streams-open")).to_have_text("60")
        expect(page.locator("#about")).to_contain_text("speech · gru · 6 → 8")
        expect(page.locator("#frames-rate")).to_have_text(re.compile(r"\d"))
        expect(page.locator("#p50")).to_have_text(re.compile(r"\d (µs|ms)"))
        expect(page.locator("#batch")).to_have_text("60")
        expect(page.locator("#exactness")).to_have_text(re.compile("Exact|Within tolerance"))
        expect(page.locator("#recording")).to_have_text("On")
        expect(page.locator("#recording-facts")).to_contain_text("speech.instep")
        expect(page.locator("#log")).to_contain_text("opened")
        expect(page.locator("#rows tr")).not_to_have_count(0)
        page.evaluate(WATCH_LAYOUT)
        chart = page.get_by_role("img", name=re.compile(r"Throughput: .*\d"))
        picture = chart.locator("canvas").screenshot()  # before the label, which may change meanwhile
        total, label = page.locator("#frames-total").inner_text(), chart.get_attribute("aria-label") or ""
        expect(page.locator("#frames-total")).not_to_have_text(total)
        expect(chart).not_to_have_attribute("aria-label", label)
        assert chart.locator("canvas").screenshot() != picture
        assert page.evaluate("shifted") == []
        page.get_by_role("button", name="log").first.click()
        keep(page, "light")
        expect(page.locator("#recording-facts")).to_contain_text(re.compile("99th percentile[0-9.]+ (µs|ms|s)"))
    expect(page.locator("#streams-parked")).to_have_text("60")
    expect(page.locator("#recording-facts")).to_contain_text("99th percentile–")  # none in the last ten seconds


def test_streams_are_found_and_turned_over(server: WarmServer, pages: Pages) -> None:
    with load(server, [f"b-{name}" for name in NAMES]), load(server, ["a", "quick"]):
        page = pages.open(server.started["http"])
        names = page.locator("#rows td.name")
        expect(names).to_have_count(25)
        first = names.first.inner_text()
        page.get_by_role("button", name="Next").click()
        expect(names.first).not_to_have_text(first)
        page.get_by_role("button", name="Previous").click()
        expect(names.first).to_have_text(first)
        page.locator("body").press("/")
        page.keyboard.type("b-mic-04")
        expect(page.locator("#rows tr")).to_have_count(10)
        page.get_by_label("Show streams in the state").select_option("parked")
        expect(page.locator("#no-streams")).to_be_visible()
    expect(page.locator("#rows tr")).to_have_count(10)
    expect(page.locator("#rows tr").first).to_have_attribute("data-state", "parked")


def test_a_stream_has_a_page_with_an_address(server: WarmServer, pages: Pages) -> None:
    with load(server, ["violin", "viola"]):
        page = pages.open(server.started["http"])
        page.get_by_role("searchbox").fill("violin")
        page.locator("#rows").get_by_role("link", name="violin").press("Enter")
        assert page.url.endswith("#stream=violin")
        expect(page.locator("#stream-name")).to_have_text("violin")
        expect(page.locator("#stream-state")).to_have_text("connected")
        expect(page.locator("#facts")).to_contain_text("last frame")
        expect(page.locator("#stream-log")).to_contain_text("opened")
        keep(page, "stream")
        page.get_by_role("link", name="Skip to the numbers").press("Enter")
        expect(page.locator("#main")).to_be_focused()
        expect(page.locator("#stream-name")).to_be_visible()
        page.go_back()
        expect(page.locator("#overview")).to_be_visible()
        page.goto(f"{server.started['http']}/#stream=nobody")
        expect(page.locator("#no-stream")).to_contain_text("no stream of this name")
        expect(page.locator("#no-stream-events")).to_be_visible()
        with Client(server.endpoint) as client:
            client.open("cello").close()
        page.goto(f"{server.started['http']}/#stream=cello")
        expect(page.locator("#no-stream")).to_contain_text("no stream of this name")
        expect(page.locator("#stream-log b")).to_have_text(["closed", "opened"])


def test_names_of_strangers_are_only_text(server: WarmServer, pages: Pages) -> None:
    with load(server, [HOSTILE]):
        for width in (1280, 400):
            page = pages.open(server.started["http"], width=width)
            page.get_by_role("searchbox").fill("<img")
            page.locator("#rows").get_by_role("link", name=HOSTILE).click()
            expect(page.locator("#stream-name")).to_have_text(HOSTILE)
            assert page.url.endswith(f"stream={quote(HOSTILE, safe='!()*')}")
            page.reload()
            expect(page.locator("#stream-name")).to_have_text(HOSTILE)
            expect(page.locator("#stream-state")).to_have_text("connected")
            assert page.locator("main img").count() == 0
            keep(page, f"hostile-{width}")


def test_a_mismatch_is_said_with_both_values_and_the_model_that_has_it(server: WarmServer, pages: Pages) -> None:
    stats = httpx.get(f"{server.started['http']}/api/stats").json()
    got = {"stream": HOSTILE, "seq": 48_213, "expected": [0.5, 0.12345678, 0.0], "got": [0.5, 0.12345679, -0.0]}
    checked = {"frames": 12_300_000, "lag_s": 0.8}
    good = checked | {"state": "verified", "mismatches": 0, "mismatch": None}
    bad = checked | {"state": "mismatch", "mismatches": 1, "mismatch": got}
    (speech,) = stats["models"]
    denoise = speech | {"name": "denoise", "exactness": "tolerance", "verification": bad}
    stats["models"] = [speech | {"verification": good}, denoise]
    body = f"event: stats\ndata: {json.dumps(stats)}\n\n"
    for width in (400, 1280):
        page = pages.open("about:blank", width=width)
        page.route(
            "**/api/*model=denoise*", lambda route: route.fulfill(json={"columns": {}, "streams": [], "total": 0})
        )
        page.route("**/api/events*", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        page.goto(server.started["http"])
        expect(page.locator("#verification")).to_have_attribute("data-level", "good")
        expect(page.locator("#alarm")).to_contain_text(f"stream {HOSTILE}, frame 48,213 of model denoise")
        expect(page.locator("#alarm-values")).to_have_text(DIFFERENCE)
        page.get_by_label("Model").select_option("denoise")
        expect(page.locator("#verification")).to_have_attribute("data-level", "bad")
        expect(page.locator("#exactness")).to_have_text("Within tolerance")
        assert page.url.endswith("#model=denoise")
        keep(page, f"mismatch-{width}")


def test_numbers_are_in_plain_words(server: WarmServer, pages: Pages) -> None:
    page = pages.open(server.started["http"])
    for function, words in WORDS.items():
        code = f"async (values) => values.map((await import('/static/format.js')).{function})"
        assert page.evaluate(code, [None, *words]) == ["–", *words.values()], function
    quoted = page.evaluate("async (name) => (await import('/static/format.js')).quoted(name)", HOSTILE)
    assert shlex.split(quoted) == [HOSTILE]


def test_a_stopped_server_is_said_and_found_again(folder: Path, pages: Pages) -> None:
    own = folder.with_name("restarted")
    write_model(own, make_model(GruDescription(features=F, gru=GruLayers(hidden_size=8)), "random", name="restarted"))
    with serving(own) as server, load(server, ["violin"]):
        url = server.started["http"]
        page = pages.open(url)
        expect(page.locator("#streams-open")).to_have_text("1")
        expect(page.locator("#link")).to_have_text("Live")
    expect(page.locator("#banner")).to_contain_text("These numbers are")
    expect(page.locator("#link")).to_have_text(re.compile("No answer|Stopped"))
    expect(page.locator("body")).to_have_class("stale")
    keep(page, "stopped")
    with serving(own, url.removeprefix("http://")):
        expect(page.locator("#link")).to_have_text("Live")
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#end")).to_contain_text("for")
        expect(page.locator("body")).not_to_have_class("stale")
        expect(page.locator("#rows td.name")).to_have_text(["violin"])
