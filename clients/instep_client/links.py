"""The connections of one client: the first one, and those to other shards of its server's cluster.

Most clients have one. The first welcome says whether the server is a shard of a cluster; then the connections to other
shards are made when they are first needed, and `Links` asks where the shards are: four times a second while one of them
is in trouble, and once a minute otherwise.
"""

from __future__ import annotations

import asyncio
import time
from asyncio.staggered import staggered_race
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from random import choice
from typing import Any, Final, TypeVar

import numpy as np

from instep_client.arguments import Indices, good_names
from instep_client.connection import ENDED, OPEN, Call
from instep_client.driver import Driver
from instep_client.key_files import ClientKeys
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ConnectionFailed, ConnectionRefused, HandshakeFailed, InstepError, Refused
from instep_client.protocol.wire import shard_of
from instep_client.session import Session

C = TypeVar("C", bound=Call[Any])

_LOOK_S: Final = 0.25
"""The time between two questions where the shards are, and before the next of several given endpoints is tried."""
_ANSWER_S: Final = 1.0
"""The longest wait for an answer to that question."""
_PASSES: Final = frozenset({Code.BUSY, Code.SHUTTING_DOWN})
"""Codes with which a server refuses a client only for a while."""
_REFRESH_S: Final = 60.0
"""A client whose connections are all well asks for the table this often, so that its table does not grow old."""


async def all_of(
    asked: Iterable[tuple[Driver, C]], wait: Callable[[Driver, C], Awaitable[None]] = Driver.until_woken
) -> list[C]:
    """Make all these calls, and `wait` until they have ended.

    If one of them cannot be made, or the waiting task is cancelled, all are cancelled.
    """
    made: list[tuple[Driver, C]] = []
    try:
        for driver, call in asked:
            made.append((driver, call))
            driver.wake()
        for driver, call in made:
            await wait(driver, call)
    except BaseException:
        for driver, call in made:
            driver.session.cancel(call)
            driver.wake()
        raise
    return [call for _, call in made]


