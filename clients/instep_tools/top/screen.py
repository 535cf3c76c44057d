"""A snapshot as lines of text that fit a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Final

from rich.cells import cell_len
from rich.text import Text

from instep_client.protocol.codes import Code
from instep_tools.top.snapshot import Numbers, ObservedModel, Snapshot, SnapshotRates
from instep_tools.top.text import amount, fitted, percent, period, plain, scaled, short, sparkline
from instep_tools.top.view import KEYS, ScreenView
from instep_tools.words import counted, three_digits

_LABEL: Final = 11
"""Columns of what stands before the numbers of a line."""
_LEFT: Final = 37
"""Columns of the left one of the two blocks at the top."""
_PHASES: Final = ("queue", "compute", "send", "latency")
_COLUMNS: Final = (("state", -11), ("rate/s", 8), ("next seq", 11), ("pending", 8), ("idle", 7), ("expires", 7))
"""Behind the name, with their widths; a negative one is for text."""
_SORTED: Final = {"name": "name", "rate": "rate/s", "seq": "next seq", "pending": "pending", "idle": "idle"}
"""The heading of the column for each of `SORTS`."""
_READY: Final[dict[float, tuple[str, str]]] = {1: ("ready", "green"), 0: ("not ready", "bold red")}
_HINTS: Final = ("? help", "q quit", "s sort", "/ filter", "f state", "m model", "p pause")


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that is drawn."""

    endpoint: str
    view: ScreenView
    now: Snapshot | None = None
    rates: SnapshotRates | None = None
    history: Sequence[float] = ()
    """Frames per second of the model, newest last."""
    lost: str = ""
    """Why there is no answer, and for how long."""


