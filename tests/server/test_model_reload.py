"""SIGHUP with another model.folder: models are loaded, swapped and unloaded while the others are served."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from instep.config import Config
from instep.models.folder import write_model
from instep.models.model import Model
from instep.server.log import Threshold
from instep.server.serve import Kept, reload
from instep.server.server import Server
from instep_client import AsyncClient
from tests.support.models import plain, whole
from tests.support.running import log_into, running

A = replace(plain(5, 8), name="ears")
B = replace(plain(5, 8, seed=9), name="ears")
C = replace(plain(5, 8, seed=11), name="ears")
OTHER = replace(plain(5, 16), name="eyes")


class Reloads:
    """Reloads a server that logs into `told`, with other models."""

    def __init__(self, server: Server, told: list[dict[str, Any]]) -> None:
        self._server = server
        self._told = told

    def wanted(self, folder: Any, **model: str) -> Config:
        """The configuration of the server with other models."""
        return self._server.config.model_validate(
            self._server.config.model_dump() | {"model": {"folder": folder, **model}}
        )

    async def __call__(self, folder: Any, **model: str) -> dict[str, Any]:
        """The line that says what came of it."""
        wanted, before = self.wanted(folder, **model), len(self._told)
        await reload(self._server, lambda: wanted, Threshold("info"), log_into([]), Kept())
        async with asyncio.timeout(20):
            while True:
                for line in self._told[before:]:
                    if line["event"] in ("models reloaded", "models not reloaded"):
                        return line
                await asyncio.sleep(0.01)


def folder_of(place: Path, model: Model) -> Path:
    write_model(place, model, overwrite=True)
    return place


async def test_models_become_those_of_the_configuration(tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((60, 5)).astype(np.float32)
    told: list[dict[str, Any]] = []
    (tmp_path / "broken").mkdir()
    new, eyes = folder_of(tmp_path / "new", B), folder_of(tmp_path / "eyes", OTHER)
    broken, good = tmp_path / "broken", folder_of(tmp_path / "good", plain(2, 2))
    async with (
        running(A, told=told, recording={"path": tmp_path / "recordings"}) as server,
        AsyncClient(server.endpoint, model="ears") as client,
    ):
        reloads = Reloads(server, told)
        stream = await client.open("s")
        y = [await stream.step(x[:20])]

        async def models() -> list[str]:
            return [each.name for each in await client.list_models()]

        line = await reloads([new, eyes], on_reload="replay:8")
        assert (line["loaded"], line["swapped"], line["unloaded"]) == (["eyes"], ["ears"], [])
        assert (await models(), stream.moved_at) == (["ears", "eyes"], 20)
        y.append(await stream.step(x[20:40]))
        np.testing.assert_array_equal(y[1], whole(B, x[12:40])[0][8:])

        assert not server.outdated
        for wrong, words in (
            ({"good": good, "more": broken}, "is not a model folder"),
            ({"good": good, "a/b": eyes}, "as before: 'a/b': "),
            (None, "no model to serve"),
        ):
            line = await reloads(wrong)
            assert (line["event"], words in line["reason"]) == ("models not reloaded", True), line
            assert (line["loaded"], line["swapped"]) == ([], [])
            assert line["reason"].startswith("models are as before: ")
            assert server.outdated == line["reason"]
            assert await models() == ["ears", "eyes"]
        wide = folder_of(tmp_path / "wide", plain(5, 9))
        line = await reloads({"eyes": eyes, "good": good, "ears": wide}, on_reload="move")
        assert (line["event"], "allow_other_sizes" in line["reason"]) == ("models not reloaded", True), line
        assert line["reason"].startswith("models are as before: 'ears': ")
        assert line["loaded"] == []
        assert await models() == ["ears", "eyes"], "what had been loaded was unloaded again"

        folder_of(new, C)  # the same path, another version
        line = await reloads({"eyes": eyes, "ears": new}, on_reload="move")
        assert (line["loaded"], line["swapped"]) == ([], ["ears"])
        assert (await models(), stream.moved_at) == (["eyes", "ears"], 40)
        state = whole(B, x[12:40])[1]
        np.testing.assert_array_equal(await stream.step(x[40:]), whole(C, x[40:], state)[0])
        line = await reloads({"ears": new})
        assert (line["loaded"], line["swapped"], line["unloaded"]) == ([], [], ["eyes"])
        assert await models() == ["ears"]


async def test_a_reload_that_failed_half_way_leaves_the_models_in_force_in_the_configuration(tmp_path: Path) -> None:
    old, new, eyes = [folder_of(tmp_path / each.fingerprint, each) for each in (A, B, OTHER)]
    newer = folder_of(tmp_path / "newer", plain(5, 16, seed=2))
    (tmp_path / "recordings" / "eyes@2.instep" / "in the way").mkdir(parents=True)
    told: list[dict[str, Any]] = []
    async with running(A, told=told, folder=old, recording={"path": tmp_path / "recordings"}) as server:
        reloads = Reloads(server, told)
        assert (await reloads({"ears": old, "eyes": eyes}))["loaded"] == ["eyes"]
        line = await reloads({"ears": new, "eyes": newer}, on_reload="move")
        assert (line["event"], line["swapped"]) == ("models not reloaded", ["ears"])
        assert server.config.model.folder == {"ears": new, "eyes": eyes}, "also after a crash"
        served = {each.name: each.about.fingerprint for each in server.services}
        assert served == {"ears": B.fingerprint, "eyes": OTHER.fingerprint}


async def test_a_reload_waits_for_what_is_under_way_and_the_newest_one_counts(tmp_path: Path) -> None:
    new, newer, eyes = [folder_of(tmp_path / each.fingerprint, each) for each in (B, C, OTHER)]
    told: list[dict[str, Any]] = []
    async with running(A, told=told) as server:
        wanted = Reloads(server, told).wanted
        for folder in (new, [new, eyes], [newer, eyes]):  # at once, since one that is read from a file may be overtaken
            server.loader.reload(wanted(folder).model, lambda: None)
        async with asyncio.timeout(20):
            while len(done := [line for line in told if line["event"] == "models reloaded"]) < 2:
                await asyncio.sleep(0.01)
        assert [(line["loaded"], line["swapped"]) for line in done] == [([], ["ears"]), (["eyes"], ["ears"])]
        assert server.models.find("ears").info.fingerprint == C.fingerprint
