"""Quotas as arithmetic, over a clock of the test."""

from __future__ import annotations

from instep.security.principals import LOCAL, Principal, Quotas, Role
from instep.security.quotas import Usage, Usages

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
S = 1_000_000_000


def usage(**quotas: float) -> Usage:
    return Usages().of(Principal(name="ann", key=KEY, role=Role.PRODUCER, quotas=Quotas.model_validate(quotas)))


def test_over_any_time_no_more_frames_than_the_rate_and_one_second_and_one_block_more() -> None:
    limited, taken, now_ns = usage(frames_per_s=100.0), 0, 5 * S
    while now_ns < 25 * S:
        wait_ns = limited.wait_ns(64, now_ns)
        taken += 0 if wait_ns else 64
        now_ns += wait_ns or S // 100
    assert 20 * 100 <= taken <= 21 * 100 + 64
    assert limited.frames_total == taken


def test_a_block_larger_than_a_second_is_taken_and_the_next_one_waits_for_it() -> None:
    limited = usage(frames_per_s=10.0)
    assert limited.wait_ns(50, S) == 0
    assert 4 * S <= limited.wait_ns(1, S) <= 4 * S + 2
    assert limited.wait_ns(1, 5 * S + 2) == 0


def test_without_quotas_everything_is_counted_and_nothing_refused() -> None:
    free = usage()
    assert free.wait_ns(10**9, 0) == free.wait_ns(10**9, 0) == 0
    free.kept_bytes, free.connections = 2**40, 10**6
    assert not free.is_full
    assert free.may_connect()


def test_what_is_unread_and_connections_are_bounded() -> None:
    limited = usage(unread_bytes=1000, connections=2)
    limited.kept_bytes, limited.connections = 1000, 1
    assert not limited.is_full
    assert limited.may_connect()
    limited.kept_bytes, limited.connections = 1001, 2
    assert limited.is_full
    assert not limited.may_connect()


def test_a_reload_changes_the_quotas_of_those_who_are_connected() -> None:
    usages = Usages()
    before = Principal(name="local", key=KEY, role=Role.PRODUCER)
    connected = usages.of(before)
    usages.reloaded([before.model_copy(update={"quotas": Quotas(connections=1)})])
    assert usages.of(before) is connected
    assert connected.principal.quotas.connections == 1
    assert usages.of(LOCAL) is not connected
    assert [each.principal.name for each in usages] == ["local"]
    connected.connections = 1
    usages.reloaded([])
    assert usages.of(before) is connected
    connected.connections = 0
    usages.reloaded([])
    assert list(usages) == []
