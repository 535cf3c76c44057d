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


BOTH = "tcp://127.0.0.1:5757 or ipc:///path"
PORT = "the port that the server has, 1 to 65535; a server with port 0 logs the port that it took"


@pytest.mark.parametrize(
    ("bad", "instead"),
    [
        ("127.0.0.1:5757", "tcp://127.0.0.1:5757"),
        ("http://", BOTH),
        ("tcp://host:*", PORT),
        ("tcp://host:٥٧٥٧", BOTH),
        ("tcp://host:5757\n", BOTH),
        ("nonsense", BOTH),
    ],
)
@pytest.mark.parametrize("kind", [AsyncClient, Client])
def test_what_is_no_endpoint_is_refused_with_the_form_of_one(kind: Any, bad: Any, instead: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        kind(bad)
    assert str(refused.value) == f"{bad!r} is not an endpoint: write {instead}"
