"""`instep model swap`: what it says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from instep.cli import app
from instep.models.folder import write_model
from instep_client import AsyncClient
from tests.support.fake_server import FakeServer
from tests.support.models import plain
from tests.support.running import running
from tests.support.swapping import EXACT, KEPT, A, B
from tests.support.swapping import folder as folder


async def test_the_command(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    async with running(A, folder=old, engine=EXACT) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("s")

        async def said(*arguments: str, folder: Path = folder) -> tuple[int, str]:
            command = ["model", "swap", "ears", str(folder), *arguments, "-e", server.endpoint]
            result = await asyncio.to_thread(CliRunner().invoke, app, command)
            return result.exit_code, result.output.strip()

        status, text = await said("--streams", "move")
        assert (status, text.splitlines()) == (
            0,
            [
                f"ears is now version {B.fingerprint[:8]}",
                "a restart serves what the configuration names, which is not this folder;",
                f"put it into model.folder to keep it: {folder}",
                "1 open stream moved to it, states copied",
                "the server has ears",
            ],
        )
        for arguments, words in (((), "that is served already"), (("--streams", "both"), "expected keep, move or")):
            status, sentence = await said(*arguments)
            assert (status, words in sentence) == (2, True), sentence
        await stream.step(np.zeros(5, np.float32))
        assert stream.moved_at == 0
        numbers = await client.stats()
        assert numbers["server_uptime_s"] > numbers["uptime_s"], "which is that of the version"
        write_model(old, A)
        status, text = await said(folder=old)
        assert (status, f"ears is now version {A.fingerprint[:8]}" in text) == (0, True), text
        assert "configuration" not in text  # which names that folder
        assert f"1 open stream of the old version: served as ears@{B.fingerprint[:8]} until closed" in text
        assert "features" not in text
        write_model(folder, plain(6, 8), overwrite=True)
        status, text = await said()
        assert (status, text.splitlines()[3:]) == (
            0,
            [
                "it takes 6 features and gives 8 outputs; the old version has 5 and 8",
                f"0 open streams of the old version: served as {KEPT} until closed",
                f"the server has ears, ears@{B.fingerprint[:8]}, {KEPT}",
            ],
        )


async def test_the_command_as_json(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    async with running(A, folder=old, engine=EXACT) as server, AsyncClient(server.endpoint) as client:
        await client.open("s")

        async def said(folder: Path, streams: str) -> tuple[int, list[str]]:
            command = ["model", "swap", "ears", str(folder), "--streams", streams, "--json", "-e", server.endpoint]
            result = await asyncio.to_thread(CliRunner().invoke, app, command)
            return result.exit_code, [result.stdout, result.stderr.strip()]

        status, (text, _) = await said(folder, "move")
        found = json.loads(text)
        models = found.pop("models")
        assert (status, found) == (
            0,
            {
                "model": "ears",
                "fingerprint": B.fingerprint,
                "folder": str(folder),
                "configured": False,
                "moved_streams": 1,
                "old_version": None,
            },
        )
        assert [(each["name"], each["streams"]) for each in models] == [("ears", 1)]
        write_model(old, A)
        status, (text, _) = await said(old, "keep")
        found = json.loads(text)
        assert (status, found["fingerprint"], found["configured"]) == (0, A.fingerprint, True)
        assert (found["moved_streams"], found["old_version"]) == (0, f"ears@{B.fingerprint[:8]}")
        status, (text, sentence) = await said(folder, "both")
        assert (status, json.loads(text)) == (2, {"error": sentence})


def test_the_command_says_nothing_of_a_restart_where_an_older_server_does_not(folder: Path) -> None:
    with FakeServer() as server:
        result = CliRunner().invoke(app, ["model", "swap", "halving", str(folder), "-e", server.endpoint])
    assert (result.exit_code, result.output.splitlines()) == (
        0,
        [
            "halving is now version 00",
            "0 open streams moved to it, states computed from the last frames",
            "the server has halving",
        ],
    )
