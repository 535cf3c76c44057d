"""Rules of the engine, broken on purpose one by one: the suite notices each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import cast

import pytest

from tests.support.mutation import Mutant, copy_engine, run_tests

AT_ONCE = 2
ADMISSION = "tests/core/test_admission.py"
PENDING = "tests/core/test_pending.py"
SCHEDULER = "tests/core/test_scheduler.py"
STEPPER = "tests/runtime/test_stepper.py"
FAULTS = "tests/server/test_faults.py"
LIFECYCLE = "tests/server/test_lifecycle.py"
REFUSALS = "tests/server/test_refusals.py"
OVERLOAD = "tests/end_to_end/test_overload.py"
REUSE = "tests/end_to_end/test_slot_reuse.py"

MUTANTS = [
    Mutant(
        "two frames of a stream in one batch",
        "core/pending.py",
        "return rows, self._join(slots, first, last)",
        "return rows, (self._join(slots, first, last), slots)[1]",
        (f"{PENDING}::test_frames_come_out_in_the_order_they_went_in",),
    ),
    Mutant(
        "two frames of a stream in two steps at a time",
        "core/pending.py",
        "return slots[~self._stepping[slots]]",
        "return slots",
        (PENDING,),
    ),
    Mutant(
        "a slot is used again without being cleared",
        "runtime/stepper.py",
        "        self._cache.clear(device_slots)\n",
        "",
        (f"{LIFECYCLE}::test_the_next_stream_of_a_slot_starts_from_zeros",),
    ),
    Mutant(
        "a late answer is delivered to the connection that has the number now",
        "server/engine.py",
        "self._leaving.add(client.number)",
        "self._clients.free_number(client.number)",
        (f"{REUSE}::test_a_late_answer_never_reaches_the_next_connection",),
    ),
    Mutant(
        "a slot is given to its next owner while frames of the former one are pending",
        "server/engine.py",
        "if self.table.pending[closing.slots].any():",
        "if False:",
        (f"{REUSE}::test_a_slot_is_not_given_on_while_frames_of_its_stream_are_pending",),
    ),
    Mutant(
        "a late frame is applied to the slot's next owner",
        "core/slots.py",
        "self.generation[slots] += np.uint32(1)",
        "self.generation[slots] += np.uint32(0)",
        (f"{REFUSALS}::test_a_stale_handle_beside_its_slots_next_stream_fails_its_own_column_only",),
    ),
    Mutant(
        "a gap is accepted",
        "core/admission.py",
        "codes[own & (seqs > due)] = Code.SEQ_GAP",
        "pass",
        (f"{REFUSALS}::test_wrong_seqs_unknown_and_foreign_streams",),
    ),
    Mutant(
        "a repeated frame is accepted",
        "core/admission.py",
        "codes[own & (seqs < due)] = Code.SEQ_REPEATED",
        "pass",
        (f"{REFUSALS}::test_wrong_seqs_unknown_and_foreign_streams",),
    ),
    Mutant(
        "another connection's stream is stepped",
        "core/streams.py",
        "codes[known & (self.owner[slots] != owner)] = Code.FOREIGN_STREAM",
        "pass",
        (f"{REFUSALS}::test_wrong_seqs_unknown_and_foreign_streams",),
    ),
    Mutant(
        "one bad frame fails the whole block",
        "core/admission.py",
        "lengths = finite_lengths(x)",
        "lengths = np.full(x.shape[1], finite_lengths(x).min())",
        (f"{REFUSALS}::test_one_bad_frame_in_a_block_leaves_the_others_alone",),
    ),
    Mutant(
        "a frame that is not finite is applied",
        "core/admission.py",
        "lengths = finite_lengths(x)",
        "lengths = np.full(x.shape[1], timesteps)",
        (f"{REFUSALS}::test_one_bad_frame_in_a_block_leaves_the_others_alone",),
    ),
    Mutant(
        "a padding row leaks into a stream's slot",
        "runtime/stepper.py",
        "slots_view[size:] = SCRATCH_SLOT",
        "slots_view[size:] = slots[-1]",
        (f"{STEPPER}::test_padding_rows_touch_no_stream",),
    ),
    Mutant(
        "the credit of a connection is not enforced",
        "server/verbs.py",
        "over_credit = client.frames_unanswered + frame_count > self._limits.credit_frames",
        "over_credit = False",
        (f"{REFUSALS}::test_more_than_the_credit_is_refused_whole_and_what_is_behind_it_is_a_gap",),
    ),
    Mutant(
        "the room of the whole server is not checked",
        "server/verbs.py",
        "if over_credit or frame_count > self._engine.pending.free_count:",
        "if over_credit:",
        (f"{OVERLOAD}::test_a_block_that_the_whole_server_has_no_room_for_is_refused_whole",),
    ),
    Mutant(
        "a closing stream gets another slot's final state",
        "server/engine.py",
        "self._stepper.read(slots)",
        "self._stepper.read(slots[::-1].copy())",
        (f"{LIFECYCLE}::test_an_initial_state_is_used_and_the_final_one_returned",),
    ),
    Mutant(
        "the expected seq is not moved back after a failed step",
        "server/engine.py",
        "        self.table.next_seq[slots] = seqs\n",
        "",
        (f"{FAULTS}::test_a_failed_step_is_answered_and_the_streams_go_on",),
    ),
    Mutant(
        "frames behind a failed one are applied",
        "server/engine.py",
        "behind, owners = self.pending.take_all(slots)",
        "behind, owners = np.empty(0, np.int32), np.empty(0, np.int64)",
        (f"{FAULTS}::test_frames_pipelined_behind_a_failed_one_are_gaps",),
    ),
    Mutant(
        "a client that floods is served first",
        "core/scheduler.py",
        'ready[np.argsort(self._tag[ready], kind="stable")]',
        "ready",
        (f"{SCHEDULER}::test_a_client_that_floods_waits_behind_its_own_frames",),
    ),
]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[CompletedProcess[str]]]]:
    """The runs of the mutants that were asked for, some at a time, by name."""
    asked: list[Mutant] = [
        cast(Mutant, item.callspec.params["mutant"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "mutant" in item.fixturenames
    ]

    def run(mutant: Mutant) -> CompletedProcess[str]:
        engine = tmp_path_factory.mktemp("mutant") / "engine"
        copy_engine(engine, mutant)
        return run_tests(engine, mutant.tests)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {mutant.name: pool.submit(run, mutant) for mutant in asked}


def test_the_engine_as_it_is_passes_the_same_tests(tmp_path: Path) -> None:
    copy_engine(tmp_path / "engine")
    tests = sorted({test for mutant in MUTANTS for test in mutant.tests})
    run = run_tests(tmp_path / "engine", tests)
    assert run.returncode == pytest.ExitCode.OK, run.stdout + run.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_killed(mutant: Mutant, runs: dict[str, Future[CompletedProcess[str]]]) -> None:
    run = runs[mutant.name].result()
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr


def test_a_mutant_that_no_longer_fits_the_engine_is_an_error(tmp_path: Path) -> None:
    mutant = Mutant("gone", "core/admission.py", "this text is nowhere", "", ())
    with pytest.raises(ValueError, match="stands 0 times"):
        copy_engine(tmp_path / "engine", mutant)
