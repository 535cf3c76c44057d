"""`instep-client loadtest` as a user sees it: what it prints, its files, its exit status."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import replace
from functools import partialmethod
from multiprocessing import heap
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from instep_tools import terminal as terminal_module
from instep_tools.load import command, generator
from instep_tools.load.generator import Load
from instep_tools.problems import Exit
from instep_tools.words import three_digits
from tests.support.fake_server import FakeServer, Message, error
from tests.support.pages import read_page
from tests.support.ring_server import RingServer
from tests.support.small_files import files_of_at_most
from tests.tools.loads import PLAN, SHORT, Timed, fits, run


async def test_an_open_loop(tmp_path: Path) -> None:
    run = Timed()
    picture, percentiles = tmp_path / "p.png", tmp_path / "p.hgrm"
    assert await run(plot=picture, hdr=percentiles) == Exit.OK
    assert set(run.server.rules.blocks) == {(1, 2), (1, 1)}
    assert sum(streams for _, streams in run.server.rules.blocks) == 6 * 30
    assert fits(run.terminal.said.removesuffix(run.last + "\n")), "only sentences are wrapped, and only on a terminal"
    head, latency, late, queue, *_ = run.terminal.said.splitlines()
    assert head.split() == ["ms,", "n", "=", "80", "p50", "p90", "p99", "p99.9", "max"]
    assert latency.startswith("latency, from when it was due")
    assert late.startswith("  sent late (load generator)")
    assert queue.split() == ["server:", "queue", "0.00700", "0.00700", "0.00700", "–", "0.00700"]
    assert run.last.startswith("120 frames/s of 120 due, 80 answers/s, p50 ")
    assert f"percentiles in {percentiles}; drawn in {picture}" in run.last
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert percentiles.read_text().split()[0] == "Value"
    assert "open loop at 20 Hz a stream" in run.terminal.complained


async def test_the_page_says_what_the_json_says(tmp_path: Path) -> None:
    file = tmp_path / "load.html"
    once = Timed(as_json=True, model="<b>halving")
    assert await once(report=file) == await Timed()() == Exit.OK
    assert f"report in {file}" in once.last
    values, page = once.terminal.json(), read_page(file)
    assert page.verdict == "Every frame was answered"
    assert page.text["p"][2].startswith(f"{values['frames_per_second']:,.0f} frames/s of 120 due, ")
    rows = page.table(f"milliseconds, n = {values['samples']:,}")
    assert len(rows) == 6
    for row, name in zip(rows, ("latency", "late", "queue", "compute", "send", "rest"), strict=True):
        found = values["latency_us"][name]
        for level in ("p50", "p99", "max"):
            assert row[level] == three_digits(found[level] / 1000)
    assert page.tags["svg"] == 4
    assert page.facts["model"] == "<b>halving (3 → 2)"
    assert page.facts["throughput"].startswith(f"{values['frames_per_second']:,.0f} frames/s, ")
    assert (page.facts["refused"], page.facts["reconnections"]) == ("none", "none")

    search = Timed(as_json=True, max_streams=25)
    assert await search(replace(PLAN, slo_ms=1e6), report=file) == Exit.OK
    values, page = search.terminal.json(), read_page(file)
    assert page.verdict == f"{values['streams']:,} streams within 1e+06 ms"
    trials = page.table("streams", "processes")
    streams = [int(row["streams"].replace(",", "")) for row in trials]
    assert streams == [each["load"]["streams"] for each in values["trials"]]
    assert [row["p99 within 1e+06 ms"] for row in trials] == [each["verdict"] for each in values["trials"]]
    assert page.tags["svg"] == 5


async def test_the_page_of_a_load_that_the_server_refused(tmp_path: Path) -> None:
    def refuse(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        return [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None

    refusing = Timed()
    refusing.server.rules.fault = refuse
    assert await refusing(report=tmp_path / "a.html") == Exit.FOUND_PROBLEMS
    page = read_page(tmp_path / "a.html")
    assert page.verdict == "Not every frame was answered"
    assert re.match(r"\d+ frames \(TOO_LARGE\)", page.facts["refused"])


def test_a_closed_loop_in_words_json_and_files(tmp_path: Path) -> None:
    with FakeServer() as server:
        closed = run(*SHORT, "--endpoint", server.endpoint)
        files = tmp_path / "a.json", tmp_path / "b.json"
        for file, streams, plot in zip(files, ("3", "6"), ((), ("--plot", tmp_path / "p.svg")), strict=True):
            arguments = ("--save", file, *plot, "--steps-per-block", "4", "--json")
            saved = run(*SHORT, "--streams", streams, *arguments, "--endpoint", server.endpoint)
            assert json.loads(saved.stdout) == json.loads(file.read_text())
    assert (closed.exit_code, saved.exit_code) == (0, 0)
    assert "closed loop" in closed.stderr
    assert "latency, from when it was sent" in closed.stdout
    assert "sent late" not in closed.stdout, "nothing is due"
    assert closed.stdout.splitlines()[-1].count("ms") == 2
    values = json.loads(saved.stdout)
    load = values["load"]
    assert (load["mode"], load["rate_hz"], load["block"], load["steps"]) == ("closed", None, None, 4)
    assert values["frames_per_second"] > 0
    assert values["latency_us"]["queue"]["p50"] == 7
    assert values["server"]["model"] == "halving"
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")

    values["latency_us"]["latency"]["p999"] = 9.0
    for file, frames_s in zip(files, (10_000, 12.3), strict=True):
        load = values["load"] | {"streams": 6 if frames_s == 12.3 else 3}
        server = values["server"] | ({"device": "cuda:0", "fingerprint": "f" * 64} if frames_s == 12.3 else {})
        file.write_text(json.dumps(values | {"server": server, "load": load, "frames_per_second": frames_s}))
    both = json.loads(run("--compare", *files, "--json").stdout)
    assert (both["ratio"]["streams"], both["loads_differ"]) == (2, {"streams": [3, 6]})
    assert both["servers_differ"] == {"fingerprint": ["00", "f" * 64], "device": ["none", "cuda:0"]}
    compared = run("--compare", *files)
    told = [line.split() for line in compared.stdout.splitlines()]
    assert ["frames/s", "10,000", "12.3", "0.00123"] in told
    assert ["latency", "p99.9,", "ms", "0.00900", "0.00900", "1.00"] in told
    assert fits(compared.stdout)
    assert compared.stderr == (
        "the servers differ: fingerprint 00 and ffffffffffff, device none and cuda:0\n"
        "the loads differ: streams 3 and 6\n"
    )
    assert run("--compare", files[0], files[0]).stderr == ""
    found_nothing = ('{"best": null}', "found no load within its level")
    for content, problem in (("{}", "holds no result of a load test"), (None, "cannot be read"), found_nothing):
        bad = tmp_path / "bad.json"
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_text(content)
        refused = run("--compare", files[0], bad)
        assert refused.exit_code == 2
        assert problem in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--slo-ms", "20", "--plot", "p.svg"),
        ("--streams", "256", "--duration", "10"),
        ("--processes", "1", "--warmup", "2s", "--steps-per-block", "1"),
        ("--endpoint", "tcp://127.0.0.1:5757", "--model", ""),
    ],
)
def test_a_comparison_refuses_every_other_option_whatever_its_value(arguments: tuple[str, ...]) -> None:
    refused = run("--compare", "a.json", "b.json", *arguments)
    said = " ".join(refused.stderr.replace("│", " ").split())
    names = ", ".join(argument for argument in arguments if argument.startswith("--"))
    assert (refused.exit_code, f"--compare: it measures nothing: leave out {names} ╰" in said) == (2, True), said


@pytest.mark.parametrize(
    ("arguments", "seconds", "rate_hz"),
    [
        (["--mode", "open", "--duration", "0.2"], 0.2, 100),
        (["--rate", "50", "--duration", "0.003m"], 0.18, 50),
    ],
)
def test_loads_are_described_as_they_were_asked_for(arguments: list[str], seconds: float, rate_hz: float) -> None:
    with FakeServer() as server:
        result = run(*SHORT, *arguments, "--block", "3", "--processes", "2", "--json", "-e", server.endpoint)
        assert server.rules.names == {}
    load = json.loads(result.stdout)["load"]
    assert (load["mode"], load["rate_hz"], load["block"]) == ("open", rate_hz, 3)
    assert (load["processes"], load["connections"]) == (2, 2)
    assert load["duration_s"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--plot", "p.gif"], "cannot tell from the name p.gif how to draw: it must end in .png, .svg, .pdf"),
        (["--plot", "absent/p.png"], "absent/p.png cannot be written: there is no folder absent"),
        (["--hdr", "absent/p.hgrm"], "absent/p.hgrm cannot be written: there is no folder absent"),
        (["--duration", "10 days"], "'10 days' is not a time: write 10, 10s, 1m or 1h"),
        (["--duration", "0s"], "it must be more than 0"),
        (["--mode", "closed", "--rate", "5"], "need an open loop"),
        (["--mode", "closed", "--slo-ms", "5"], "need an open loop"),
        (["--streams", "1", "--processes", "2"], "1 stream, 2 connections and 2 processes do not fit"),
        (["--processes", "2", "--connections", "1"], "256 streams, 1 connection and 2 processes do not fit"),
        (["--streams", "200000"], "keeps 100000 streams at most; ask for fewer"),
        (["--streams", "200000", "--slo-ms", "5"], "begin the search with fewer"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_sent(arguments: list[str], problem: str) -> None:
    with FakeServer() as server:
        result = run(*arguments, "--endpoint", server.endpoint)
        assert Kind.STEP not in server.rules.kinds
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


def test_a_plot_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--plot", "p.png")
    assert result.exit_code == 2
    assert "'matplotlib', which is not installed: pip install" in result.stderr


async def test_a_load_generator_that_is_too_slow_says_so() -> None:
    run = Timed()
    run.clock.tick_s = 0.05
    assert await run() == Exit.MEASURED_ITSELF
    assert run.last.startswith("measured the load generator, not the server: it sent ")
    assert " not sent" in run.last


async def test_refusals_are_told_and_are_no_success() -> None:
    run = Timed()

    def refuse(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        return [error(header[1], Code.TOO_LARGE)] if header[0] == Kind.STEP else None

    run.server.rules.fault = refuse
    assert await run() == Exit.FOUND_PROBLEMS
    assert run.last.startswith("0 frames/s: nothing was answered, ")
    assert "refused (TOO_LARGE)" in run.last


@pytest.mark.parametrize("slo_ms", [None, 1e6])
async def test_a_stop_in_the_warm_up_leaves_the_result_of_another_run(tmp_path: Path, slo_ms: float | None) -> None:
    run, file, page = Timed(), tmp_path / "base.json", tmp_path / "base.html"
    for each in (file, page):
        each.write_text("before")
    run.clock.on_sleep = lambda moment: run.stop.request()
    assert await run(replace(PLAN, slo_ms=slo_ms), save=file, report=page) == Exit.FOUND_PROBLEMS
    why = "stopped, all streams closed" if slo_ms is None else "the search was stopped before its end"
    assert run.last == f"nothing was measured; {why}; {file} not written; {page} not written"
    assert file.read_text() == page.read_text() == "before"


def test_a_stop_before_the_end_is_told_wherever_the_result_is(tmp_path: Path) -> None:
    whole, stopped = Timed(), Timed()
    stopped.clock.on_sleep = lambda moment: stopped.stop.request() if moment > 1001 else None
    files = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert asyncio.run(whole(save=files[0])) == asyncio.run(stopped(save=files[1])) == Exit.OK
    told = re.match(r"[\d,]+ frames/s, .*; stopped after ([\d.]+) s, all streams closed; saved in", stopped.last)
    assert told, "the load that was due is that of the whole run"
    seconds = PLAN.duration_s
    early = f"it ended after {told[1]} of {seconds:g} s"
    assert shown("--compare", *files) == f"{files[1]}: {early}\n"
    assert shown("--compare", *files[::-1]) == f"{files[1]}: {early}\n"
    both = json.loads(run("--compare", *files, "--json").stdout)
    assert both["ended_early"] == {"first": None, "second": early}

    values = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(values | {"error": "the server is gone"}))
    assert shown("--compare", *files) == f"{files[1]}: {early}, the server is gone\n"
    why = "the search was stopped before its end"
    best = json.loads(files[0].read_text())
    files[0].write_text(json.dumps({"server": best["server"], "best": best, "ended": why}))
    assert shown("--compare", files[0], files[0]) == f"{files[0]}: {why}\n" * 2


async def test_a_stop_where_nothing_was_answered_names_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Load, "run", partialmethod(Load.run, drain_s=0.0))
    run = Timed()
    run.clock.on_sleep = lambda moment: run.stop.request() if moment > 1001 else None
    run.server.rules.fault = lambda header, frames: [] if header[0] == Kind.STEP else None
    assert await run(all_closed=False) == Exit.FOUND_PROBLEMS
    assert re.fullmatch(
        r"0 frames/s: nothing was answered, \d+ frames unanswered; stopped, all streams closed", run.last
    )


def shown(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0
    return result.stderr


def test_a_full_disk_costs_the_file_and_not_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_is_full)
    with FakeServer() as server:
        result = run(*SHORT, "--plot", tmp_path / "p.png", "--endpoint", server.endpoint)
    assert result.exit_code == 2
    assert f"{tmp_path / 'p.png'} cannot be written: No space left on device" in result.stderr
    assert " frames/s, " in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_shared_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.BufferWrapper, "_heap", heap.Heap())  # that of earlier tests may have room
    with FakeServer() as server, files_of_at_most(1000):
        result = run(*SHORT, "--endpoint", server.endpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        "error: there is no shared memory for the counters of a load test: File too large; look at the limit on the "
        "size of files (ulimit -f) and at the room in /dev/shm"
    )


def test_a_server_that_is_restarted_in_the_middle() -> None:
    rules, steps = RingServer(), 0

    def restart_once(peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        nonlocal steps
        if frames[0][0] == Kind.STEP:
            steps += 1
            if steps == 20:
                rules.restart()
        return rules.handle(peer, frames)

    with FakeServer(handle=restart_once) as server:
        result = run(*SHORT, "--connections", "2", "--duration", "2s", "--json", "-e", server.endpoint)
    values = json.loads(result.stdout)
    assert (result.exit_code, rules.boots, rules.failures, rules.streams) == (0, 1, [], {})
    assert values["reconnections"] == 2
    longest_s = values["latency_us"]["away"]["max"] / 1e6
    assert 0 < values["without_connection_s"] / 2 <= longest_s <= values["without_connection_s"] + 1e-6
    assert f"2 reconnections, {values['without_connection_s']:.1f} s without a connection" in " ".join(
        result.stderr.split()
    )


def test_a_server_that_goes_away_in_the_warm_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DRAIN_S", "PING_S"):
        monkeypatch.setattr(generator, name, 0.1)
    picture, percentiles = tmp_path / "p.png", tmp_path / "p.hgrm"

    def fall_silent(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        return [] if len(server.rules.blocks) >= 3 else None

    with FakeServer() as server:
        server.rules.fault = fall_silent
        files = ("--plot", picture, "--hdr", percentiles)
        result = run(*SHORT, "--warmup", "0.5s", *files, "--json", "-e", server.endpoint)
    gone = "the server went away during the warm-up"
    values = json.loads(result.stdout)
    assert (result.exit_code, values["error"], values["reconnections"]) == (1, gone, 0)
    assert (values["without_connection_s"], values["longest_silence_s"]) == pytest.approx((0.2, 0.2))
    told = " ".join(result.stderr.split())
    assert told.endswith(f"nothing was measured: {gone}; {percentiles} not written; {picture} not written")
    assert list(tmp_path.iterdir()) == []


def test_progress_in_a_file_says_how_much_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIET_S", "LOG_S"):
        monkeypatch.setattr(terminal_module, name, 0.05)
    monkeypatch.setattr(command, "SILENT_S", 0.3)

    def stand_still_once(header: list[Any], frames: list[bytes]) -> None:
        if header[0] == Kind.STEP and len(server.rules.blocks) == 50:
            time.sleep(0.6)

    with FakeServer() as server:
        server.rules.fault = stand_still_once
        result = run(*SHORT, "--duration", "0.9s", "--endpoint", server.endpoint)
    lines = [line for line in result.stderr.splitlines() if line.startswith("measuring ")]
    assert any(re.fullmatch(r"measuring [01]/1 s · [\d,]+ frames/s", line) for line in lines)
    assert any(re.fullmatch(r"measuring [01]/1 s · no answer for \d s", line) for line in lines)


def test_bars_end_at_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    screens: list[str] = []

    def remember(self: terminal_module.Terminal, as_json: bool = False) -> None:
        original(self, as_json)
        self.err = Console(stderr=True, force_terminal=True, width=80)
        screens.append("")

    original = terminal_module.Terminal.__init__
    monkeypatch.setattr(terminal_module.Terminal, "__init__", remember)
    monkeypatch.setattr(terminal_module, "QUIET_S", 0.0)
    with FakeServer() as server:
        result = run(*SHORT, "--duration", "1s", "--endpoint", server.endpoint)
    bars = [line for line in result.stderr.split("\r") if "measuring" in line]
    assert "1/1" in bars[-1]
