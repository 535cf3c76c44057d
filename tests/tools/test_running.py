"""Commands in an event loop of their own: how they end, by themselves and by signals."""

from __future__ import annotations

import asyncio
import signal
import threading

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


def test_with_json_a_failure_is_the_result_unless_there_is_one_already() -> None:
    terminal = RememberingTerminal(as_json=True)

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        raise CommandProblem("no such file")

    assert run_command(command, terminal) == 2
    assert run_command(command, terminal) == 2
    assert terminal.json() == {"error": "no such file"}
    assert terminal.complained == 2 * "error: no such file\n"


def ends_with(outcome: Exit | BaseException) -> tuple[Exit, str]:
    terminal = RememberingTerminal()

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        await asyncio.sleep(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run_command(command, terminal), terminal.complained


def test_how_commands_end() -> None:
    assert ends_with(Exit.OK) == (0, "")
    assert ends_with(Exit.FOUND_PROBLEMS) == (1, "")
    assert ends_with(CommandProblem("no such file")) == (2, "error: no such file\n")
    assert ends_with(ConnectionFailed("nobody there")) == (2, "error: nobody there\n")
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


@SIGNALS
def test_a_signal_requests_a_stop_and_the_command_ends_in_order(number: signal.Signals, status: int) -> None:
    terminal = RememberingTerminal()
    ended: list[bool] = []

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        signal.raise_signal(number)
        await stop.wait()
        ended.append(True)
        return Exit.FOUND_PROBLEMS

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run_command(command, terminal) == status
    assert ended == [True]
    assert terminal.complained.startswith("stopping: ")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@SIGNALS
@pytest.mark.parametrize("error", [CommandProblem("no such file"), ConnectionFailed("nobody there")])
def test_a_command_that_fails_after_a_signal_was_interrupted(
    error: Exception, number: signal.Signals, status: int
) -> None:
    terminal = RememberingTerminal()

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        signal.raise_signal(number)
        await stop.wait()
        raise error

    assert run_command(command, terminal) == status
    assert terminal.complained.splitlines()[1:] == [f"error: {error}"]


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


def test_a_cancellation_that_nobody_asked_for_is_no_interrupt() -> None:
    async def command(terminal: Terminal, stop: Stop) -> Exit:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_command(command, RememberingTerminal(), drains=False)


@SIGNALS
def test_a_signal_that_is_passed_on_once_more_changes_nothing(number: signal.Signals, status: int) -> None:
    terminal = RememberingTerminal()

    async def drained(terminal: Terminal, stop: Stop) -> Exit:
        stop.connected = True
        for again in (number, number, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(again)
        await stop.wait()
        return Exit.OK

    async def before_a_connection(terminal: Terminal, stop: Stop) -> Exit:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
        raise AssertionError("not reached")

    assert run_command(drained, terminal, same_signal_s=ONLY_THE_FIRST) == status
    assert run_command(before_a_connection, terminal, same_signal_s=ONLY_THE_FIRST) == status
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
def test_a_signal_ends_a_command_at_once_that_has_no_connection_yet(number: signal.Signals, status: int) -> None:
    terminal = RememberingTerminal()
    cleaned_up: list[bool] = []

    async def command(terminal: Terminal, stop: Stop) -> Exit:
        try:
            signal.raise_signal(number)
            raise AssertionError("not reached")
        finally:
            cleaned_up.append(True)

    before = signal.getsignal(number)
    assert run_command(command, terminal) == status
    assert cleaned_up == [True]
    assert terminal.complained == ""
    assert signal.getsignal(number) is before


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


def test_a_stop_that_nobody_asked_for_from_outside_is_no_interrupt() -> None:
    async def command(terminal: Terminal, stop: Stop) -> Exit:
        stop.request()
        return Exit.OK

    assert run_command(command, RememberingTerminal()) == 0


def test_commands_run_in_any_thread() -> None:
    endings: list[Exit] = []
    thread = threading.Thread(target=lambda: endings.append(ends_with(Exit.OK)[0]))
    thread.start()
    thread.join()
    assert endings == [Exit.OK]
