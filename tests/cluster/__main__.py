"""`python -m tests.cluster --rounds 50`: break a cluster at random under load, and show how long it was interrupted."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from tests.support import environment


def main() -> None:
    """Run as told; an AssertionError where anything was lost, differs, or stays away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="how many faults to give")
    parser.add_argument("--seed", type=int, default=1, help="decides which, and when")
    parser.add_argument("--on", choices=("", "ray"), default="", help="what starts the programs; empty: this one")
    told = parser.parse_args()
    environment.set_up()
    from tests.cluster.chaos import report, run  # and torch, which reads the environment
    from tests.cluster.cluster import Cluster
    from tests.cluster.ray_cluster import RayCluster

    kind = RayCluster if told.on else Cluster
    with tempfile.TemporaryDirectory(prefix="instep-cluster-") as folder:
        report(asyncio.run(run(Path(folder), told.rounds, told.seed, kind)))


if __name__ == "__main__":
    main()
