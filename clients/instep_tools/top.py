"""`instep top`: shows a running server in the terminal."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import sys
import termios
import time
import tty
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from instep_client.aio import AsyncClient
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import ServerInfo, shard_of
from instep_client.replies import ListedStream, ServedModel
from instep_tools.command_line import CommandLine
from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from instep_tools.terminal import Terminal
from instep_tools.words import counted, printable, three_digits

app: Final = CommandLine()

SORTS: Final = ("rate", "name", "next seq", "pending", "idle")
"""The columns to sort by, largest first except for names."""
LOOK_SHARE: Final = 10
"""After a look that took T seconds, the next one waits at least this many T, because it lists every stream."""
_MOST_PRINCIPALS: Final = 5
_PRINCIPAL: Final = re.compile(r'principal_frames_total(\{principal="(.+)"\})')
SHOWN_ONCE: Final = 20
"""The number of streams in a view that is printed once."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A server at one time."""

    at_s: float
    info: ServerInfo
    models: Sequence[ServedModel]
    numbers: Mapping[str, float]
    """The numbers of STATS; NaN for a number that the server lacks."""
    streams: Sequence[ListedStream]


@dataclass(frozen=True, slots=True)
class ScreenView:
    """A snapshot, and the one before it for rates."""

    endpoint: str
    now: Snapshot
    before: Snapshot | None = None
    sort: str = SORTS[0]
    lost: str = ""
    """The reason that there is no newer snapshot; empty if there is one."""

    def rate(self, now: float, before: float | None) -> float:
        """The increase per second; NaN if unknown, as after a counter has restarted."""
        if self.before is None or before is None or now < before:
            return math.nan
        return (now - before) / (self.now.at_s - self.before.at_s)

    def rates(self) -> dict[str, float]:
        """The increase per second of each counter in STATS."""
        before = self.before.numbers if self.before else {}
        return {
            name: self.rate(value, before.get(name))
            for name, value in self.now.numbers.items()
            if name.partition("{")[0].endswith("_total")
        }

    def model_rates(self) -> dict[str, float]:
        """Frames per second of each model."""
        before = {model.name: model.frames for model in self.before.models} if self.before else {}
        return {model.name: self.rate(model.frames, before.get(model.name)) for model in self.now.models}

    def streams(self) -> list[tuple[ListedStream, float]]:
        """All streams in the chosen order, each with its frames per second."""
        before = {each.name: each.next_seq for each in self.before.streams} if self.before else {}
        rated = [(each, self.rate(each.next_seq or 0, before.get(each.name))) for each in self.now.streams]
        rated.sort(key=lambda each: _natural(each[0].name))

        def key(each: tuple[ListedStream, float]) -> float:
            stream, rate = each
            numbers = {"rate": rate, "next seq": stream.next_seq, "pending": stream.pending, "idle": stream.idle_s}
            number = numbers[self.sort]
            return -math.inf if number is None or math.isnan(number) else number

        return rated if self.sort == "name" else sorted(rated, key=key, reverse=True)

    def as_json(self) -> dict[str, Any]:
        """The view as JSON values; rates are per second."""
        now, model_rates = self.now, self.model_rates()
        return {
            "endpoint": self.endpoint,
            "models": [model._asdict() | {"frames_per_s": model_rates[model.name]} for model in now.models],
            "model": asdict(now.info) | {"state": now.info.state.encode()},
            "numbers": dict(now.numbers),
            "rates": self.rates(),
            "streams": [stream._asdict() | {"rate": rate} for stream, rate in self.streams()],
        }


@app.server_command("top", examples=["instep top", "instep top -e tcp://gpu-1:5757 --model ears"])
async def top(
    target: Target,
    terminal: Terminal,
    stop: Stop,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How often it looks again.")] = 1.0,
) -> Exit:
    """Watch a server: frames per second, latency, batches, refusals and the busiest streams.

    Press s to sort the streams by another column and q to quit. With --json, or if the output is not a terminal, one
    view is printed.
    """
    stop.connected = True  # Ctrl-C cancels it, so that the terminal is given back
    is_watched = terminal.out.is_terminal and sys.stdin.isatty() and not terminal.as_json
    watch = _Watch(target, terminal, every)
    if is_watched:
        return await watch.until_quit()
    async with watch.client() as client:
        before = await look(client)
        await asyncio.sleep(every)
        view = ScreenView(target.endpoint, await look(client), before)
    if terminal.as_json:
        terminal.result(view.as_json())
    else:
        terminal.out.print(drawn(view, SHOWN_ONCE))
    return Exit.OK


async def look(client: AsyncClient) -> Snapshot:
    """Take a snapshot of a server.

    Raises:
        InstepError: the server does not answer.
    """
    models, numbers = await client.list_models(), await client.stats()
    at_s = time.monotonic()
    return Snapshot(at_s, client.info, models, defaultdict(lambda: math.nan, numbers), await client.list_streams())


