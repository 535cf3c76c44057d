"""The rules of reports and of going back to a frame, broken one by one: their tests notice each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from instep.replay import recorded_state
from instep.replay.recorded_state import Moment, Past
from instep.replay.replay import differ
from instep_tools import page
from tests.replay import test_state
from tests.replay.test_state import Story
from tests.support.broken_rules import BrokenRule, check_is_found
from tests.tools import test_page

pytestmark = pytest.mark.long


def states_are_those_of_the_definition(tmp_path: Path) -> None:
    test_state.test_every_state_across_checkpoints_and_resets_is_that_of_the_definition(Story(tmp_path))


def what_is_forged_is_no_ground(tmp_path: Path) -> None:
    test_state.test_outputs_that_do_not_come_out_again_are_no_ground_for_a_state(Story(tmp_path), tmp_path)


def one_frame_too_few(original: Any, past: Past, seq: int | None = None) -> Moment:
    moment: Moment = original(past, seq)
    return original(past, moment.seq - 1) if moment.replayed else moment


RULES = (
    BrokenRule(
        "the state before a reset passes for that before the frame",
        recorded_state._resets,
        lambda original, portion: [],
        [states_are_those_of_the_definition],
    ),
    BrokenRule("a state lacks the last frame", Past.before, one_frame_too_few, [states_are_those_of_the_definition]),
    BrokenRule(
        "a state is computed although other outputs were recorded",
        differ,
        lambda original, one, other: np.zeros(len(one), np.bool_),
        [what_is_forged_is_no_ground],
    ),
    BrokenRule(
        "a page runs what a stream is called",
        page._shown,
        lambda original, value: Markup(original(value)),
        [test_page.test_all_text_is_escaped_wherever_it_is],
    ),
    BrokenRule(
        "a name moves the cursor of a terminal that shows the page",
        page._shown,
        lambda original, value: value,
        [test_page.test_all_text_is_escaped_wherever_it_is],
    ),
)


def test_the_scenarios_pass_otherwise(tmp_path: Path) -> None:
    for number, scenario in enumerate((states_are_those_of_the_definition, what_is_forged_is_no_ground)):
        (tmp_path / str(number)).mkdir()
        scenario(tmp_path / str(number))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
