from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from instep.server.signals import signals_call

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in HEARD]


async def test_each_signal_is_a_call_in_the_loop_and_the_handlers_before_come_back() -> None:
    before = handlers()
    called = asyncio.Queue[tuple[signal.Signals, float, asyncio.AbstractEventLoop]]()

    def called_by(number: signal.Signals) -> Callable[[float], None]:
        return lambda at_s: called.put_nowait((number, at_s, asyncio.get_running_loop()))

    with signals_call({number: called_by(number) for number in HEARD}):
        for number in (*HEARD, signal.SIGINT):
            sent_s = time.monotonic()
            signal.raise_signal(number)
            taken_s = time.monotonic()
            assert called.empty()
            said, at_s, loop = await called.get()
            assert (said, loop) == (number, asyncio.get_running_loop())
            assert sent_s <= at_s <= taken_s
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


async def test_they_come_back_after_a_failure_too() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), signals_call(dict.fromkeys(HEARD, lambda at_s: None)):
        raise ZeroDivisionError
    assert handlers() == before


async def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_call({signal.SIGHUP: lambda at_s: pytest.fail("it was heard")}):
            signal.raise_signal(signal.SIGHUP)
            await asyncio.sleep(0)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