class _Watch:
    def __init__(self, target: Target, terminal: Terminal, every_s: float) -> None:
        self._target = target
        self._console = terminal.out
        self._every_s = every_s
        self._sort = SORTS[0]
        self._view: ScreenView | None = None
        self._live = Live(console=self._console, screen=True, auto_refresh=False, vertical_overflow="crop")

    def client(self) -> AsyncClient:
        return self._target.client("top", 0.0)

    async def until_quit(self) -> Exit:
        quit = asyncio.Event()

        def press(keys: str) -> None:
            if not keys or "q" in keys:
                quit.set()
            for _ in range(keys.count("s")):
                self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
            self._show()

        with _keys(press), self._live:
            looking = asyncio.create_task(self._keep_looking())
            quitting = asyncio.create_task(quit.wait())
            try:
                await asyncio.wait((looking, quitting), return_when=asyncio.FIRST_COMPLETED)
            finally:
                looking.cancel()
                quitting.cancel()
                ended = await asyncio.gather(looking, quitting, return_exceptions=True)
        if isinstance(ended[0], Exception):
            raise ended[0]
        return Exit.OK

    async def _keep_looking(self) -> None:
        answered_at = time.monotonic()
        while True:
            before: Snapshot | None = None
            try:
                async with self.client() as client:
                    while True:
                        began = time.monotonic()
                        now = await look(client)
                        answered_at = time.monotonic()
                        if before is not None and _names(now) != _names(before):
                            break  # a swap leaves this connection with the old version
                        self._view = ScreenView(self._target.endpoint, now, before)
                        before = now
                        self._show()
                        await asyncio.sleep(max(self._every_s, LOOK_SHARE * (answered_at - began)))
            except InstepError as error:
                self._show(f"no answer for {time.monotonic() - answered_at:.0f} s, trying again: {error}")
                await asyncio.sleep(self._every_s)

    def _show(self, lost: str = "") -> None:
        if self._view is None:
            shown: RenderableType = Text(printable(lost or f"waiting for {self._target.endpoint}"))
        else:
            view = replace(self._view, sort=self._sort, lost=lost)
            shown = drawn(view, self._console.size.height, "  (s sort, q quit)")
        self._live.update(shown, refresh=True)


def _names(snapshot: Snapshot) -> list[str]:
    return [model.name for model in snapshot.models]


@contextmanager
def _keys(press: Callable[[str], None]) -> Iterator[None]:
    """Pass typed keys to `press`, and an empty text when the terminal is gone."""
    loop, before = asyncio.get_running_loop(), termios.tcgetattr(0)

    def read() -> None:
        try:
            typed = os.read(0, 4096)
        except OSError:
            typed = b""
        press(typed.decode(errors="replace"))

    tty.setcbreak(0)
    suspend = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the shell would get a terminal in this state
    loop.add_reader(0, read)
    try:
        yield
    finally:
        loop.remove_reader(0)
        signal.signal(signal.SIGTSTP, suspend)
        termios.tcsetattr(0, termios.TCSAFLUSH, before)


