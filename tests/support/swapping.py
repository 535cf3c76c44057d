"""Versions of a model for tests of reloads, and what streams that move between them have to answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from instep.core.typing import F32
from instep.models.folder import write_model
from instep.program import app
from instep.recording.reader import RecordingReader
from instep.server.loader import UNDER_WAY
from instep.server.server import Server
from tests.support.models import plain, whole

A = replace(plain(5, 8), name="ears")
B = replace(plain(5, 8, seed=9), name="ears")
DEEPER = replace(plain(5, 8, layers=2), name="ears")
WIDER = plain(5, 16)
EXACT = {"max_batch_size": 16}
KEPT = f"ears@{A.fingerprint[:8]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The new version."""
    write_model(tmp_path / "new", B)
    return tmp_path / "new"


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Where every version is recorded."""
    return tmp_path / "recordings"


async def reload_models(server: Server, folder: Any, on_reload: str = "keep", **model: Any) -> str:
    """Reload with another model.folder, as SIGHUP does: why that is not possible, or nothing.

    A single folder stands for the model "ears".
    """
    folders = {"ears": folder} if isinstance(folder, Path) else folder
    sections = {"folder": folders, "on_reload": on_reload, **model}
    wanted = server.config.model_validate(server.config.model_dump() | {"model": sections}).model
    server.loader.reload(wanted)
    async with asyncio.timeout(30):
        while server.loader.problem == UNDER_WAY or len(server.loader.tasks):
            await asyncio.sleep(0.005)
    return server.loader.problem


def truth(x: F32, moved_at: int) -> F32:
    """Outputs of A for the frames before `moved_at`, and of B from A's state for the others."""
    before, state = whole(A, x[:moved_at])
    return np.concatenate([before, whole(B, x[moved_at:], state)[0]])


def replayed_truth(x: F32, first: int, moved_at: int) -> F32:
    """Outputs of A for the frames before `moved_at`, and of DEEPER, which began with frame `first`, for the others."""
    after = whole(DEEPER, x[first:])[0][moved_at - first :]
    return np.concatenate([whole(A, x[:moved_at])[0], after])


def replays(recording: Path) -> dict[str, int]:
    """By name of a stream, the first frame that its first state in a recording holds."""
    with RecordingReader(recording) as reader:
        names = {each.stream: each.name for each in reader.streams()}
        events = [each for each in reader.events() if each.kind == "moved" and each.seq is not None]
        return {names[each.stream or 0]: each.seq or 0 for each in events}


def assert_each_verifies_with_its_version(recordings: Path, folder: Path) -> None:
    """A is in ears.instep, and the new version in the one behind it; no other is there."""
    write_model(folder.with_name("old"), A, overwrite=True)
    models = {"ears.instep": folder.with_name("old"), "ears@2.instep": folder}
    assert sorted(each.name for each in recordings.glob("*.instep")) == list(models)
    for name, model in models.items():
        result = CliRunner().invoke(app, ["verify", str(recordings / name), "--folder", str(model)])
        assert result.exit_code == 0, result.output
