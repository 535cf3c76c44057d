"""The cost of being watched by a scraper, a dashboard and `instep top`, and of listing very many streams."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Final
from urllib.request import urlopen

from benchmarks.connection import BareConnection, NotServed
from benchmarks.load import all_in_flight
from benchmarks.measurement import Bench, Row, compared, interleave
from benchmarks.reference import BenchmarkModel, measured
from benchmarks.rows import (
    MANY,
    PACED_STREAMS,
    STREAMS,
    TIMESTEPS,
    WINDOW_FRAMES,
    block_inputs,
    one_at_a_time,
    steadily,
)
from instep.demo.child_server import ChildServer

HTTP: Final = ("--http", "127.0.0.1:0")
TABLE: Final = "/api/streams?limit=50"
"""The requests that an open page of the dashboard makes every two seconds."""
SETTLING: Final = 2.0
"""Times the length of a round: after about 3 s `instep top` has started, at more cost than that of its work."""


# ── Watched ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def watched(bench: Bench) -> list[Row]:
    """Blocks, and a lone stream: with everything that watches, or only a scraper, over neither, with one server."""
    model = BenchmarkModel.of(bench, "watched")
    inputs, lone = block_inputs(model), model.lone_inputs(TIMESTEPS, 1)
    with ChildServer(model.folder, [*HTTP, "--set", f"engine.max_streams={STREAMS}"]) as server:
        blocks = partial(measured, server.endpoint, model, inputs, all_in_flight(bench.seconds))
        one_stream = partial(measured, server.endpoint, model, lone, one_at_a_time(bench.seconds))
        url = str(server.started["http"])
        scraper = [[sys.executable, "-m", "benchmarks.watching", url]]
        everything = [[*scraper[0], "page"], [sys.executable, "-m", "instep", "top", "-e", server.endpoint]]

        def beside(watchers: Sequence[Sequence[str]], load: Callable[[], float]) -> float:
            with _running(watchers, bench.seconds * SETTLING):
                return load()

        samples = interleave(
            bench,
            {
                "blocks, frames/s": blocks,
                "blocks scraped, frames/s": partial(beside, scraper, blocks),
                "blocks watched, frames/s": partial(beside, everything, blocks),
                "one stream, p50 µs": one_stream,
                "one stream watched, p50 µs": partial(beside, everything, one_stream),
            },
        )
    what, alone = "frames/s of 1,024 streams in blocks", "blocks, frames/s"
    all_of_it = "under a scraper, a dashboard and instep top, over that without"
    row = partial(compared, model=model.description, samples=samples)
    return [
        row("scraped-blocks", f"{what} under a scraper", of="blocks scraped, frames/s", over=alone, threshold=0.99),
        row("watched-blocks", f"{what} {all_of_it}", of="blocks watched, frames/s", over=alone, threshold=0.97),
        row(
            "watched-one-stream",
            f"p50 of one stream {all_of_it}",
            of="one stream watched, p50 µs",
            over="one stream, p50 µs",
            threshold=1.1,
            direction="at most",
        ),
    ]


@contextmanager
def _running(commands: Sequence[Sequence[str]], settling_s: float) -> Iterator[None]:
    """Programs that watch, on a terminal of their own that somebody reads."""
    screen, terminal = pty.openpty()
    reader = threading.Thread(target=_read_all, args=(screen,), daemon=True)
    reader.start()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    watching = [
        subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
        for command in commands
    ]
    os.close(terminal)
    try:
        time.sleep(settling_s)
        yield
        if any(process.poll() is not None for process in watching):
            raise NotServed("nobody watches: instep top or the reader of the HTTP endpoint has ended")
    finally:
        for process in watching:
            process.terminate()
            process.wait()
        reader.join()
        os.close(screen)


def _read_all(screen: int) -> None:
    try:
        while os.read(screen, 65_536):
            pass
    except OSError:  # nobody writes to the terminal any more
        return


def watch(url: str, *, page: bool) -> None:
    """Scrape every second, and ask for what an open page does, if it is to, until ended."""
    listening = threading.Thread(target=_listen, args=(url,), daemon=True)
    if page:
        listening.start()
    for second in range(3600):
        if page and not listening.is_alive():
            raise SystemExit("the events have ended")
        _get(url + "/metrics")
        if page and second % 2:
            _get(url + TABLE)
        time.sleep(1)


def _listen(url: str) -> None:
    with urlopen(url + "/api/events") as events:
        for _ in events:
            pass


def _get(url: str) -> float:
    """The seconds that an answer took."""
    began = time.perf_counter()
    with urlopen(url) as answer:
        answer.read()
    return time.perf_counter() - began


# ── Very many streams, listed ────────────────────────────────────────────────────────────────────────────────────────


def listed(bench: Bench) -> list[Row]:
    """100,000 open streams: how long a page of them takes, and the p99 of a paced load while pages are asked for."""
    model = BenchmarkModel.of(bench, "listed")
    many = bench.scaled(MANY, 2 * STREAMS)
    settings = ["--set", f"engine.max_streams={many + PACED_STREAMS}", "--set", f"limits.window_frames={WINDOW_FRAMES}"]
    inputs = model.lone_inputs(TIMESTEPS, PACED_STREAMS)
    paced_alone, beside = "paced, p99 ms", "paced beside lists, p99 ms"
    pages_ms: list[float] = []
    with (
        ChildServer(model.folder, [*HTTP, *settings]) as server,
        BareConnection(server.endpoint) as idle,
    ):
        url = str(server.started["http"]) + TABLE
        idle.hello()
        for first in range(0, many, 1000):
            idle.open([f"idle-{number}" for number in range(first, min(first + 1000, many))])

        paced = partial(measured, server.endpoint, model, inputs, steadily(bench.seconds))

        def beside_lists() -> float:
            is_over, took_s = threading.Event(), []

            def ask() -> None:
                took_s.append(_get(url))
                while not is_over.wait(0.5):
                    took_s.append(_get(url))

            asking = threading.Thread(target=ask)
            asking.start()
            try:
                return paced()
            finally:
                is_over.set()
                asking.join()
                pages_ms.append(median(took_s) * 1000)

        sides: dict[str, Callable[[], float]] = {paced_alone: paced, beside: beside_lists}
        samples = interleave(bench, sides)
    what = "p99 of 64 streams at 50 Hz while 100,000 streams are listed, over that without"
    pages = {"a page, ms": pages_ms[bench.warm_up :]}
    page_ms = median(pages_ms[bench.warm_up :])
    return [
        compared("listed-p99", what, model.description, samples, beside, paced_alone, 1.2, "at most"),
        Row("listed-page", "a sorted page of 100,000", model.description, "ms", page_ms, 200.0, pages, "at most"),
    ]


if __name__ == "__main__":
    watch(sys.argv[1], page="page" in sys.argv[2:])
