"""What each role may do, on a live encrypted server, against the table of docs/security.md."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import pytest

from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind
from tests.docs.support.page import Page
from tests.support.keys import KeyRing
from tests.support.models import SEED_SIZED, SMALL
from tests.support.raw import RawClient, Reply
from tests.support.running import running

ROLES: Final = ("producer", "reader", "operator")
KINDS: Final = ("own", "matching", "foreign")
PEERS: Final[dict[str, dict[str, Any]]] = {
    "producer": {"role": "producer", "streams": "mic-*"},
    "reader": {"role": "reader"},
    "operator": {"role": "operator"},
    "colleague": {"role": "producer", "streams": "mic-*"},
    "stranger": {"role": "producer", "streams": ["imu-*"], "models": [SMALL.name]},
}
TABLE: Final = Page("security.md").table("What each role may do", "")
ONE_FRAME: Final = np.zeros((1, 1, 5), np.float32)
Verb = Callable[[RawClient, str, int], Awaitable[Reply]]


async def _open(client: RawClient, name: str, handle: int) -> Reply:
    return await client.open(f"{name}-new")


async def _fork(client: RawClient, name: str, handle: int) -> Reply:
    mine = await client.open(f"mic-original-{name}")
    return await client.fork(mine.handles() if mine.kind is Kind.OPENED else [handle], [f"{name}-copy"])


async def _resume(client: RawClient, name: str, handle: int) -> Reply:
    return await client.resume([name], [wire.HAVE_ALL], [0], take_over=True)


async def _read_named(client: RawClient, name: str, handle: int) -> Reply:
    return await client.ask(*client.read_named_message([name]))


async def _remove(client: RawClient, name: str, handle: int) -> Reply:
    return await client.ask(msgpack.packb([Kind.REMOVE, client.next_request(), 1, 1]), name.encode())


async def _hello(client: RawClient, name: str, handle: int) -> Reply:
    return await client.ask(*client.hello_message())


async def _ping(client: RawClient, name: str, handle: int) -> Reply:
    return await client.ask(msgpack.packb([Kind.PING, client.next_request()]))


async def _shards(client: RawClient, name: str, handle: int) -> Reply:
    return await client.ask(msgpack.packb([Kind.SHARDS, client.next_request()]))


async def _list(client: RawClient, name: str, handle: int) -> Reply:
    reply = await client.ask(msgpack.packb([Kind.LIST, client.next_request(), 0, 1000, 0]), b"")
    assert reply.kind is Kind.LISTED
    return reply


VERBS: Final[dict[str, Verb]] = {
    "HELLO": _hello,
    "PING": _ping,
    "SHARDS": _shards,
    "OPEN": _open,
    "FORK": _fork,
    "RESUME": _resume,
    "READ_STATE by name": _read_named,
    "STEP": lambda client, name, handle: client.step([handle], [0], ONE_FRAME),
    "RESET": lambda client, name, handle: client.reset([handle]),
    "READ_STATE by handle": lambda client, name, handle: client.read_state([handle]),
    "CLOSE": lambda client, name, handle: client.close([handle]),
    "LIST": _list,
    "REMOVE": _remove,
}
MAY: Final = {
    (verb, role): cell
    for verbs, *cells in TABLE.rows
    for verb in verbs.split(", ")
    for role, cell in zip(ROLES, cells, strict=True)
}
GOOD_FOR: Final = {
    "yes": {"own", "matching", "foreign"},
    "names that match": {"own", "matching"},
    "own": {"own"},
    "no": set(),
}


def test_the_table_is_about_all_of_these() -> None:
    assert TABLE.columns[1:] == ROLES
    assert {verb for verb, _ in MAY} == VERBS.keys() | {"MODELS", "STATS"}
    assert set(MAY.values()) == GOOD_FOR.keys()


def outcome(verb: str, reply: Reply, name: str) -> Code | None:
    """The code of a refusal, of the message or of its only stream; None where it was done."""
    if verb == "LIST":
        return None if name in reply.frames[0].decode().split("\n") else Code.UNKNOWN_STREAM
    if reply.kind is Kind.ERROR:
        return reply.code
    return next(iter(reply.codes()), None) if verb not in ("HELLO", "PING", "SHARDS") else None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_every_verb_by_every_role_on_every_kind_of_stream(tmp_path: Path, host: str) -> None:
    keys = KeyRing(tmp_path, **PEERS)
    transport = {**keys.transport, "endpoint": f"tcp://{host}:*"}
    wrong = []
    async with running(SMALL, transport=transport) as server:
        endpoint = server.endpoint.replace("0.0.0.0", "127.0.0.1")
        for (verb, role), cell in MAY.items():
            for kind in KINDS if verb in VERBS else ():
                async with AsyncExitStack() as clients:
                    names = ("colleague", "stranger", role)
                    made = [RawClient(endpoint, curve=keys.curve(name)) for name in names]
                    colleague, stranger, client = [await clients.enter_async_context(each) for each in made]
                    owner = {"own": client, "matching": colleague, "foreign": stranger}[kind]
                    name = f"{'imu' if kind == 'foreign' else 'mic'}-{verb}-{role}-{kind}"
                    for each in {client, owner}:
                        await each.hello()
                    opened = await owner.open(name)
                    handle = int(opened.handles()[0]) if opened.kind is Kind.OPENED else 1
                    reply = await VERBS[verb](client, name, handle)
                    while not reply.request:
                        reply = await client.receive()
                    code = outcome(verb, reply, name)
                    if kind == "own" and role == "reader":  # it has none
                        continue
                    if (code is None) is not (kind in GOOD_FOR[cell]):
                        wrong.append((verb, role, kind, cell, code))
                    elif code is not None:
                        assert code is expected(verb, cell), (verb, role, kind)
    assert wrong == []


def expected(verb: str, cell: str) -> Code:
    if verb in ("STEP", "READ_STATE by handle"):
        return Code.FOREIGN_STREAM
    if cell == "no" or verb in ("OPEN", "FORK"):
        return Code.NOT_ALLOWED
    return Code.FOREIGN_STREAM if cell == "own" else Code.UNKNOWN_STREAM


async def test_answers_about_a_foreign_name_are_those_about_a_name_that_nobody_has(tmp_path: Path) -> None:
    keys = KeyRing(tmp_path, **PEERS, helper={"role": "operator", "streams": "mic-*"})
    told: list[dict[str, Any]] = []
    async with (
        running(SMALL, transport=keys.transport, told=told) as server,
        RawClient(server.endpoint, curve=keys.curve("stranger")) as stranger,
        RawClient(server.endpoint, curve=keys.curve("helper")) as helper,
    ):
        await stranger.hello()
        await stranger.open("imu-live", "imu-parked", "imu-closed")
        for client in (stranger, helper):
            if client is helper:
                await client.hello()
        for verb in ("OPEN", "RESUME", "READ_STATE by name", "REMOVE"):
            answers: list[Any] = []
            for name in ("imu-live", "imu-none"):
                reply = await VERBS[verb](helper, name, 0)
                answers.append((reply.kind, reply.header[2:], reply.frames))
            assert answers[0] == answers[1], verb
        listed = await _list(helper, "", 0)
        assert listed.header[2] == 0
    refused = [(each["principal"], each["code"]) for each in told if each["event"] == "refused"]
    assert refused == [("helper", code.name) for code in (Code.NOT_ALLOWED, *[Code.UNKNOWN_STREAM] * 3) for _ in "12"]


async def test_models_and_usage_are_those_that_a_principal_may_see(tmp_path: Path) -> None:
    keys = KeyRing(tmp_path, **PEERS)
    async with AsyncExitStack() as clients:
        server = await clients.enter_async_context(running(SEED_SIZED, SMALL, transport=keys.transport))
        seen: dict[str, tuple[list[str], list[str]]] = {}
        for name in ("producer", "stranger", "reader"):
            client = await clients.enter_async_context(RawClient(server.endpoint, curve=keys.curve(name)))
            welcome = await client.hello()
            assert welcome.header[4] == (SMALL if name == "stranger" else SEED_SIZED).name  # the first it may use
            models = await client.ask(msgpack.packb([Kind.MODELS, client.next_request()]))
            used = await client.ask(msgpack.packb([Kind.STATS, client.next_request()]))
            numbers = dict(used.header[2])
            names = [each for each in sorted(PEERS) if f'principal_streams{{principal="{each}"}}' in numbers]
            seen[name] = models.frames[0].decode().split("\n"), names
        assert seen == {
            "producer": ([SEED_SIZED.name, SMALL.name], ["producer"]),
            "stranger": ([SMALL.name], ["stranger"]),
            "reader": ([SEED_SIZED.name, SMALL.name], sorted(PEERS)),
        }
        refused = await clients.enter_async_context(RawClient(server.endpoint, curve=keys.curve("stranger")))
        answers = [await refused.ask(*refused.hello_message(model=name)) for name in (SEED_SIZED.name, "none")]
        assert [answer.code for answer in answers] == [Code.UNKNOWN_MODEL] * 2
        assert SEED_SIZED.name not in answers[1].sentence
