"""Runs of `instep loadtest` against a fake server."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from instep.program import app
from instep_tools.connect import Target
from instep_tools.load.app import LoadTest
from instep_tools.load.plan import LoadPlan
from instep_tools.pacing import Stop
from instep_tools.problems import Exit
from tests.support.fake_server import FakeServer
from tests.tools.helpers import JumpingClock, RememberingTerminal, info_with

PLAN = LoadPlan(streams=6, connections=2, processes=1, rate_hz=20.0, duration_s=1.0, warmup_s=0.5, block=2)
SHORT = ("--streams", "4", "--duration", "0.2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["loadtest", *map(str, arguments)], env={"COLUMNS": "80"})


class Timed:
    """One run of the command against a fake server, on a clock that waits for nobody."""

    def __init__(self, as_json: bool = False, max_streams: int = 1000, model: str = "halving") -> None:
        self.terminal = RememberingTerminal(as_json)
        self.stop = Stop()
        self.clock = JumpingClock()
        self.server = FakeServer(info_with(max_streams=max_streams, model=model))

    async def __call__(self, plan: LoadPlan = PLAN, report: Path | None = None) -> Exit:
        with self.server as server:
            test = LoadTest(Target(server.endpoint), plan, report, self.terminal, self.stop, self.clock)
            ending = await test.run()
            assert server.rules.names == {}, "streams are left open"
        return ending
