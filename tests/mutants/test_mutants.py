"""Rules of the engine, broken on purpose one by one: the suite notices each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mutation import ROOT, Mutant, copy_engine, is_killed, run_tests

pytestmark = pytest.mark.heavy

STEPPER = "tests/runtime/test_stepper.py"
BURSTS = "tests/server/test_bursts.py"
DELIVERY = "tests/server/test_delivery.py"
FAULTS = "tests/server/test_faults.py"
LIFECYCLE = "tests/server/test_lifecycle.py"
MANY = "tests/server/test_many.py"
RUNS = "tests/server/test_runs.py"
WORKER = "tests/runtime/test_worker.py"
REFUSALS = "tests/server/test_refusals.py"
RESUME = "tests/server/test_resume.py"
OVERLOAD = "tests/end_to_end/test_overload.py"
REUSE = "tests/end_to_end/test_slot_reuse.py"

MUTANTS = [
    Mutant(
        "a state is read before the steps that were there before it",
        "runtime/worker.py",
        "if self._stepping:",
        "if not self._line:",
        (f"{WORKER}::test_a_job_waits_for_the_steps_before_it_and_a_step_for_the_jobs_before_it",),
    ),
    Mutant(
        "a run goes on while others wait",
        "server/engine.py",
        "if self.scheduler.ready_count:\n            return 1",
        "if self.scheduler.ready_count < 0:\n            return 1",
        (f"{RUNS}::test_there_are_no_runs_while_others_wait",),
    ),
    Mutant(
        "a fused step with other bits is used",
        "models/gru/network.py",
        "if not torch.equal(one.view(torch.int32), other.view(torch.int32)):",
        "if False:",
        ("tests/models/gru/test_step.py::test_with_other_bits_it_is_left_out",),
    ),
    Mutant(
        "a small bucket of the fused step is compared over one batch",
        "models/gru/network.py",
        "for _ in range(0, rows, bucket):",
        "for _ in range(1):",
        ("tests/models/gru/test_step.py::test_with_bits_that_seldom_differ_it_is_left_out",),
    ),
    Mutant(
        "a stream goes on from a state whose output nobody got",
        "runtime/stepper.py",
        'raise StateLost(f"the outputs could not be written: {error}") from error',
        "raise",
        (f"{STEPPER}::test_a_step_whose_outputs_cannot_be_written_loses_the_states_of_its_batch",),
    ),
    Mutant(
        "a slot is used again without being cleared",
        "runtime/stepper.py",
        "self._cache.clear(torch.from_numpy(slots).to(self._device))",
        "pass",
        (f"{LIFECYCLE}::test_the_next_stream_of_a_slot_starts_from_zeros",),
    ),
    Mutant(
        "a late answer is delivered to the connection that has the number now",
        "server/postbox.py",
        "if self._clients.by_number(client.number) is not client:",
        "client = self._clients.by_number(client.number) or client\n        if client.number < 0:",
        (f"{REUSE}::test_a_late_answer_never_reaches_the_next_connection",),
        hangs=True,
    ),
    Mutant(
        "a connection's number is given on while it has streams",
        "server/departures.py",
        "if not self._table.owned[number]:",
        "if number >= 0:",
        (f"{MANY}::test_a_stream_whose_turn_to_be_parked_has_not_come_is_resumed_or_refused_as_any_other",),
    ),
    Mutant(
        "a slot is given to its next owner while frames of the former one are pending",
        "server/waits.py",
        "if self._table.pending[slots].any():",
        "if False:",
        (f"{REUSE}::test_a_slot_is_not_given_on_while_frames_of_its_stream_are_pending",),
    ),
    Mutant(
        "an output is acknowledged that was never computed",
        "server/lifecycle.py",
        "have = np.minimum(claims.have[good][is_own], table.next_seq[own])",
        "have = claims.have[good][is_own]",
        (f"{RESUME}::test_a_step_that_fails_while_its_connection_is_gone_is_as_if_its_frames_were_never_sent",),
    ),
    Mutant(
        "a stream is resumed one frame too late",
        "server/lifecycle.py",
        'grants["next_seq"] = self._table.next_seq[slots]',
        'grants["next_seq"] = self._table.next_seq[slots] + 1',
        (f"{RESUME}::test_a_resumed_stream_goes_on_as_if_nothing_had_happened",),
    ),
    Mutant(
        "an answer goes before the recording has its inputs",
        "server/tap.py",
        "if self._waits and (self._waiting or ticket > self._durable):",
        "if False:",
        (f"{FAULTS}::test_nothing_is_answered_before_the_recording_has_it",),
    ),
    Mutant(
        "a padding row leaks into a stream's slot",
        "runtime/host_batch.py",
        "= self._states[:, :rows]",
        "= self._states[:, -rows:]",
        (f"{STEPPER}::test_padding_rows_touch_no_stream",),
    ),
    Mutant(
        "padding rows stand where the rows of the batch before did",
        "runtime/stepper.py",
        "batch.slots[size:] = SCRATCH_SLOT",
        "pass",
        (f"{STEPPER}::test_padding_rows_stand_at_the_scratch_slot",),
    ),
    Mutant(
        "an answer goes to another client in the same batch",
        "server/answers.py",
        "message = newest.get(client)",
        "message = next(iter(newest.values()), None)",
        (f"{BURSTS}::test_what_one_client_asks_together_is_answered_in_one_message",),
    ),
    Mutant(
        "an answer goes to the client that has the number now",
        "server/answers.py",
        "client, width = block.client.arrival",
        "client, width = block.client.number",
        (f"{BURSTS}::test_a_client_gets_no_answers_of_the_gone_one_that_had_its_number",),
    ),
    Mutant(
        "of what is answered in one message, the credit of the first alone is given back",
        "server/engine.py",
        "sum(block.frames for block in blocks)",
        "blocks[0].frames",
        (f"{BURSTS}::test_an_answer_is_no_larger_than_a_block_may_be",),
    ),
    Mutant(
        "an answer has the outputs of the message beside it",
        "server/answers.py",
        "yield verdict.of(slice(start, end))\n            verdict, start",
        "yield verdict.of(slice(0, end - start))\n            verdict, start",
        ("tests/server/test_answers.py::test_an_answer_has_the_outputs_of_each_column_in_order",),
    ),
    Mutant(
        "a stream that stands in two messages is judged in both at once",
        "server/burst.py",
        "or not handles.isdisjoint(distinct)",
        "",
        (f"{BURSTS}::test_a_stream_that_stands_in_two_messages_is_judged_in_their_order",),
    ),
    Mutant(
        "the credit of a connection is not enforced",
        "server/burst.py",
        "over_credit = frames > credit",
        "over_credit = False",
        (f"{REFUSALS}::test_more_than_the_credit_is_refused_whole_and_what_is_behind_it_is_a_gap",),
    ),
    Mutant(
        "the room of the whole server is not checked",
        "server/burst.py",
        "over_room = self._frames + frames > self._room_frames or len(steps) >= self._room_blocks",
        "over_room = False",
        (f"{OVERLOAD}::test_a_block_that_the_whole_server_has_no_room_for_is_refused_whole",),
    ),
    Mutant(
        "a closing stream gets another slot's final state",
        "server/lifecycle.py",
        "self._stepper.read(slots[readable])",
        "self._stepper.read(slots[readable][::-1].copy())",
        (f"{LIFECYCLE}::test_an_initial_state_is_used_and_the_final_one_returned",),
    ),
]

ALWAYS = {
    "two frames of a stream in one batch",
    "a slot is used again without being cleared",
    "a late answer is delivered to the connection that has the number now",
    "a gap is accepted",
    "a frame that is sent again is computed again",
    "a padding row leaks into a stream's slot",
    "the window moves with what was computed",
    "an answer goes before the recording has its inputs",
}
"""Those that no run of the suite leaves out."""
assert {mutant.name for mutant in MUTANTS} > ALWAYS

PARAMETERS = [
    pytest.param(mutant, id=mutant.name.replace(" ", "-"), marks=[] if mutant.name in ALWAYS else [pytest.mark.long])
    for mutant in MUTANTS
]


@pytest.mark.parametrize("names", [ALWAYS, pytest.param({mutant.name for mutant in MUTANTS}, marks=pytest.mark.long)])
def test_the_engine_as_it_is_passes_the_same_tests(tmp_path: Path, names: set[str]) -> None:
    copy_engine(tmp_path / "engine")
    tests = sorted({test for mutant in MUTANTS if mutant.name in names for test in mutant.tests})
    run = run_tests(tmp_path / "engine", tests, timeout_s=100)
    assert run.returncode == pytest.ExitCode.OK, run.stdout + run.stderr


@pytest.mark.parametrize("mutant", PARAMETERS)
def test_a_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    copy_engine(tmp_path / "engine", mutant)
    run = run_tests(tmp_path / "engine", mutant.tests, mutant.timeout_s)
    assert is_killed(mutant, run), run.stdout + run.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_fits_the_engine(mutant: Mutant, tmp_path: Path) -> None:
    """Those as well that are run in `make test-long` only."""
    copy_engine(tmp_path / "engine", mutant)


def test_a_mutant_that_no_longer_fits_the_engine_is_an_error(tmp_path: Path) -> None:
    mutant = Mutant("gone", "core/admission.py", "this text is nowhere", "", ())
    with pytest.raises(ValueError, match="stands 0 times"):
        copy_engine(tmp_path / "engine", mutant)


@pytest.mark.parametrize(
    ("test", "killed", "killed_if_it_hangs"),
    [
        ("def test(): assert False", True, True),
        ("import threading\ndef test(): threading.Event().wait()", False, True),
        ("def test(): pass", False, False),
        ("def test(", False, False),
    ],
)
def test_only_what_may_hang_is_killed_by_taking_too_long(
    tmp_path: Path, test: str, killed: bool, killed_if_it_hangs: bool
) -> None:
    (tmp_path / "test_it.py").write_text(test)
    run = run_tests(ROOT / "engine", [str(tmp_path / "test_it.py")], timeout_s=5)
    for hangs, truth in ((False, killed), (True, killed_if_it_hangs)):
        assert is_killed(Mutant("any", "", "", "", (), hangs), run) == truth, run.stdout + run.stderr
