"""What the sections accept: endpoints, for clients and for the admin server; and that nothing changes afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from instep.config import Config, EngineConfig, TransportConfig, load_config
from instep.config.endpoint import is_loopback
from tests.support.configurations import problems, written


class TestTheAdminServer:
    @pytest.mark.parametrize("endpoint", ["127.0.0.1:0", "localhost:5780", "[::1]:65535", "127.9.9.9:1"])
    def test_may_listen_at_any_port_of_this_machine(self, endpoint: str) -> None:
        assert load_config(overrides={"http.endpoint": endpoint}).http.endpoint == endpoint

    def test_may_listen_for_others_with_a_token(self, tmp_path: Path) -> None:
        for endpoint in ("0.0.0.0:1", "[::]:1", "gpu-7:1", "10.0.0.1:1"):
            (problem,) = problems(overrides={"http.endpoint": endpoint})
            assert problem.path == "http.endpoint"
            assert "http.token_file" in problem.suggestion
            config = load_config(overrides={"http.endpoint": endpoint, "http.token_file": str(tmp_path / "token")})
            assert config.http.endpoint == endpoint

    @pytest.mark.parametrize("text", ["off", "'off'", "null", "~", "no"])
    def test_can_be_off(self, tmp_path: Path, text: str) -> None:
        assert load_config(written(tmp_path, f"http: {{endpoint: {text}}}")).http.endpoint is None
        assert load_config(overrides={"http.endpoint": "off"}).http.endpoint is None
        assert load_config(None, None, {"INSTEP_HTTP__ENDPOINT": "off"}).http.endpoint is None

    @pytest.mark.parametrize(
        "wrong",
        [
            *("5780", ":1", "127.0.0.1", "127.0.0.1:*", "127.0.0.1:65536", "http://a:1", "::1:1", "a..b:1"),
            f"{64 * 'a'}:1",
            "127.0.0.1:٥٧٨٠",
        ],
    )
    def test_has_endpoints_of_its_own(self, wrong: str) -> None:
        (problem,) = problems(overrides={"http.endpoint": wrong})
        assert f"{wrong!r} is not an endpoint: write 127.0.0.1:5780" in problem.message


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().engine.max_batch_size = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        EngineConfig.model_validate({"thread": 2})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_port_0_is_any_free_port_as_the_asterisk_is(host: str) -> None:
    for port in ("0", "00000", "*"):
        assert TransportConfig(endpoint=f"tcp://{host}:{port}").endpoint == f"tcp://{host}:*"
    with pytest.raises(ValidationError, match="or 0 for any"):
        TransportConfig(endpoint=f"tcp://{host}:65536")


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5757", True),
        ("tcp://127.0.0.1:*", True),
        ("tcp://127.255.3.4:1", True),
        ("tcp://localhost:1", True),
        ("tcp://LOCALHOST:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///run/instep.sock", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://128.0.0.1:1", False),
        ("tcp://localhost.example.org:1", False),
        ("tcp://127.0.0.1.example.org:1", False),
        ("tcp://[::]:1", False),
        ("tcp://[fe80::1]:1", False),
        ("tcp://lo:1", False),
    ],
)
def test_loopback(endpoint: str, expected: bool) -> None:
    assert TransportConfig(endpoint=endpoint).endpoint == endpoint
    assert is_loopback(endpoint) is expected
