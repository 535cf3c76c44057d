"""`instep loadtest` with a plan of the benchmarks' own: `python -m benchmarks.client_load ENDPOINT MODEL PLAN`."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from instep_tools.connect import Target
from instep_tools.load.app import LoadTest
from instep_tools.load.plan import LoadPlan
from instep_tools.pacing import Stop
from instep_tools.terminal import Terminal


def load_command(endpoint: str, plan: LoadPlan, model: str = "") -> list[str]:
    """The command line of a process that prints what `instep loadtest --json` prints."""
    return [sys.executable, "-m", "benchmarks.client_load", endpoint, model, json.dumps(asdict(plan))]


async def _main(endpoint: str, model: str, plan: str) -> int:
    return await LoadTest(Target(endpoint, model), LoadPlan(**json.loads(plan)), None, Terminal(True), Stop()).run()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(_main(*sys.argv[1:])))
