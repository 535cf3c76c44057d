from pathlib import Path

import pytest

from tests.chaos.chaos import run

pytestmark = pytest.mark.long


@pytest.mark.timeout(400)
async def test_nothing_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    outcome = await run(tmp_path, rounds=20, seed=1)
    assert outcome.passed, outcome.line()
    assert outcome.rounds == 20


@pytest.mark.timeout(200)
async def test_nothing_is_lost_when_connections_break(tmp_path: Path) -> None:
    outcome = await run(tmp_path, rounds=0, seed=2, resets=100)
    assert outcome.passed, outcome.line()
    assert outcome.resets >= 100