class Links:
    """The connections of one client, by shard.

    Args:
        endpoints: of servers of one cluster, separated by commas; one has to answer.
        keys: the client's.
        settings: of every session.

    Raises:
        InvalidInput: for a bad endpoint or setting.
    """

    def __init__(self, endpoints: str, keys: ClientKeys | None, **settings: Any) -> None:
        self._keys = keys
        self._settings = settings
        self._given = [self._make(endpoint.strip(" ")) for endpoint in endpoints.split(",")]
        self._endpoints = {driver.session.endpoint for driver in self._given}
        self.first = self._given[0]
        """The connection to the server that answered first."""
        self._by_shard: dict[int, Driver] = {}
        self._following: asyncio.Task[None] | None = None
        """Follows the shards of a cluster, from the first connection on until the client is closed."""

    def _make(self, endpoint: str, **other: Any) -> Driver:
        return Driver(Session(endpoint, **(self._settings | other)), self._keys)

    def __len__(self) -> int:
        """The number of shards, 1 for a server on its own and before the first welcome."""
        return len(self.first.session.shards)

    @property
    def are_open(self) -> bool:
        """Whether every connection is open."""
        return all(driver.session.state is OPEN for driver in self._by_shard.values() or [self.first])

    async def connect(self, wait: bool) -> None:
        """Connect, and learn where the other shards are; see `Driver.start`.

        Of several endpoints the first that answers is used. If none has done so for `reconnect_s`, this raises an error
        that says more than that nothing listens, if there is one.
        """
        starts = [partial(self._start, place, wait, time.monotonic()) for place in range(len(self._given))]
        _, fastest, failures = await staggered_race(starts, _LOOK_S)
        if fastest is None:
            raise min(filter(None, failures), key=lambda error: isinstance(error, ConnectionRefused))
        self.first = self._given[fastest]
        self._given = [self.first]  # so that no other one is begun if this is called again, which is refused
        info = self.first.session.info
        self._by_shard[info.shard] = self.first
        self._settings["model"] = info.model  # another server may have another default
        if info.shards > 1 or info.term:  # others may have other streams, or take this one's place
            try:
                await self._ask(self.first)
            except BaseException:
                await self.close()
                raise
            self._following = asyncio.create_task(self._follow())

    async def _start(self, place: int, wait: bool, began: float) -> None:
        """Start a given connection; where there are several, again for a while, because a node may be taking over."""
        tries_s = self.first.session.attempts.reconnect_s if len(self._given) > 1 else 0.0
        while True:
            driver = self._given[place]
            try:
                return await driver.start(wait)
            except (ConnectionFailed, Refused) as error:
                is_final = isinstance(error, Refused) and error.code not in _PASSES
                if is_final or isinstance(error, HandshakeFailed) or time.monotonic() >= began + tries_s:
                    raise
            await asyncio.sleep(_LOOK_S)
            self._given[place] = self._make(driver.session.endpoint)

    async def close(self, park: bool = False) -> None:
        """Close every connection and its streams; see `Driver.stop`."""
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.wait([following])
        await asyncio.gather(*(driver.stop(park) for driver in {*self._given, *self._by_shard.values()}))

    # ── Shards ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def of_shard(self, shard: int) -> Driver:
        """The connection to a shard. Calls wait while it is not open yet; one that was given up is made anew."""
        if len(self) == 1 or self._following is None:
            return self.first
        former = self._by_shard.get(shard)
        if former is not None and former.session.state is not ENDED:
            return former
        first = self.first.session
        driver = self._make(first.shards.endpoints[shard] or first.endpoint)
        driver.session.join(first, shard, time.monotonic())
        driver.begin()
        self._by_shard[shard] = driver
        if former is self.first:
            self.first = driver
        if former is not None:
            await former.stop()
        return driver

    async def of_stream(self, name: str) -> Driver:
        """The connection to the shard to which a stream of this name belongs."""
        return (await self.of_streams(good_names([name])))[0][0]

    async def of_streams(self, names: Sequence[str]) -> list[tuple[Driver, Indices, list[str]]]:
        """The connections to the shards of these streams, each with the indices of its streams, and their names."""
        by_shard: dict[int, list[int]] = {}
        for index, name in enumerate(names):
            by_shard.setdefault(shard_of(name, len(self)), []).append(index)
        return [
            (await self.of_shard(shard), np.array(where), [names[index] for index in where])
            for shard, where in sorted(by_shard.items())
        ]

    async def all(self) -> list[Driver]:
        """The connections to all shards, in order."""
        return [await self.of_shard(shard) for shard in range(len(self))]

    async def _ask(self, driver: Driver) -> None:
        """Ask for the table of shards, and leave each server that the table replaces."""
        table = await driver.wait(driver.session.where())
        self.first.session.shards.take(table, driver.session.endpoint)
        for each in self._by_shard.values():
            each.session.follow_shards(time.monotonic())
            each.wake()

    async def _follow(self) -> None:
        asked_at = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            now, drivers = time.monotonic(), self._by_shard.values()
            in_trouble = [driver for driver in drivers if driver.session.is_in_trouble(now)]
            well = [driver for driver in drivers if driver.session.state is OPEN and driver not in in_trouble]
            if in_trouble or now >= asked_at + _REFRESH_S:
                with suppress(InstepError, TimeoutError):
                    async with asyncio.timeout(_ANSWER_S):
                        await (self._ask(choice(well)) if well else self._scout())
                        asked_at = now

    async def _scout(self) -> None:
        """Ask a server to which no connection leads, perhaps, where the shards are."""
        known = self._endpoints.union(self.first.session.shards.endpoints) - {""}
        scout = self._make(choice(sorted(known)), reconnect_s=0.0, timeout_s=_ANSWER_S)
        try:
            await scout.start(wait=False)
            await self._ask(scout)
        finally:
            await scout.stop()
