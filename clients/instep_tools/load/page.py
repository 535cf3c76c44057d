"""The results of a load test as the content of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Final

from matplotlib.figure import Figure

from instep_client.protocol.wire import ServerInfo
from instep_tools.load.plan import LoadPlan, Mode
from instep_tools.load.plot import PANELS, DrawPanel, draw_trials
from instep_tools.load.report import PERCENTILE_NAMES, TRIAL_TITLES, latency_rows, trial_rows
from instep_tools.load.result import Measured, Verdict
from instep_tools.machine import typed_command
from instep_tools.page import Cell, Chart, Facts, Marked, Page, PageSection, Part, Table, Tone
from instep_tools.problems import Exit
from instep_tools.words import counted, three_digits

PANEL_INCHES: Final = (9.6, 3.0)
TONES: Final[dict[Verdict, Tone]] = {"met": "good", "not met": "bad", "invalid": "doubt"}


def load_page(
    endpoint: str,
    info: ServerInfo,
    plan: LoadPlan,
    trials: Sequence[Measured],
    best: Measured | None,
    sentence: str,
    ending: Exit,
) -> Page:
    """The page of one load, or of a search for the largest within a service level.

    `trials` is every load that was tried, at least one; `best` is the one to show in full, if any; `sentence` is the
    summary on the terminal.
    """
    server = {
        "endpoint": endpoint,
        "model": f"{info.model} ({info.features} → {info.outputs})",
        "fingerprint": info.fingerprint,
        "device": info.device,
        "exactness": info.exactness,
        "arithmetic": info.arithmetic,
        "durability": info.durability,
    }
    search = f"the most streams at {plan.rate_hz:g} Hz within {plan.slo_ms or 0:g} ms at the 99th percentile"
    sections = [*([] if best is None else _sections(best)), PageSection("Server", [Facts(server)])]
    if plan.slo_ms is not None:
        sections.insert(0, _search(trials, plan.slo_ms))
    return Page(
        program="instep-client loadtest",
        title=f"{info.model}: {plan.sentence() if plan.slo_ms is None else search}",
        verdict=_verdict(plan, best, ending),
        summary=f"{sentence[:1].upper()}{sentence[1:]}.",
        sections=sections,
        conditions={"command": typed_command("instep-client"), "load": plan.sentence()},
    )


def _verdict(plan: LoadPlan, best: Measured | None, ending: Exit) -> Marked:
    if plan.slo_ms is not None and best is not None:
        least = "" if ending is Exit.OK else "at least "
        found = f"{least}{counted(best.plan.streams, 'stream')} within {plan.slo_ms:g} ms"
        return Marked(found, "doubt" if least else "good")
    if ending is Exit.MEASURED_ITSELF:
        return Marked("no verdict: the load generator could not keep up", "doubt")
    if plan.slo_ms is not None:
        return Marked(f"no load stayed within {plan.slo_ms:g} ms", "bad")
    if best is not None and best.whole:
        return Marked("every frame was answered", "good")
    return Marked("not every frame was answered", "bad")


def _search(trials: Sequence[Measured], slo_ms: float) -> PageSection:
    verdicts = (Marked(verdict, TONES[verdict]) for verdict in (trial.verdict(slo_ms) for trial in trials))
    rows: list[list[Cell]] = [
        [*cells[:-1], verdict] for cells, verdict in zip(trial_rows(trials, slo_ms), verdicts, strict=True)
    ]
    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    drawn = [trial for trial in trials if len(trial.samples)]
    table = Table((*TRIAL_TITLES[:-1], f"p99 within {slo_ms:g} ms"), rows, TRIAL_TITLES[:-1], "loads")
    if not drawn:
        return PageSection("Search", [table])
    draw_trials(figure.subplots(), drawn, slo_ms)
    return PageSection(
        "Search",
        [table, Chart(figure, "Latency at the 99th percentile of each load (dashed: the service level)")],
    )


def _sections(result: Measured) -> Iterator[PageSection]:
    rows = [[title.strip(), *values] for title, values in latency_rows(result)]
    parts: list[Part] = [
        Table((f"milliseconds, n = {len(result.samples):,}", *PERCENTILE_NAMES), rows, PERCENTILE_NAMES)
    ]
    title = "Latency" if result.plan.slo_ms is None else f"Latency of {counted(result.plan.streams, 'stream')}"
    if len(result.answered):
        parts += [_panel(draw, result) for draw in PANELS]
    yield PageSection(title, parts)
    yield PageSection("Frames and connections", [Facts(_facts(result))])


def _panel(draw: DrawPanel, result: Measured) -> Chart:
    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    axes = figure.subplots()
    draw(axes, result)
    caption = axes.get_title()
    axes.set_title("")
    return Chart(figure, caption)


def _facts(result: Measured) -> dict[str, Marked | str]:
    """Numbers in words, in colour where they are the reason of a verdict."""
    found, late = result.found, result.parts["late_us"]

    def none_is_good(number: int, noun: str) -> Marked | str:
        return Marked(counted(number, noun), "bad") if number else "none"

    facts: dict[str, Marked | str] = {
        "measured for": f"{result.seconds:.1f} s",
        "throughput": f"{result.frames_s:,.0f} frames/s, {result.answers_s:,.0f} answers/s",
    }
    if result.plan.mode is Mode.OPEN:
        facts["due"] = f"{result.plan.offered_frames_s:,.0f} frames/s"
        levels = zip(PERCENTILE_NAMES, asdict(late).values(), strict=True)
        lateness = ", ".join(f"{name} {three_digits(value / 1000)}" for name, value in levels) + " ms"
        facts["sent late"] = Marked(lateness, "doubt") if result.measured_itself else lateness
        facts["not sent"] = none_is_good(found.unsent, "frame")
    facts["refused"] = "none"
    if found.refused:
        codes = ", ".join(f"{counted(frames, 'frame')} ({code})" for code, frames in found.refused.items())
        facts["refused"] = Marked(codes, "bad")
    facts["unanswered"] = none_is_good(found.unanswered, "frame")
    facts["reconnections"] = (
        f"{result.reconnections:,}, {result.away_s:.1f} s without a connection" if found.gaps else "none"
    )
    facts["longest silence"] = f"{result.longest_silence_s:.2f} s"
    if found.lost:
        facts["ended by"] = Marked(found.lost, "bad")
    return facts
