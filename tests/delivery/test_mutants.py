"""Rules of delivery, broken one by one: the property test notices each within a few hundred examples."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from instep.core.rings import Rings
from instep.server.engine import Engine
from instep.server.lifecycle import Lifecycle
from instep.server.tap import Tap

from instep.core.streams import StreamTable
from instep.recording.errors import RecordingError
from instep.server import engine, lifecycle, recovery
from tests.delivery.machine import Faults, numbers, run
from tests.delivery.mutants import Change, broken

pytestmark = pytest.mark.heavy

STEPS = 60
EXAMPLES = 1000
"""As many as the property test tries in each of its settings."""

KILL = Faults("commit")
POWER = Faults("commit", loses_power=True)

MUTANTS = {
    "ack before log": (
        KILL,
        Change(Tap, "when_durable", (("if self._waits and (self._waiting or ticket > self._durable):", "if False:"),)),
    ),
    "no dedup": (
        KILL,
        Change(
            engine,
            "admit",
            (
                (
                    "np.where(codes == 0, seqs, 0)",
                    "np.where(codes == 0, np.maximum(seqs.astype(np.int64), expected), 0)",
                ),
            ),
        ),
    ),
    "gap accepted": (
        KILL,
        Change(
            engine,
            "admit",
            (
                ("codes[(codes == 0) & (seqs > due)] = Code.SEQ_GAP", "pass"),
                (
                    "np.where(codes == 0, seqs, 0)",
                    "np.where(codes == 0, np.minimum(seqs.astype(np.int64), expected), 0)",
                ),
            ),
        ),
    ),
    "small ring": (KILL, Change(Rings, "rows", (("% self._window", "% max(1, self.window - 1)"),))),
    "window from the server's progress": (
        KILL,
        Change(
            engine,
            "admit",
            (
                ("(seqs - acked <= ", "(expected - table.step_seq[slots] <= "),
                ("acked.astype(np.int64) + rings.window - first", "table.step_seq[slots] + rings.window - first"),
            ),
        ),
    ),
    "no fence": (
        KILL,
        Change(
            StreamTable,
            "resolve",
            (
                (
                    "current & (self.owner[slots] == owner) & ~self.closing",
                    "(self.owner[slots] != NO_OWNER) & ~self.closing",
                ),
            ),
        ),
    ),
    "epoch not durable": (KILL, Change(Lifecycle, "resume", (("self._tap.resumed(own)", "0"),))),
    "resume off by one": (
        KILL,
        Change(
            Lifecycle,
            "_grants",
            (("self._table.next_seq[slots]", "np.maximum(self._table.next_seq[slots] - 1, 0)"),),
        ),
    ),
    "two frames of a stream in a batch": (
        KILL,
        Change(
            Engine,
            "_step",
            (
                (
                    "    rows = self.rings.take(slots, self._most_steps(bucket))\n",
                    "    rows = self.rings.take(slots, self._most_steps(bucket))\n"
                    "    steps = len(rows)\n"
                    "    more = slots[self.table.next_seq[slots] > self.table.step_seq[slots] + steps]\n"
                    "    late = self.rings.rows(more, self.table.step_seq[more] + steps)\n"
                    "    rows = np.concatenate([rows, np.repeat(late[None], steps, 0)], axis=1)\n"
                    "    slots = np.concatenate([slots, more])\n",
                ),
            ),
        ),
    ),
    # Mistakes that this test has found.
    "a snapshot leaves out the step that is under way": (
        KILL,
        Change(
            Tap,
            "inputs",
            (("table.keeping.changed(slots)", "table.keeping.changed(slots[self._table.step_seq[slots] > 0])"),),
        ),
    ),
    "a repeated frame is answered with what is in its place by then": (
        KILL,
        Change(Engine, "_blocks", (("block.repeated = self.rings.outputs(own.rows[: own.skipped.max()])", "pass"),)),
    ),
    "a snapshot forgets what a restart replayed": (
        KILL,
        Change(recovery._Replay, "flush", (("table.keeping.changed(slots)", "pass"),)),
    ),
    "an epoch that the server lost is taken for that of the stream it has": (
        POWER,
        Change(lifecycle, "judge_claims", ((" | (epochs > table.epoch[slots])", ""),)),
    ),
    "a resume acknowledges frames that are pending": (
        KILL,
        Change(
            Lifecycle,
            "resume",
            (
                (
                    "    def answered() -> None:\n",
                    "    table.acked[slots] = np.maximum(table.acked[slots], claims.have[good])\n\n"
                    "    def answered() -> None:\n",
                ),
            ),
        ),
    ),
}


@pytest.mark.parametrize(("faults", "change"), MUTANTS.values(), ids=list(MUTANTS))
def test_the_property_test_kills(faults: Faults, change: Change) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(numbers(STEPS))
    def lives(example: list[int]) -> None:
        run(faults, example)

    with broken(change), pytest.raises((AssertionError, RecordingError, ValueError)):
        lives()


def test_a_mutant_that_does_not_fit_the_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="stands 0 times"), broken(Change(Tap, "record", (("no such text", ""),))):
        pass
