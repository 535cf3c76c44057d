"""What a client may be told to connect to, and what it says of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from instep_client import AsyncClient, Client, InvalidInput


@pytest.mark.parametrize(
    "good",
    ["tcp://127.0.0.1:5757", "tcp://host:1", "tcp://host:65535", "tcp://[::1]:5757", "ipc:///tmp/a b", "ipc://@x"],
)
def test_endpoints(good: str) -> None:
    AsyncClient(good)
    Client(good)


@pytest.mark.parametrize(
    "bad", ["127.0.0.1:5757", "http://host:5780", "tcp://host:*", "tcp://host:٥٧٥٧", "tcp://host:1\n"]
)
@pytest.mark.parametrize("kind", [AsyncClient, Client])
def test_what_is_no_endpoint_is_refused_by_name(kind: Any, bad: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        kind(bad)
    assert repr(bad) in str(refused.value)
