from pathlib import Path

import pytest

from tests.chaos.chaos import run
from tests.chaos.reloads import run_reloads

pytestmark = pytest.mark.heavy


async def test_nothing_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    outcome = await run(tmp_path, kills=4, seed=1)
    assert outcome.passed, outcome.line()
    assert outcome.kills == len(outcome.recovery_s) == 4


@pytest.mark.long
async def test_nothing_is_lost_when_connections_break(tmp_path: Path) -> None:
    outcome = await run(tmp_path, kills=0, seed=2, resets=30)
    assert outcome.passed, outcome.line()
    assert outcome.resets >= 30


@pytest.mark.long
async def test_nothing_is_lost_when_the_server_is_killed_while_it_reloads_its_model(tmp_path: Path) -> None:
    outcome = await run_reloads(tmp_path, reloads=4, seed=4)
    assert outcome.passed, outcome.line()


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_nothing_is_lost_when_both_go_on_for_long(tmp_path: Path) -> None:
    outcome = await run(tmp_path, kills=100, seed=3, durability="fsync", resets=200)
    assert outcome.passed, outcome.line()