def _natural(name: str) -> list[str | int]:
    """A key that sorts mic-2 before mic-10: text and numbers in turn."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", name))]


def drawn(view: ScreenView, most_streams: int, keys: str = "") -> RenderableType:
    """The view, limited to the first streams; `keys` says what can be typed."""
    now, numbers, rates = view.now, view.now.numbers, defaultdict(lambda: math.nan, view.rates())
    info, model_rates = now.info, view.model_rates()
    is_answering = _recent(numbers, "latency_us_p50") > 0
    facts = Table.grid(Column(width=11), Column(overflow="ellipsis", no_wrap=True))
    ready = {1.0: Text("ready", "green"), 0.0: Text("not ready", "bold red")}.get(numbers["ready"], Text("–"))
    streams, connections = (sum(getattr(each, name) for each in now.models) for name in ("streams", "connections"))
    busy = f"{_recent(numbers, 'loop_busy'):.0%}" if _recent(numbers, "loop_busy") >= 0 else "–"
    total = f", {counted(streams, 'stream')}, {counted(connections, 'connection')}, loop {busy} busy"
    facts.add_row("server", ready.append(total, "default not bold"))
    if len(now.models) > 1:
        shown = (f"{printable(name)} {three_digits(rate)}/s" for name, rate in model_rates.items())
        facts.add_row("models", Text("  ".join(shown)))
    about = f"{info.features} to {info.outputs} on {info.device}, {info.exactness}"
    facts.add_row("model", Text(f"{printable(info.model)}, {about}"))
    facts.add_row("frames/s", Text(f"{three_digits(rates['frames_total'])}, {numbers['frames_pending']:,.0f} pending"))
    size = three_digits(_recent(numbers, "batch_size_mean") or math.nan)
    facts.add_row("batches/s", Text(f"{three_digits(rates['batches_total'])} of {size} frames"))
    principals = [(rates[match[0]], match[2], match[1]) for match in map(_PRINCIPAL.fullmatch, numbers) if match]
    for rate, name, label in sorted(principals, key=lambda each: -each[0] if each[0] > 0 else 0)[:_MOST_PRINCIPALS]:
        fields = ("connections", "streams", "unread_bytes", "refused_total")
        connections, of, unread, count = (int(numbers[f"principal_{key}{label}"]) for key in fields)
        held = f"{counted(connections, 'connection')}, {counted(of, 'stream')}"
        kept = f"{decimal(unread)} unread, {count:,} refused"
        facts.add_row("principal", Text(f"{name}: {three_digits(rate)} frames/s, {held}, {kept}"))
    for quantile in ("p50", "p99"):
        times = (
            f"{phase} {three_digits(_recent(numbers, f'{name}_us_{quantile}') / 1000 if is_answering else math.nan)}"
            for name, phase in (("latency", "all"), ("queue", "queue"), ("compute", "compute"), ("send", "send"))
        )
        facts.add_row(f"{quantile} ms", Text(", ".join(times)))
    places = (f"{numbers[f'streams_{place}']:,.0f} {place}" for place in ("open", "parked", "hibernated"))
    facts.add_row("streams", Text(f"{', '.join(places)}; at most {info.max_streams:,}"))
    refused = {code: numbers[f"refused_{code.lower()}_total"] for code in Code.__members__}
    happens = any(rates[f"refused_{code.lower()}_total"] > 0 for code in refused)
    counts = ", ".join(f"{code} {count:,.0f}" for code, count in refused.items() if count > 0)
    facts.add_row("refused", Text(counts or "nothing", "bold red" if happens else ""))
    facts.add_row("recording", Text(_recording(numbers, info.durability)))
    facts.add_row("verified", _verified(numbers))
    up_s = numbers["server_uptime_s"]
    title = Text(f"instep top  {printable(view.endpoint)}  up {_period(up_s)}{keys}", "bold")
    lost = [Text(printable(view.lost), "bold red")] if view.lost else []
    return Group(title, *lost, facts, _stream_table(view, most_streams))


def _recent(numbers: Mapping[str, float], name: str) -> float:
    """The number over the last seconds; in the first second of a model, since its start."""
    recent = numbers[f"recent_{name}"]
    return numbers[name] if math.isnan(recent) else recent


def _recording(numbers: Mapping[str, float], durability: str) -> str:
    if math.isnan(numbers["recording_bytes"]):
        return "off"
    waits = f"answers wait for {durability}" if durability != "memory" else "answers do not wait"
    size, free = (decimal(round(numbers[f"recording_{name}"])) for name in ("bytes", "free_bytes"))
    commit_ms = three_digits((_recent(numbers, "commit_us_p99") or math.nan) / 1000)
    return f"{waits}, {size}, {free} free, commits {commit_ms} ms (p99)"


def _verified(numbers: Mapping[str, float]) -> Text:
    frames, wrong = numbers["verified_frames_total"], numbers["verify_mismatches_total"]
    if math.isnan(frames):
        return Text("off")
    found = f"{counted(round(wrong), 'stream')} differ{'s' * (wrong == 1)}" if wrong else "no mismatch"
    skipped = f", {numbers['verify_skipped_frames_total']:,.0f} not compared"
    text = f"{frames:,.0f} frames{skipped}, {found}, {_period(numbers['verify_lag_s'])} behind"
    return Text(text, "bold red" if wrong else "")


def _stream_table(view: ScreenView, most: int) -> Table:
    table, shards = Table(box=None, pad_edge=False, expand=True), view.now.info.shards
    columns = {"name": "name", "state": "", "rate/s": "rate", "next seq": "next seq", "pending": "pending"}
    columns |= {"idle": "idle", "expires": ""} | ({"shard": ""} if shards > 1 else {})
    for heading, sort in columns.items():
        mark = "▼" if sort == view.sort else ""
        is_text = heading in ("name", "state")
        table.add_column(mark + heading, justify="left" if is_text else "right", no_wrap=True, overflow="ellipsis")
    for stream, rate in view.streams()[:most]:
        seq = "–" if stream.next_seq is None else f"{stream.next_seq:,}"
        expires = "never" if stream.expires_in_s is None else _period(stream.expires_in_s)
        cells = [stream.place, three_digits(rate), seq, f"{stream.pending:,}", _period(stream.idle_s), expires]
        cells += [f"{shard_of(stream.name, shards)}"] * (shards > 1)
        table.add_row(Text(printable(stream.name)), *cells)
    return table


def _period(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}h {minutes % 60}m" if hours else f"{minutes}m {round(seconds) % 60}s"
