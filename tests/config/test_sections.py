"""What the sections accept: endpoints, for clients and for the admin server, and values that contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from instep.config import Config, HttpConfig, TransportConfig
from instep.config.endpoint import is_loopback


@pytest.mark.parametrize("endpoint", ["127.0.0.1:0", "localhost:5780", "[::1]:65535", "127.9.9.9:1"])
def test_the_admin_server_may_listen_at_any_port_of_this_machine(endpoint: str) -> None:
    assert HttpConfig(endpoint=endpoint).endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["0.0.0.0:1", "[::]:1", "gpu-7:1", "10.0.0.1:1"])
def test_the_admin_server_listens_for_others_with_a_token_only(endpoint: str) -> None:
    with pytest.raises(ValidationError, match=r"http\.token_file"):
        HttpConfig(endpoint=endpoint)
    assert HttpConfig(endpoint=endpoint, token_file=Path("token")).endpoint == endpoint


@pytest.mark.parametrize("off", ["off", False, None])
def test_the_admin_server_can_be_off(off: Any) -> None:
    assert HttpConfig(endpoint=off).endpoint is None


@pytest.mark.parametrize("wrong", ["5780", "127.0.0.1:*", "127.0.0.1:65536", "::1:1", "a..b:1", "127.0.0.1:٥٧٨٠"])
def test_the_admin_server_has_endpoints_of_its_own(wrong: str) -> None:
    with pytest.raises(ValidationError):
        HttpConfig(endpoint=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *("127.0.0.1:5757", "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "tcp://a..b:1", "udp://127.0.0.1:1"),
        *("ipc://", "ipc://" + "x" * 108),
    ],
)
def test_an_endpoint_that_no_socket_can_be_bound_to_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError):
        TransportConfig(endpoint=wrong)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_port_0_is_any_free_port_as_the_asterisk_is(host: str) -> None:
    for port in ("0", "00000", "*"):
        assert TransportConfig(endpoint=f"tcp://{host}:{port}").endpoint == f"tcp://{host}:*"


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5757", True),
        ("tcp://[::1]:1", True),
        ("ipc:///run/instep.sock", True),
        ("tcp://*:1", False),
        ("tcp://localhost.example.org:1", False),
        ("tcp://[::]:1", False),
    ],
)
def test_other_machines_reach_an_endpoint_only_where_that_is_allowed(endpoint: str, expected: bool) -> None:
    assert TransportConfig(endpoint=endpoint, allow_plaintext=True).endpoint == endpoint
    assert is_loopback(endpoint) is expected
    if not expected:
        with pytest.raises(ValidationError, match="without keys"):
            TransportConfig(endpoint=endpoint)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"recording": {"keep_bytes": 1000}}, "recording.keep_bytes"),
        ({"recording": {"keep_s": 9.0}}, "recording.keep_s"),
        ({"recording": {"durability": "fsync"}}, "recording.durability"),
        ({"limits": {"credit_frames": 131_073}}, "limits.credit_frames"),
        ({"limits": {"max_block_frames": 16_385}}, "limits.max_block_frames"),
    ],
)
def test_contradictions_are_refused(document: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        Config.model_validate(document)


def test_other_machines_reach_an_endpoint_with_keys_and_both_files_are_needed() -> None:
    files: dict[str, Any] = {"key_file": Path("server.key_secret"), "peers_file": Path("peers.yaml")}
    assert TransportConfig(endpoint="tcp://0.0.0.0:5757", **files).key_file == files["key_file"]
    for name, file in files.items():
        with pytest.raises(ValueError, match="key_file"):
            TransportConfig(**{name: file})
