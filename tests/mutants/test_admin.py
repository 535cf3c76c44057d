"""The rules of the admin server, broken one by one: its tests notice each."""

from __future__ import annotations

from typing import Any

import pytest

from instep.config import endpoint
from instep.frontends.http import security
from instep.frontends.http.status import ServerStatus
from instep.security.quotas import TokenBucket
from tests.frontends.http import test_health, test_security
from tests.frontends.http.test_security import token_file as token_file
from tests.security import test_quotas
from tests.support.broken_rules import BrokenRule, check_is_found

pytestmark = pytest.mark.long


def the_beginning_is_enough(original: Any, shown: str, expected: str) -> bool:
    return expected.startswith(shown)


def any_host_is_this_machine(original: Any, host: str) -> bool:
    return True


def nobody_asks_too_much(original: Any, limit: Any, *numbers: float) -> float:
    return 0.0


def always_ready(original: Any, status: Any) -> list[str]:
    return []


RULES = (
    BrokenRule(
        "the beginning of the token is taken for it",
        replaces=security._are_equal,
        variant=the_beginning_is_enough,
        found_by=[test_security.test_every_path_but_health_wants_the_token],
    ),
    BrokenRule(
        "requests that name any host are answered",
        replaces=endpoint.is_loopback_host,
        variant=any_host_is_this_machine,
        found_by=[test_security.test_on_loopback_the_host_must_be_this_machine],
    ),
    BrokenRule(
        "everybody may ask as often as they like",
        replaces=TokenBucket.take,
        variant=nobody_asks_too_much,
        found_by=[test_quotas.test_a_block_larger_than_a_second_is_taken_and_the_next_one_waits_for_it],
    ),
    BrokenRule(
        "a server that drains says that it is ready",
        replaces=ServerStatus.problems,
        variant=always_ready,
        found_by=[test_health.test_is_ready_until_it_drains],
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.wrong)
def test_a_broken_rule_is_noticed(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    check_is_found(rule, request)
