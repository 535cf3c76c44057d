"""Rules, broken on purpose in the running process: the tests must notice each.

A broken rule names the function or method that keeps the rule, a variant that takes its place, and the tests of which
one must fail. The variant gets the original as its first argument, so that it can change arguments or results, call it
twice, or leave it out:

    BrokenRule(
        "a stream runs ahead of its window",
        replaces=StreamTable.in_window,
        variant=lambda original, table, rows, timesteps, window: True,
        found_by=(test_window.test_chunks_are_cut_to_half_a_window_and_wait_for_outputs_beyond_it,),
    )

A compiled kernel is replaced in the same way, as long as Python calls it: compiled callers keep what they were compiled
with, so break the outermost kernel, or run with `NUMBA_DISABLE_JIT=1`.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, TracebackType
from typing import Any
from unittest import mock

import pytest

PACKAGES = ("instep", "instep_client", "instep_tools", "benchmarks", "tests")
"""A function may have been imported by name into any module of these."""

Scenario = Callable[..., Any]
"""A test function, or any other function that raises where the rule is broken; it may be a coroutine function.
Parameters without a default are fixtures; `functools.partial` gives those that are parametrized."""


@dataclass(frozen=True)
class BrokenRule:
    """A rule and one way to break it.

    Attributes:
        wrong: a sentence about what the system does wrong.
        replaces: the function or method that keeps the rule.
        variant: called in its place, with the original before the arguments.
        found_by: of these, at least one must fail.
    """

    wrong: str
    replaces: Callable[..., Any]
    variant: Callable[..., Any]
    found_by: Sequence[Scenario]


@dataclass
class Calls:
    """How often a variant was called."""

    count: int = 0


@contextmanager
def broken(rule: BrokenRule) -> Iterator[Calls]:
    """Break the rule within the block."""
    original, variant, calls = rule.replaces, rule.variant, Calls()

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        calls.count += 1
        return variant(original, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name in _places(original):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield calls


def _places(function: Callable[..., Any]) -> list[tuple[Any, str]]:
    """Everything that holds the function: its class, or every module that imported it."""
    *outer, name = function.__qualname__.split(".")
    if outer:
        owner: Any = sys.modules[function.__module__]
        for part in outer:
            owner = getattr(owner, part)
        if inspect.getattr_static(owner, name) is not function:
            raise TypeError(f"{function.__qualname__} is not a plain method, which is all that can be replaced")
        return [(owner, name)]
    modules = [module for key, module in list(sys.modules.items()) if key.partition(".")[0] in PACKAGES]
    return [(module, key) for module in modules for key, value in list(vars(module).items()) if value is function]


def check_is_found(rule: BrokenRule, request: pytest.FixtureRequest) -> None:
    """Fail unless one of the rule's scenarios fails while the rule is broken.

    Fails as well when no scenario reaches the variant, and raises the variant's own mistakes.
    """
    with broken(rule) as calls:
        for scenario in rule.found_by:
            try:
                _run(scenario, request)
            except (Exception, pytest.fail.Exception) as error:
                if not calls.count or _was_raised_by(rule.variant, error.__traceback__):
                    raise
                return
    if not calls.count:
        pytest.fail(f"no scenario ever calls {rule.replaces.__qualname__}")
    pytest.fail(f"nothing noticed that {rule.wrong}")


def _run(scenario: Scenario, request: pytest.FixtureRequest) -> None:
    parameters = inspect.signature(scenario).parameters.values()
    fixtures = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    outcome = scenario(**{name: request.getfixturevalue(name) for name in fixtures})
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)


def _was_raised_by(variant: Callable[..., Any], trace: TracebackType | None) -> bool:
    """Whether the error comes from the variant itself, or from calling it with the wrong arguments."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert isinstance(variant, FunctionType)
    where = None if trace is None else trace.tb_frame.f_code
    return where is variant.__code__ or (where is not None and where.co_name == "stand_in")
