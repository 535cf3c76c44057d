from __future__ import annotations

import resource

import pytest

from instep.server.open_files import allow_open_files


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "allowed"),
    [
        (1024, 4096, 1000, 1024),
        (1024, 4096, 2000, 2000),
        (1024, 4096, 9000, 4096),
        (1024, resource.RLIM_INFINITY, 9000, 9000),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_needed_and_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, allowed: int
) -> None:
    kept = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: kept[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: kept.append(limits))
    assert allow_open_files(wanted) == allowed
    assert kept[-1] == (max(soft, allowed), hard)


def test_no_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.delattr(resource, "setrlimit")
    assert allow_open_files(5000) >= 5000
