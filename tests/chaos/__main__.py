"""`python -m tests.chaos --rounds 200`: kill the server at random under load, and say what became of the streams."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.chaos.chaos import run


def main() -> int:
    """Run as told; 0 when nothing was lost and nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="how often to kill the server")
    parser.add_argument("--resets", type=int, default=0, help="how many connections to break as well")
    parser.add_argument("--seed", type=int, default=1, help="decides when")
    parser.add_argument("--durability", choices=["commit", "fsync"], default="commit")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("killing", total=told.rounds or None)
        outcome = asyncio.run(
            run(
                Path(folder),
                told.rounds,
                told.seed,
                durability=told.durability,
                resets=told.resets,
                on_round=lambda: progress.update(task, advance=1),
            )
        )
    sys.stdout.write(outcome.line() + "\n")
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
