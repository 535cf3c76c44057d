"""One chunk of streams, checked in a pool of threads.

The whole chunk is stepped, and goes through the float64 reference, side by side. Whole sequences take more memory: they
are computed in blocks of its rows. So is everything where the bound has to be known (see `ways`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from itertools import chain

from instep.verify.chunks import Chunk
from instep.verify.comparison import Comparison
from instep.verify.errors import Refuted
from instep.verify.report import StreamReport, Verdict
from instep.verify.suspects import Suspect
from instep.verify.ways import (
    Found,
    Task,
    Ways,
    check_stepped,
    check_truth,
    check_whole,
    check_with_bound,
    is_settled,
)


class ChunkCheck:
    """Checks the stretches of a chunk, from when it is made; `finish` waits for the end.

    Args:
        ways: what computes.
        chunk: their frames.
        suspects: the stretches, in the order of the chunk.
        pool: where it is done.
        at_least: whether to go each way by itself first.

    Attributes:
        stepped, whole, truth: what was found, once it is finished.
    """

    stepped: Comparison
    whole: Comparison
    truth: Comparison

    def __init__(
        self, ways: Ways, chunk: Chunk, suspects: Sequence[Suspect], pool: Executor, *, at_least: bool
    ) -> None:
        self._chunk = chunk
        self._suspects = suspects
        self._pool = pool
        self._lock = threading.Lock()
        self._stopped, self._over = threading.Event(), threading.Event()
        self._by_itself: list[Future[Comparison]] = []
        self._with_bound: list[Future[Found]] = []
        self._blocks = [
            Task(ways, block, suspects[rows], self._stopped.is_set)
            for rows, block in chunk.blocks(ways.conditions.buckets[0])
        ]
        if at_least:
            all_rows = Task(ways, chunk, suspects, self._over.is_set)
            blocks = [Task(ways, block.chunk, block.suspects, self._over.is_set) for block in self._blocks]
            # The longest first, so that short ones end the work.
            self._by_itself = [self._begin(check_truth, all_rows), self._begin(check_stepped, all_rows)]
            self._by_itself += [self._begin(check_whole, block) for block in blocks]
        else:
            self._ask_for_bound()

    @property
    def needed_bound(self) -> bool:
        """Whether going each way by itself did not settle it."""
        return bool(self._with_bound)

    def finish(self) -> list[StreamReport]:
        """Wait for all of it, and report in the order of the chunk.

        Raises:
            Refuted: where a bit differs that was only presumed to be the same.
        """
        alone = [way.result() for way in self._by_itself]
        with_bound = [block.result() for block in self._with_bound]
        if any(comparison.is_refuted for comparison in chain(alone, *with_bound)):
            raise Refuted
        if with_bound:
            self.stepped, self.whole, self.truth = map(Comparison.side_by_side, zip(*with_bound, strict=True))
        else:
            self.truth, self.stepped, *blocks = alone
            self.whole = Comparison.side_by_side(blocks)
        return [self._report(row) for row in range(len(self._suspects))]

    def stop(self) -> None:
        """Have it end soon, wherever it is; nobody will ask what it found."""
        self._stopped.set()
        self._over.set()

    def _begin(self, way: Callable[[Task], Comparison], task: Task) -> Future[Comparison]:
        def go() -> Comparison:
            comparison = way(task)
            if comparison.is_refuted:
                self.stop()
            elif not is_settled(comparison):
                self._ask_for_bound()
            return comparison

        return self._pool.submit(go)

    def _ask_for_bound(self) -> None:
        with self._lock:  # several threads may ask
            if not self._with_bound:
                self._over.set()
                self._with_bound = [self._pool.submit(check_with_bound, block) for block in self._blocks]

    def _report(self, row: int) -> StreamReport:
        suspect = self._suspects[row]
        comparisons = (self.stepped, self.whole, self.truth)
        problems = [] if suspect.defect is None else [suspect.defect]
        problems += [comparison.first[row].sentence() for comparison in comparisons if comparison.wrong[row]]
        compared = int(self._chunk.lengths[row]) - suspect.unanswered
        verdict: Verdict = "exact" if compared or suspect.final_state is not None else "empty"
        if problems:
            verdict = "mismatch"
        elif self.stepped.differs[row] or self.whole.differs[row]:
            verdict = "within tolerance"
        wrong_first = sorted((item for item in comparisons if row in item.first), key=lambda item: not item.wrong[row])
        return StreamReport(
            stream=suspect.info.stream,
            name=suspect.info.name,
            frames=compared,
            not_compared=suspect.unanswered,
            verdict=verdict,
            problems=tuple(problems),
            divergence=wrong_first[0].first[row] if wrong_first else None,
            max_ulp=int(max(self.stepped.max_ulp[row], self.whole.max_ulp[row])),
            max_error=float(self.truth.max_error[row]),
        )
