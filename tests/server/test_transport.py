from pathlib import Path

import pytest
import zmq
from instep.server.transport import Router, Sent

from instep.config import TransportConfig
from instep.server.preparation import CannotServe
from instep_client import AsyncClient
from tests.support.models import SMALL
from tests.support.running import running


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://localhost:*", "tcp://[::1]:*"])
async def test_any_loopback_endpoint_can_be_bound_and_is_told_as_written(endpoint: str) -> None:
    try:
        router = Router(TransportConfig(endpoint=endpoint))
    except zmq.ZMQError:
        if "[" in endpoint:
            pytest.skip("no IPv6 on this machine")
        raise
    host = "127.0.0.1" if "localhost" in endpoint else endpoint[6:-2]
    assert router.endpoint.startswith(f"tcp://{host}:")
    router.close()


async def test_a_path_that_somebody_listens_at_is_not_taken_away(tmp_path: Path) -> None:
    config = TransportConfig(endpoint=f"ipc://{tmp_path / 'socket'}")
    router = Router(config)
    with pytest.raises(zmq.ZMQError) as refused:
        Router(config)
    assert refused.value.errno == zmq.EADDRINUSE
    router.close()
    assert (tmp_path / "socket").is_socket(), "what is left of one that is gone is in nobody's way"
    Router(config).close()


async def test_a_peer_that_is_not_there_is_gone() -> None:
    router = Router(TransportConfig(endpoint="tcp://127.0.0.1:*"))
    assert router.send(b"\0nobody", [b"x"]) is Sent.GONE
    assert list(router.receive(5)) == []
    router.close()


async def test_a_client_reaches_a_server_on_ipv6() -> None:
    try:
        async with running(SMALL, transport={"endpoint": "tcp://[::1]:*"}) as server:
            async with AsyncClient(server.endpoint) as client:
                assert client.info.features == 5
    except CannotServe:
        pytest.skip("no IPv6 on this machine")