def draw(picture: Picture, width: int, height: int, keys: bool = True) -> list[Text]:
    """At most `height` lines of at most `width` columns; the last one names the keys if wanted."""
    now, view = picture.now, picture.view
    lines = [_title(picture, width)]
    if picture.lost:
        lines += [Text(line, "bold red") for line in wrap(plain(picture.lost), width)]
    elif now is None:
        lines.append(Text("waiting for an answer"))
    if now is not None:
        lines += _server(now, picture.rates, width) + _model(now, picture.rates, picture.history, width)
    lines = lines[: max(0, height - keys)]
    room = height - len(lines) - keys
    if view.helping:
        lines += [Text(), *(Text.assemble("  ", (f"{key:<11}", "bold"), text) for key, text in KEYS)][:room]
    elif now is not None:
        lines += _streams(now, width)[:room]
    if keys:
        lines += [Text()] * (height - 1 - len(lines)) + [_footer(picture, width)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _title(picture: Picture, width: int) -> Text:
    up = "" if picture.now is None else f"up {period(picture.now.model.numbers['server_uptime_s'])}"
    marks = "paused" if picture.view.paused else ""
    left = fitted(f"instep top  {plain(picture.endpoint)}", width - len(up) - len(marks) - 4)
    return Text.assemble((left, "bold"), "  ", (marks, "bold yellow"), "  ", up)


def _server(now: Snapshot, rates: SnapshotRates | None, width: int) -> list[Text]:
    frames = "–" if rates is None else short(sum(rates.frames.values()))
    ready = _READY.get(now.model.numbers["ready"], ("–", ""))
    busy = percent(_recent(now.model.numbers, "loop_busy"))
    streams = amount(sum(model.streams for model in now.models), "stream")
    connections = amount(sum(model.connections for model in now.models), "connection")
    total = f"{frames} frames/s, {streams}, {connections}, loop {busy}"
    lines = [_line("server", ready, f", {total}")]
    if len(now.models) > 1:
        lines.append(_line("models", *_models(now, rates, width - _LABEL)))
    return lines


def _models(now: Snapshot, rates: SnapshotRates | None, width: int) -> list[tuple[str, str]]:
    """As many as there is room for, the one that is looked at among them."""
    shown = []
    for model in now.models:
        rate = "–" if rates is None else short(rates.frames.get(model.name, 0.0))
        shown.append((f" {plain(model.name)} {rate}/s ", "reverse" if model.name == now.model.name else ""))
    while not shown[0][1] and sum(cell_len(text) for text, _ in shown) > width:
        del shown[0]
    return shown


def _model(now: Snapshot, rates: SnapshotRates | None, history: Sequence[float], width: int) -> list[Text]:
    model, numbers = now.model, now.model.numbers
    per_s = {} if rates is None else rates.numbers
    about = f", {model.features} to {model.outputs} on {model.device}, {model.exactness}"
    name = plain(model.name)
    lines = [_line("model", fitted(name, min(cell_len(name), width - _LABEL - len(about))), about)]
    is_answering = _recent(numbers, "latency_us_p50") > 0
    rows = (
        ("frames/s", per_s.get("frames_total", math.nan), ""),
        ("batches/s", per_s.get("batches_total", math.nan), ""),
        ("batch size", _measured(numbers, "batch_size_mean"), f"{short(numbers['frames_pending'])} pending"),
    )
    left = [f"{label:<{_LABEL}}{short(number):>8}{beside:>{_LEFT - _LABEL - 8}}" for label, number, beside in rows]
    left[0] = left[0].rstrip() + "  " + sparkline(history, _LEFT - _LABEL - 10)
    wide = max(0, width - 80) // 4
    heads = (*_PHASES[:3], "all")
    right = ["latency ms" + "".join(f"{head:>{8 + wide}}" for head in heads)]
    for quantile in ("p50", "p99"):
        values = (_recent(numbers, f"{phase}_us_{quantile}") / 1000 if is_answering else math.nan for phase in _PHASES)
        right.append(f"{quantile:>10}" + "".join(f"{three_digits(value):>{8 + wide}}" for value in values))
    lines += [Text(f"{one:<{_LEFT}} {two}") for one, two in zip(left, right, strict=True)]
    inside = f"{short(numbers['streams_open'])} open of {short(model.max_streams)}"
    parked, hibernated = short(numbers["streams_parked"]), short(numbers["streams_hibernated"])
    lines.append(_line("streams", f"{inside}, {parked} of them parked; {hibernated} hibernating"))
    lines.append(_line("refused", *_refused(numbers, per_s)))
    lines.append(_line("recording", _recording(model)))
    lines.append(_line("verified", *_verified(numbers)))
    return lines


def _recent(numbers: Numbers, name: str) -> float:
    """Over the last seconds; since the start of a model that has had no whole second yet."""
    return numbers.get(f"recent_{name}", numbers[name])


def _measured(numbers: Numbers, name: str) -> float:
    """As `_recent`, of a value that is more than 0 where there was anything to measure; NaN where there was not."""
    return _recent(numbers, name) or math.nan


def _refused(numbers: Mapping[str, float], per_s: Mapping[str, float]) -> list[str | tuple[str, str]]:
    """By code, the most frequent first; those that happen now in red."""
    counts = {
        code: (numbers[name], per_s.get(name, 0.0))
        for code in Code.__members__
        if numbers.get(name := f"refused_{code.lower()}_total", 0.0) > 0
    }
    if not counts:
        return ["nothing"]
    shown: list[str | tuple[str, str]] = []
    for code, (count, rate) in sorted(counts.items(), key=lambda each: (-each[1][1], -each[1][0])):
        shown += [", " * bool(shown), (f"{code} {short(count)}", "bold red" if rate > 0 else "")]
    return shown


def _recording(model: ObservedModel) -> str:
    numbers = model.numbers
    if "recording_bytes" not in numbers:
        return "off"
    waits = f"answers wait for {model.durability}" if model.durability != "memory" else "answers do not wait"
    size, free = scaled(numbers["recording_bytes"], " "), scaled(numbers["recording_free_bytes"], " ")
    return (
        f"{waits}, {size}B, {free}B free, commits {three_digits(_measured(numbers, 'commit_us_p99') / 1000)} ms (p99)"
    )


def _verified(numbers: Numbers) -> list[str | tuple[str, str]]:
    if "verified_frames_total" not in numbers:
        return ["off"]
    frames, skipped = numbers["verified_frames_total"], numbers["verify_skipped_frames_total"]
    wrong = numbers["verify_mismatches_total"]
    differ = (f"{amount(wrong, 'stream')} differ{'s' * (wrong == 1)}", "bold red" if wrong > 0 else "")
    found = ("no mismatch", "green") if wrong == 0 else differ
    compared = f", {percent(100 * frames // (frames + skipped) / 100)} compared" if skipped != 0 else ""
    return [f"{short(frames)} frames{compared}, ", found, f", {period(numbers['verify_lag_s'])} behind"]


def _streams(now: Snapshot, width: int) -> list[Text]:
    name_width = width - sum(abs(columns) + 1 for _, columns in _COLUMNS)
    heading, query = Text(style="bold"), now.query
    for title, columns in (("name", -name_width - 1), *_COLUMNS):
        mark = ("▼" if query.descending else "▲") if _SORTED[query.sort] == title else ""
        heading.append(f"{title}{mark}".ljust(-columns) if columns < 0 else f" {mark + title:>{columns}}")
    lines = [heading]
    for each in now.streams:
        values = (
            f" {each.state}",
            "–" if each.rate is None else short(each.rate),
            "–" if each.seq is None else f"{each.seq:,}" if each.seq < 1e9 else scaled(each.seq),
            short(each.pending),
            period(each.idle_s),
            "never" if each.expires_in_s is None else period(each.expires_in_s),
        )
        cells = (
            f"{value:<{1 - columns}}" if columns < 0 else f" {value:>{columns}}"
            for value, (_, columns) in zip(values, _COLUMNS, strict=True)
        )
        lines.append(Text(fitted(plain(each.name), name_width, middle=True) + "".join(cells)))
    return lines


def _footer(picture: Picture, width: int) -> Text:
    view, now = picture.view, picture.now
    if view.typing:
        return Text.assemble(("/", "bold"), plain(view.query.contains), ("▏", "bold"))
    shown = ""
    if now is not None:
        shown = counted(now.matched, "stream")
        shown += f" {now.query.state}" * bool(now.query.state)
        shown += f" with “{plain(now.query.contains)}”" * bool(now.query.contains)
    shown = fitted(shown, min(cell_len(shown), width - len("  ? help  q quit")))
    for hint in _HINTS:
        if cell_len(shown) + 2 + len(hint) <= width:
            shown += f"  {hint}"
    return Text(fitted(shown, width), "reverse")


def _line(label: str, *parts: str | tuple[str, str] | Text) -> Text:
    return Text.assemble(f"{label:<{_LABEL}}", *parts)
