"""Quotas as arithmetic, over a clock of the test."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from instep.security.principals import LOCAL, Principal, Quotas, Role
from instep.security.quotas import Usage, Usages
from instep.streaming.api import Refusal
from instep_client.protocol.codes import Code

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
S = 1_000_000_000


def nobody(connection: object) -> None:
    raise AssertionError("it is asked")


def everybody(name: str) -> bool:
    return True


def usage(**quotas: float) -> Usage:
    of = Quotas.model_validate(quotas)
    return Usages(lambda: Counter({1: 3})).of(Principal(name="ann", key=KEY, role=Role.PRODUCER, quotas=of))


def wait_us(limited: Usage, frames: int, now_ns: int) -> int:
    """After which time the frames may be sent; 0 where they were taken."""
    try:
        limited.check_frames(frames, now_ns)
    except Refusal as refusal:
        return refusal.retry_after_us
    return 0


def test_over_any_time_no_more_frames_than_the_rate_and_one_second_and_one_block_more() -> None:
    limited, taken, now_ns = usage(frames_per_s=100.0), 0, 5 * S
    while now_ns < 25 * S:
        wait = wait_us(limited, 64, now_ns)
        taken += 0 if wait else 64
        now_ns += wait * 1000 or S // 100
    assert 20 * 100 <= taken <= 21 * 100 + 64
    assert limited.frames_total == taken


def test_a_block_larger_than_a_second_is_taken_and_the_next_one_waits_for_it() -> None:
    limited = usage(frames_per_s=10.0)
    assert wait_us(limited, 50, S) == 0
    wait = wait_us(limited, 1, S)
    assert 4_000_000 <= wait <= 4_000_002
    assert wait_us(limited, 1, S + 1000 * wait) == 0
    assert limited.refused_total == 1


def test_without_quotas_everything_is_counted_and_nothing_refused() -> None:
    free = usage()
    assert wait_us(free, 10**9, 0) == wait_us(free, 10**9, 0) == 0
    free.kept_bytes, free.connections = 2**40, set(range(1000))
    free.check_unread(nobody)
    free.check_connections()
    free.check_streams(10**6)
    assert free.frames_total == 2 * 10**9
    assert free.refused_total == 0


def test_what_is_unread_connections_and_streams_are_bounded() -> None:
    limited = usage(unread_bytes=1000, connections=2, streams=5)
    limited.kept_bytes, limited.connections = 1000, {"one"}
    limited.check_unread(nobody)
    limited.check_connections()
    limited.check_streams(2)  # it has three
    limited.kept_bytes, limited.connections = 1001, {"one", "two"}
    codes, asked = [], list[str]()
    unread, streams = partial(limited.check_unread, asked.append), partial(limited.check_streams, 3)
    for check in (unread, limited.check_connections, streams):
        with pytest.raises(Refusal) as caught:
            check()
        assert caught.value.retry_after_us > 0
        codes.append(caught.value.code)
    assert sorted(asked) == ["one", "two"]
    assert codes == [Code.BUSY, Code.BUSY, Code.TOO_MANY_STREAMS]
    assert tuple(limited.numbers(3).values()) == (0, 3, 1001, 2, 3)


def test_a_reload_changes_the_quotas_of_those_who_are_connected() -> None:
    usages = Usages(Counter)
    before = Principal(name="local", key=KEY, role=Role.PRODUCER)
    connected = usages.of(before)
    usages.reloaded([before.model_copy(update={"quotas": Quotas(connections=1)})])
    assert usages.of(before) is connected
    assert connected.principal.quotas.connections == 1
    assert usages.of(LOCAL) is not connected
    assert list(usages.numbers(everybody)) == ["local"]
    connected.connections = {"one"}
    usages.reloaded([])
    assert usages.of(before) is connected
    connected.connections = set()
    usages.reloaded([])
    assert usages.numbers(everybody) == {}
