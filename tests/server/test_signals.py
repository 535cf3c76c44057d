from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from instep.interrupts import Stopped
from instep.server.signals import run_cancellable, signals_call
from tests.support.interrupting import reporting

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


@pytest.mark.parametrize("number", HEARD)
@pytest.mark.parametrize("copies", [0, 2])
def test_a_signal_cancels_a_run_which_cleans_up_whatever_copies_of_it_come(copies: int, number: signal.Signals) -> None:
    cleaned_up = []

    async def work() -> None:
        try:
            signal.raise_signal(number)
            await asyncio.Event().wait()
        except asyncio.CancelledError:  # and not what the signal raises elsewhere
            for _ in range(copies):
                signal.raise_signal(number)
                await asyncio.sleep(0)
            cleaned_up.append(True)
            raise

    with reporting(same_signal_s=1e9):
        usual = handlers()
        with pytest.raises(Stopped) as stop:
            run_cancellable(work())
        assert stop.value.number == number
        assert cleaned_up == [True]
        assert handlers() == usual
        signal.raise_signal(number)  # one more copy


def test_pythons_own_ctrl_c_cancels_a_run_too() -> None:
    async def work() -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work())


def test_a_second_signal_ends_the_cleaning_up() -> None:
    cleaned_up = []

    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned_up.append(True)

    with reporting(same_signal_s=0.0), pytest.raises(Stopped):
        run_cancellable(work())
    assert cleaned_up == []


def test_a_run_that_nobody_interrupts_gives_its_result() -> None:
    async def seven() -> int:
        return 7

    before = handlers()
    assert run_cancellable(seven()) == 7
    assert handlers() == before
