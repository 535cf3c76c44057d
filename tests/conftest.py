"""What all tests share: nothing from the user's environment, no luck, one thread for numbers."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from functools import cache

import numpy as np
import pytest
from coverage import Coverage
from hypothesis import HealthCheck, settings
from typer import main, rich_utils, testing

from tests.support import environment, warm_server

environment.set_up()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# typer's runner builds all commands of a program for each call of one, which takes as long as most calls.
testing._get_command = cache(main.get_command)  # type: ignore[attr-defined]
assert rich_utils  # it reads FORCE_COLOR when it is imported, which must not be within a test that sets it

settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Measure lines in the processes that run tests: one that they start takes 0.75 s longer with it."""
    starts_workers = not hasattr(config, "workerinput") and config.getoption("numprocesses", None)
    if starts_workers:
        warm_server.wait()  # for all of them, else each compiles all kernels
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        if not starts_workers:
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("heavy") is None)  # so that none of the longest begins last


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()  # a million objects of modules and tests stay: looking for garbage among them would take a while
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    measuring = Coverage.current() if item.get_closest_marker("heavy") else None
    if measuring is None:
        return (yield)
    measuring.stop()
    try:
        return (yield)
    finally:
        measuring.start()


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(20_240_229)
