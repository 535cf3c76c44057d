"""The mechanism itself: a rule that nobody checks is reported, and nothing stays broken."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from instep_client.protocol import wire
from instep_client.protocol.wire import name_is_good
from instep_client.streams import OpenStreams
from tests.support.broken_rules import BrokenRule, broken, check_is_found

pytestmark = pytest.mark.long


def names_are_checked() -> None:
    assert not name_is_good("")
    assert not wire.name_is_good("")


async def names_are_checked_later() -> None:
    await asyncio.sleep(0)
    names_are_checked()


def name_is_checked(name: str, tmp_path: Path) -> None:
    assert tmp_path.is_dir()
    assert not name_is_good(name)


def nothing_is_checked() -> None:
    name_is_good("")


def rule(found_by: Any, variant: Any = lambda original, name: True) -> BrokenRule:
    return BrokenRule("every name is good", replaces=wire.name_is_good, variant=variant, found_by=[found_by])


def test_a_function_is_replaced_wherever_it_was_imported_and_put_back() -> None:
    names_are_checked()
    with broken(rule(names_are_checked)) as calls:
        assert name_is_good("")
        assert wire.name_is_good("")
    assert calls.count == 2
    names_are_checked()


def test_a_variant_may_use_the_original() -> None:
    with broken(rule(names_are_checked, lambda original, name: not original(name))):
        assert name_is_good("")
        assert not name_is_good("a")


def test_a_method_is_replaced_in_its_class() -> None:
    method = OpenStreams.stamp
    with broken(BrokenRule("time stands still", method, lambda original, table: 7, [])):
        assert OpenStreams().stamp() == 7
    assert OpenStreams.stamp is method


@pytest.mark.parametrize(
    "found_by",
    [names_are_checked, names_are_checked_later, partial(name_is_checked, name="")],
    ids=["plain", "later", "partial"],
)
def test_a_failing_scenario_is_what_is_wanted(found_by: Any, request: pytest.FixtureRequest) -> None:
    check_is_found(rule(found_by), request)


def test_a_rule_that_no_scenario_checks_is_reported(request: pytest.FixtureRequest) -> None:
    with pytest.raises(pytest.fail.Exception, match="nothing noticed that every name is good"):
        check_is_found(rule(nothing_is_checked), request)


def test_a_rule_that_no_scenario_reaches_is_reported(request: pytest.FixtureRequest) -> None:
    with pytest.raises(pytest.fail.Exception, match="no scenario ever calls name_is_good"):
        check_is_found(rule(lambda: None), request)


def test_a_scenario_that_fails_before_it_reaches_the_rule_does_not_count(request: pytest.FixtureRequest) -> None:
    def fails() -> None:
        raise AssertionError("too early")

    with pytest.raises(AssertionError, match="too early"):
        check_is_found(rule(fails), request)


@pytest.mark.parametrize("variant", [lambda original, name: 1 / 0, lambda original: True])
def test_a_mistake_in_the_variant_does_not_count(variant: Any, request: pytest.FixtureRequest) -> None:
    with pytest.raises((ZeroDivisionError, TypeError)):
        check_is_found(rule(names_are_checked, variant), request)
