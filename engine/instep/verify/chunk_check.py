"""One chunk of streams, checked in a pool of threads.

The chunk as a whole is stepped and goes through the float64 reference. Whole sequences in torch take more memory, so
they are computed in blocks of rows; so is everything that has to be checked again with the bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from instep.core.typing import I64, Bool
from instep.verify.checkers import (
    Checkers,
    Task,
    check_reference,
    check_stepped,
    check_torch,
    check_with_bound,
)
from instep.verify.chunks import Chunk
from instep.verify.comparison import Comparison
from instep.verify.report import StreamReport, Verdict
from instep.verify.stream_checks import StreamCheck


class ChunkCheck:
    """Begins to check the streams of a chunk when it is made; `finish` waits for the end.

    `checks` are in the order of the rows of the chunk.

    Attributes:
        stepped, torch, reference: the comparisons, once it is finished.
        stepped_s: how long stepping has taken.
    """

    def __init__(self, checkers: Checkers, chunk: Chunk, checks: Sequence[StreamCheck], pool: Executor) -> None:
        self._checkers = checkers
        self._chunk = chunk
        self._checks = checks
        self._pool = pool
        task = Task(checkers, chunk, checks)
        # The longest first, so that short ones end the work.
        self._reference = pool.submit(check_reference, task)
        self._stepped = pool.submit(_step, task)
        everything = np.arange(len(checks))
        self._torch = [pool.submit(check_torch, block) for _, block in self._blocks(everything)]

    def finish(self) -> list[StreamReport]:
        """Wait for all of it, and report in the order of the chunk."""
        self.reference, (self.stepped, self.stepped_s) = self._reference.result()[0], self._stepped.result()
        self.torch = Comparison.concatenate([block.result() for block in self._torch])
        comparisons = (self.stepped, self.torch, self.reference)
        unsettled: Bool = self.reference.wrong | self.torch.wrong
        if not self.stepped.bits_required:
            unsettled |= self.stepped.wrong
        again = [
            (rows, self._pool.submit(check_with_bound, block))
            for rows, block in self._blocks(np.flatnonzero(unsettled).astype(np.int64))
        ]
        for rows, found in again:
            for comparison, other in zip(comparisons, found.result(), strict=True):
                comparison.replace(rows, other)
        return [self._report(row) for row in range(len(self._checks))]

    def _blocks(self, rows: I64) -> Iterator[tuple[I64, Task]]:
        """Some rows in blocks that fit into memory as whole sequences."""
        if len(rows):
            for block in self._chunk.only(rows).blocks():
                count = len(block.rows)
                here, rows = rows[:count], rows[count:]
                yield here, Task(self._checkers, block, [self._checks[row] for row in here.tolist()])

    def _report(self, row: int) -> StreamReport:
        check = self._checks[row]
        comparisons = (self.stepped, self.torch, self.reference)
        problems = [*check.problems]
        problems += [comparison.first[row].sentence() for comparison in comparisons if comparison.wrong[row]]
        undecided = [each.undecided[row] for each in comparisons if row in each.undecided]
        compared = check.frames - check.unanswered
        verdict: Verdict = "exact" if compared or check.final_state is not None else "empty"
        if problems:
            verdict = "mismatch"
        elif row in self.stepped.undecided or (row in self.torch.undecided and self.stepped.differs[row]):
            verdict = "not checked"
        elif self.stepped.differs[row]:
            verdict = "within tolerance"
        wrong_first = sorted((item for item in comparisons if row in item.first), key=lambda item: not item.wrong[row])
        return StreamReport(
            stream=check.info.stream,
            name=check.info.name,
            frames=compared,
            not_compared=check.unanswered,
            verdict=verdict,
            problems=tuple(problems),
            divergence=wrong_first[0].first[row] if wrong_first else None,
            max_difference=float(self.stepped.max_error[row]),
            max_distance=float(self.torch.max_error[row]),
            max_error=float(self.reference.max_error[row]),
            lossy_from=min(undecided, default=None),
        )


def _step(task: Task) -> tuple[Comparison, float]:
    began = time.monotonic()
    return check_stepped(task), time.monotonic() - began
