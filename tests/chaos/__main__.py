"""`python -m tests.chaos --kills 200`: break things at random under load, and say what became of the streams."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.support import environment


def main() -> int:
    """Run as told; 0 when nothing was lost, nothing differs, and recovery took less than a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="how often to kill the server")
    parser.add_argument("--resets", type=int, default=0, help="how many connections to break after that")
    parser.add_argument("--reloads", type=int, default=0, help="how often to kill it while it reloads its model")
    parser.add_argument("--seed", type=int, default=1, help="decides when")
    parser.add_argument("--durability", choices=["commit", "fsync"], default="commit")
    told = parser.parse_args()
    environment.set_up()
    from tests.chaos.chaos import MOST_RECOVERY_S, run  # and torch, which reads the environment
    from tests.chaos.reloads import run_reloads

    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("breaking", total=told.kills + told.resets + told.reloads)
        if told.reloads:
            advance = partial(progress.update, task, advance=1)
            outcome = asyncio.run(run_reloads(Path(folder), told.reloads, told.seed, on_event=advance))
            sys.stdout.write(outcome.line() + "\n")
            return 0 if outcome.passed else 1
        outcome = asyncio.run(
            run(
                Path(folder),
                told.kills,
                told.seed,
                durability=told.durability,
                resets=told.resets,
                on_event=lambda: progress.update(task, advance=1),
            )
        )
    sys.stdout.write(outcome.line() + "\n")
    return 0 if outcome.passed and outcome.recovery_p99_s < MOST_RECOVERY_S else 1


if __name__ == "__main__":
    sys.exit(main())
