"""The page against answers that are written here: what a real server says only on a bad day, or after a long life."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import uvicorn
from playwright.sync_api import expect
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import instep.frontends
from tests.support.browsing import Pages, keep

pytestmark = pytest.mark.heavy

STATIC = Path(instep.frontends.__file__).parent / "http" / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class StagedAdmin:
    """Answers of the admin server, made up around `models`, which a test may change at any time."""

    def __init__(self) -> None:
        self.models = [model("speech")]
        self.streams = [stream(f"mic-{number:05d}", number) for number in range(1_234)]
        self.log = [event(number, ("opened", "parked", "resumed", "refused")[number % 4]) for number in range(1, 30)]
        self.history_rows = 600
        self.draining = False
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        app = Starlette(
            routes=[
                Route("/", self._page),
                Mount("/static", StaticFiles(directory=STATIC)),
                Route("/api/stats", self._stats),
                Route("/api/history", self._history),
                Route("/api/streams", self._streams),
                Route("/api/events", self._events),
            ]
        )
        config = uvicorn.Config(app, port=self.port, ws="none", log_config=None)
        self._server = uvicorn.Server(config)
        listener = config.bind_socket()
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()

    async def _page(self, request: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), 200, {"Content-Security-Policy": POLICY}, "text/html")

    def _now(self) -> dict[str, Any]:
        for each in self.models:
            if each["numbers"]["recent_frames_per_s"]:
                vary(each["numbers"], time.time())
        return {
            "version": "0.1.0",
            "pid": 4242,
            "time_s": time.time(),
            "started_s": time.time() - 86_400,
            "uptime_s": 86_400.0,
            "endpoint": "tcp://127.0.0.1:5757",
            "ready": True,
            "draining": self.draining,
            "models": self.models,
        }

    async def _stats(self, request: Request) -> Response:
        return JSONResponse(self._now())

    async def _history(self, request: Request) -> Response:
        numbers = dict(self.models[0]["numbers"])
        columns: dict[str, list[float]] = {"time_s": []}
        for row in range(self.history_rows):
            columns["time_s"].append(time.time() - self.history_rows + row)
            if numbers["recent_frames_per_s"]:
                vary(numbers, columns["time_s"][-1])
            for name, value in numbers.items():
                if name.startswith("recent_") and name != "recent_time_s":
                    columns.setdefault(name.removeprefix("recent_"), []).append(value)
        return JSONResponse({"model": self.models[0]["name"], "columns": columns})

    async def _streams(self, request: Request) -> Response:
        page = {"streams": self.streams[:25], "total": len(self.streams), "cursor": None}
        return JSONResponse({"model": self.models[0]["name"], **page})

    async def _events(self, request: Request) -> Response:
        if request.query_params.get("model", self.models[0]["name"]) not in [each["name"] for each in self.models]:
            said = f"no model is called {request.query_params['model']!r}"
            return JSONResponse({"error": {"code": "UNKNOWN_MODEL", "message": said}}, 404)
        return StreamingResponse(self._tell(), media_type="text/event-stream")

    async def _tell(self) -> AsyncIterator[str]:
        assert self._server is not None
        told = turn = 0
        while not self._server.should_exit:
            if turn % 4 == 0:
                yield f"event: stats\ndata: {json.dumps(self._now())}\n\n"
            for each in self.log[told:]:
                yield f"event: log\nid: {each['number']}\ndata: {json.dumps(each)}\n\n"
            told, turn = len(self.log), turn + 1
            await asyncio.sleep(0.25)
        yield "event: bye\ndata: {}\n\n"


def model(name: str) -> dict[str, Any]:
    numbers = {
        "streams_open": 1_024.0,
        "streams_parked": 12.0,
        "streams_hibernated": 31_337.0,
        "frames_pending": 96.0,
        "frames_total": 12_345_678.0,
        "checkpoint_age_s": 42.0,
        "commit_us_p99": 2_340.0,
        "refused_window_full_total": 17.0,
        "refused_busy_total": 4.0,
        "refused_not_finite_total": 0.0,
        "refused_messages_total": 21.0,
        "recent_frames_per_s": 102_400.0,
        "recent_streams_open": 1_024.0,
        "recent_streams_parked": 12.0,
        "recent_streams_hibernated": 31_337.0,
    }
    vary(numbers, time.time())
    return {
        "name": name,
        "fingerprint": "9f31c2d4a86b55e0c7",
        "kind": "gru",
        "device": "cpu",
        "exactness": "exact",
        "arithmetic": "portable-1",
        "features": 40,
        "outputs": 128,
        "max_streams": 4_096,
        "durability": "commit",
        "recording": {"file": "speech.instep", "bytes": 3_456_789_012, "free_bytes": 81_234_567_890},
        "verification": {"state": "verified", "frames": 12_300_000, "mismatches": 0, "lag_s": 0.8, "mismatch": None},
        "numbers": numbers,
    }


def vary(numbers: dict[str, float], time_s: float) -> None:
    wave, noise = math.sin(time_s / 60), random.Random(int(time_s)).random()
    compute, queue, send = 180 + 40 * wave + 20 * noise, 60 + 40 * noise, 25 + 5 * noise
    numbers |= {
        "recent_time_s": time_s,
        "recent_frames_per_s": 100_000 + 12_000 * wave + 4_000 * noise,
        "recent_batches_per_s": 480 + 30 * wave,
        "recent_latency_us_p50": 0.9 * (queue + compute + send),
        "recent_latency_us_mean": queue + compute + send,
        "recent_latency_us_p99": 1_400 + 900 * noise**4,
        "recent_batch_size_mean": 212 + 12 * wave,
        "recent_loop_busy": 0.34 + 0.06 * noise,
        "recent_executor_busy": 0.71 + 0.08 * wave,
    }
    for part, value in (("queue", queue), ("compute", compute), ("send", send)):
        numbers |= {f"recent_{part}_us_mean": value, f"recent_{part}_us_p99": value * (2 + 3 * noise)}


def stream(name: str, number: int) -> dict[str, Any]:
    state = ("connected", "connected", "connected", "parked", "hibernating")[number % 5]
    return {
        "name": name,
        "state": state,
        "owner": number % 8 if state == "connected" else None,
        "seq": 1_000 + 37 * number,
        "pending": number % 3,
        "idle_s": 0.01 if state == "connected" else 12.5 * (number % 40),
        "expires_in_s": None if state == "connected" else 600.0 - number % 500,
        "parked_s": None if state == "connected" else 12.5 * (number % 40),
    }


def event(number: int, kind: str) -> dict[str, Any]:
    detail = {"refused": "WINDOW_FULL × 12"}.get(kind, "")
    time_s = time.time() - 600 + 20 * number
    return {
        "number": number,
        "time_s": time_s,
        "kind": kind,
        "stream": f"mic-{number:05d}",
        "detail": detail,
        "seq": None,
    }


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


def test_numbers_are_in_plain_words(admin: StagedAdmin, pages: Pages) -> None:
    page = pages.open(admin.url)
    for function, words in WORDS.items():
        code = f"async (values) => values.map((await import('/static/format.js')).{function})"
        assert page.evaluate(code, [None, *words]) == ["–", *words.values()], function
