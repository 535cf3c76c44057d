"""The connections of one client: the first one, and those to other shards of its server's cluster.

Most clients have one. The first welcome says whether the server is a shard of a cluster; then the connections to other
shards are made when they are first needed, and `Links` asks where the shards are: four times a second while one of them
is in trouble, and once a minute otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from random import choice
from typing import Any, Final, NamedTuple

import numpy as np

from instep_client.arguments import Indices, good_names
from instep_client.connection import ENDED, OPEN, Call
from instep_client.driver import Driver
from instep_client.key_files import ClientKeys
from instep_client.protocol.errors import ConnectionRefused, InstepError
from instep_client.protocol.wire import shard_of
from instep_client.session import Session

_LOOK_S: Final = 0.25
"""The time between two questions where the shards are, and before the next of several given endpoints is tried."""
_ANSWER_S: Final = 1.0
"""The longest wait for an answer to that question."""
_REFRESH_S: Final = 60.0
"""A client whose connections are all well asks for the table this often, so that its table does not grow old."""


class Link(NamedTuple):
    """One connection."""

    session: Session
    driver: Driver


async def all_of(asked: Sequence[tuple[Link, Call[Any]]]) -> None:
    """Wait until all these calls have ended. If the waiting task is cancelled, all are."""
    try:
        for link, _ in asked:
            link.driver.wake()
        for link, call in asked:
            await link.driver.until_woken(call)
    except BaseException:
        for link, call in asked:
            link.session.cancel(call)
            link.driver.wake()
        raise


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
        self._endpoints = [link.session.endpoint for link in self._given]
        self.first = self._given[0]
        """The connection to the server that answered first."""
        self._by_shard: dict[int, Link] = {}
        self._following: asyncio.Task[None] | None = None
        self._is_closed = False

    def _make(self, endpoint: str, **other: Any) -> Link:
        session = Session(endpoint, **(self._settings | other))
        return Link(session, Driver(session, self._keys))

    def __len__(self) -> int:
        """The number of shards, 1 for a server on its own and before the first welcome."""
        return len(self.first.session.shards)

    @property
    def are_open(self) -> bool:
        """Whether every connection is open."""
        return all(link.session.state is OPEN for link in self._by_shard.values() or [self.first])

    async def connect(self, wait: bool) -> None:
        """Connect, and learn where the other shards are; see `Driver.start`.

        Of several endpoints the first that answers is used. If none does, this raises the error of the first one.
        """
        await self._reach(wait)
        self._by_shard[self.first.session.shard] = self.first
        info = self.first.session.info
        self._settings["model"] = info.model  # another server may have another default
        if info.shards > 1 or info.term:  # others may have other streams, or take this one's place
            try:
                await self._ask(self.first)
            except BaseException:
                await self.close()
                raise
            self._following = asyncio.create_task(self._follow())

    async def _reach(self, wait: bool) -> None:
        async def start(link: Link, delay_s: float) -> Link:
            await asyncio.sleep(delay_s)
            await link.driver.start(wait)
            return link

        starts = [asyncio.create_task(start(link, turn * _LOOK_S)) for turn, link in enumerate(self._given)]
        try:
            for answer in asyncio.as_completed(starts):
                with suppress(InstepError):
                    self.first = await answer
                    return
            failures = sorted(
                (task.exception() for task in starts), key=lambda each: isinstance(each, ConnectionRefused)
            )
            assert failures[0] is not None
            raise failures[0]  # one that says more than that nothing listens, if there is one
        finally:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self._stop(link for link in self._given if link is not self.first)

    async def close(self, park: bool = False) -> None:
        """Close every connection and its streams; see `Driver.stop`."""
        self._is_closed = True
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await self._stop({self.first, *self._by_shard.values()}, park)

    @staticmethod
    async def _stop(links: Iterable[Link], park: bool = False) -> None:
        await asyncio.gather(*(link.driver.stop(park) for link in links))

    # ── Shards ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def of_shard(self, shard: int) -> Link:
        """The connection to a shard. Calls wait while it is not open yet; one that was given up is made anew."""
        if len(self) == 1 or self._is_closed:
            return self.first
        former = self._by_shard.get(shard)
        if former is not None and former.session.state is not ENDED:
            return former
        first = self.first.session
        link = self._make(first.shards.endpoints[shard] or first.endpoint)
        link.session.join(first, shard, time.monotonic())
        link.driver.begin()
        self._by_shard[shard] = link
        if former is self.first:
            self.first = link
        if former is not None:
            await former.driver.stop()
        return link

    async def of_stream(self, name: str) -> Link:
        """The connection to the shard to which a stream of this name belongs."""
        return (await self.of_streams(good_names([name])))[0][0]

    async def of_streams(self, names: Sequence[str]) -> list[tuple[Link, Indices, list[str]]]:
        """The connections to the shards of these streams, each with the indices of its streams, and their names."""
        by_shard: dict[int, list[int]] = {}
        for index, name in enumerate(names):
            by_shard.setdefault(shard_of(name, len(self)), []).append(index)
        return [
            (await self.of_shard(shard), np.array(where), [names[index] for index in where])
            for shard, where in sorted(by_shard.items())
        ]

    async def all(self) -> list[Link]:
        """The connections to all shards, in order."""
        return [await self.of_shard(shard) for shard in range(len(self))]

    async def _ask(self, link: Link) -> None:
        """Ask for the table of shards, and leave each server that the table replaces."""
        table = await link.driver.wait(link.session.where())
        self.first.session.shards.take(table, link.session.endpoint)
        for session, driver in self._by_shard.values():
            session.follow_shards(time.monotonic())
            driver.wake()

    async def _follow(self) -> None:
        asked_at = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            now, links = time.monotonic(), self._by_shard.values()
            in_trouble = [link for link in links if link.session.is_in_trouble(now)]
            well = [link for link in links if link.session.state is OPEN and link not in in_trouble]
            if in_trouble or now >= asked_at + _REFRESH_S:
                with suppress(InstepError, TimeoutError):
                    async with asyncio.timeout(_ANSWER_S):
                        await (self._ask(choice(well)) if well else self._scout())
                        asked_at = now

    async def _scout(self) -> None:
        """Ask a server to which no connection leads, perhaps, where the shards are."""
        known = {*self.first.session.shards.endpoints, *self._endpoints} - {""}
        scout = self._make(choice(sorted(known)), reconnect_s=0.0, timeout_s=_ANSWER_S)
        try:
            await scout.driver.start(wait=False)
            await self._ask(scout)
        finally:
            await scout.driver.stop()
