"""Commands in an event loop of their own: how they end, by themselves and by signals."""

from __future__ import annotations

import asyncio
import signal

import pytest

from instep_client.protocol.errors import ConnectionFailed
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from instep_tools.running import run_command
from instep_tools.terminal import Terminal
from tests.tools.helpers import RememberingTerminal

ALL_COUNT = 0.0
"""A signal is another one, however soon it comes."""
ONLY_THE_FIRST = 1e9
"""All others that come are the same one."""
SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def ends_with(outcome: Exit | BaseException, as_json: bool = False) -> tuple[Exit, str]:
    terminal = RememberingTerminal(as_json)

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run_command(command, terminal), terminal.data if as_json else terminal.complained


def test_how_commands_end() -> None:
    assert ends_with(Exit.FOUND_PROBLEMS) == (1, "")
    assert ends_with(CommandProblem("no such file")) == (2, "error: no such file\n")
    assert ends_with(ConnectionFailed("nobody there"), as_json=True) == (2, '{"error": "nobody there"}\n')
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


@SIGNALS
@pytest.mark.parametrize("error", [None, ConnectionFailed("nobody there")])
def test_a_signal_requests_a_stop_and_the_command_ends_in_order(
    number: signal.Signals, status: int, error: Exception | None
) -> None:
    terminal = RememberingTerminal()
    ended: list[bool] = []

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        signal.raise_signal(number)
        await stop.wait()
        ended.append(True)
        if error is not None:
            raise error
        return Exit.FOUND_PROBLEMS

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run_command(command, terminal) == status
    assert ended == [True]
    assert len(terminal.complained.splitlines()) == (1 if error is None else 2)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@SIGNALS
def test_a_signal_cancels_a_command_that_has_nothing_to_drain(number: signal.Signals, status: int) -> None:
    terminal = RememberingTerminal()
    cleaned_up: list[bool] = []

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        signal.raise_signal(number)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # it may still close what it opened
            cleaned_up.append(True)
        return Exit.OK

    assert run_command(command, terminal, drains=False) == status
    assert cleaned_up == [True]
    assert terminal.complained == ""


@SIGNALS
def test_a_signal_that_is_passed_on_once_more_changes_nothing(number: signal.Signals, status: int) -> None:
    terminal = RememberingTerminal()

    async def drained(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        for again in (number, number, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(again)
        await stop.wait()
        return Exit.OK

    assert run_command(drained, terminal, same_signal_s=ONLY_THE_FIRST) == status
    assert terminal.complained.count("\n") == 1


@SIGNALS
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, status: int, second: signal.Signals) -> None:
    async def command(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        signal.raise_signal(number)
        await stop.wait()
        signal.raise_signal(second)
        raise AssertionError("not reached")

    terminal = RememberingTerminal()
    assert run_command(command, terminal, same_signal_s=ALL_COUNT) == 128 + second
    assert len(terminal.complained.splitlines()) == 2


@SIGNALS
@pytest.mark.parametrize("place", ["callback", "task"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_while_an_exception_would_be_lost_ends_it_too(
    number: signal.Signals, status: int, place: str
) -> None:
    terminal = RememberingTerminal()

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(number)

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        if place == "callback":
            asyncio.get_running_loop().call_soon(Last)
        else:
            Last()
        await asyncio.sleep(60)
        raise AssertionError("not reached")

    assert run_command(command, terminal) == status
    assert terminal.complained == ""
