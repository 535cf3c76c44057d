"""Coroutines beside the loop, and what they wait for."""

from __future__ import annotations

import asyncio

from instep.streaming.tasks import Tasks, Waiters


async def test_coroutines_begin_in_order_and_are_counted_until_they_end() -> None:
    begun, may_end, tasks = list[int](), asyncio.Event(), Tasks(lambda error: None)

    async def work(number: int) -> None:
        begun.append(number)
        await may_end.wait()

    for number in range(3):
        tasks.start(work(number))
    assert (begun, len(tasks), tasks.are_beginning) == ([], 3, True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (begun, len(tasks), tasks.are_beginning) == ([0, 1, 2], 3, False)
    may_end.set()
    while len(tasks):
        await asyncio.sleep(0)


async def test_an_exception_is_told_and_a_cancellation_is_none() -> None:
    told = list[BaseException]()
    tasks = Tasks(told.append)

    async def fails() -> None:
        raise ZeroDivisionError

    ended = list[str]()
    tasks.start(fails(), lambda: ended.append("failed"))
    tasks.start(asyncio.sleep(3600), lambda: ended.append("began"))
    await asyncio.sleep(0)
    tasks.start(asyncio.sleep(3600), lambda: ended.append("never began"))
    tasks.cancel()
    while len(tasks) or len(ended) < 3:
        await asyncio.sleep(0)
    assert sorted(ended) == ["began", "failed", "never began"]
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_a_waiter_proceeds_at_the_first_check_after_its_predicate_holds() -> None:
    waiters, value, done = Waiters(), 0, list[int]()

    async def wait_for(least: int) -> None:
        await waiters.until(lambda: value >= least)
        done.append(least)

    waiting = [asyncio.ensure_future(wait_for(least)) for least in (0, 2, 1, 9)]
    await asyncio.sleep(0)
    assert (done, len(waiters)) == ([0], 3)
    value = 2
    await asyncio.sleep(0)
    assert done == [0], "nothing was checked"
    waiters.check()
    await asyncio.sleep(0)
    assert (done, len(waiters)) == ([0, 2, 1], 1)
    waiting[-1].cancel()
    await asyncio.sleep(0)
    waiters.check()
    assert len(waiters) == 0
