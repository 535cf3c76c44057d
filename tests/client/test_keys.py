"""The client and a server with keys: what connects, and what each wrong key is told apart by."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import pytest

from instep_client import AsyncClient, Client, ConnectionFailed, HandshakeFailed, InvalidInput, Refused, StreamEvicted
from instep_client.protocol.codes import Code
from tests.support.keys import KeyRing
from tests.support.models import SMALL, whole
from tests.support.running import running
from tests.support.streaming import random_frames
from tests.support.traffic import assert_same_bits
from tests.support.warm import WarmProcess


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path, mic={"streams": "mic-*"}, ann={"role": "operator"})


async def test_whatever_is_wrong_with_the_keys_is_told_within_the_timeout_and_told_apart(keys: KeyRing) -> None:
    said = set()
    async with running(SMALL, transport=keys.transport) as locked, running(SMALL) as free:
        cases = [
            (locked.endpoint, {}),
            (locked.endpoint, keys.of_client("unknown")),
            (locked.endpoint, keys.of_client("mic", server="another")),
            (free.endpoint, keys.of_client("mic")),
        ]
        for endpoint, arguments in cases:
            began = time.monotonic()
            with pytest.raises(HandshakeFailed) as caught:
                await AsyncClient(endpoint, timeout_s=4.0, **arguments).connect()
            assert time.monotonic() - began < 10
            said.add(str(caught.value).replace(endpoint, ""))
        assert len(said) == 3  # the last two cannot be told apart
        server_key = keys.make("server")[0]
        async with AsyncClient(locked.endpoint, **{**keys.of_client("mic"), "server_key": server_key}) as client:
            assert client.info.model == SMALL.name


async def test_nobody_without_keys_is_told_of_keys_by_what_only_accepts_connections() -> None:
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionFailed) as caught:
            await AsyncClient(f"tcp://127.0.0.1:{port}", timeout_s=0.5).connect()
    assert type(caught.value) is ConnectionFailed


def test_key_files_are_given_together_and_are_what_they_should_be(keys: KeyRing) -> None:
    good = keys.of_client("mic")
    for bad in (
        {**good, "server_key": None},
        {**good, "key_file": None},
        {**good, "key_file": good["server_key"]},
        {**good, "server_key": good["key_file"]},
    ):
        with pytest.raises(InvalidInput):
            Client("tcp://127.0.0.1:5757", **bad)


async def test_it_reconnects_by_itself_and_no_frame_is_lost_when_the_server_is_restarted(
    keys: KeyRing, tmp_path: Path, rng: np.random.Generator
) -> None:
    x, record = random_frames(rng, 40, 1)[:, 0], {"path": tmp_path / "rec.instep"}
    async with running(SMALL, transport=keys.transport, recording=record) as server:
        endpoint = server.endpoint
        client = AsyncClient(endpoint, **keys.of_client("mic"))
        await client.connect()
        stream = await client.open("mic-1")
        first = await stream.step(x[:20])
    async with running(SMALL, transport={**keys.transport, "endpoint": endpoint}, recording=record):
        second = await stream.step(x[20:])
        await client.close()
    assert_same_bits(np.concatenate([first, second]), whole(SMALL, x)[0], "the stream")


async def test_an_operator_closes_and_parks_streams_of_others(keys: KeyRing) -> None:
    async with (
        running(SMALL, transport=keys.transport) as server,
        AsyncClient(server.endpoint, **keys.of_client("mic")) as mic,
        AsyncClient(server.endpoint, **keys.of_client("ann")) as ann,
    ):
        streams = [await mic.open(f"mic-{number}") for number in range(3)]
        with pytest.raises(Refused) as refused:
            await mic.remove_streams(["mic-0"])
        assert refused.value.code is Code.NOT_ALLOWED
        assert await ann.remove_streams(["mic-0", "none"]) == ["none"]
        assert await ann.remove_streams(["mic-1"], park=True) == []
        for stream in streams[:2]:
            with pytest.raises(StreamEvicted) as evicted:
                await stream.step(np.zeros(5))
            assert evicted.value.code is Code.BY_OPERATOR
        await (await mic.open("mic-1", if_exists="resume")).step(np.zeros(5))
        used, own = await ann.stats(), [key for key in await mic.stats() if "{" in key]
        assert used['principal_streams{principal="mic"}'] == 2
        assert [used[f'principal_connections{{principal="{name}"}}'] for name in ("mic", "ann")] == [1, 1]
        assert own
        assert all('"mic"' in key for key in own)


@pytest.mark.parametrize("as_variables", [False, True])
async def test_a_command_takes_the_keys_before_its_name_or_from_variables(keys: KeyRing, as_variables: bool) -> None:
    words = {"--key-file": str(keys.folder / "mic.key_secret"), "--server-key": str(keys.folder / "server.key")}
    variables = {"INSTEP_" + word[2:].upper().replace("-", "_"): file for word, file in words.items()}
    before, environment = ([], variables) if as_variables else ([each for pair in words.items() for each in pair], {})
    async with running(SMALL, transport=keys.transport) as server:
        typed = [*before, "ping", "-e", server.endpoint]
        done = await asyncio.to_thread(
            WarmProcess, typed, env={**os.environ, **environment}, output=keys.folder / "said"
        )
        assert await asyncio.to_thread(done.wait, 60) == 0, (keys.folder / "said").read_text()
