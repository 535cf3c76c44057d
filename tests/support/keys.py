"""Keys of a server and of its clients, and the file that says who these are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
import zmq
from zmq.auth import create_certificates, load_certificate


class Curve(NamedTuple):
    """What a client needs to connect."""

    server: bytes
    public: bytes
    secret: bytes

    def apply(self, socket: zmq.Socket[Any]) -> None:
        """Before it connects."""
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = self


class KeyRing:
    """Files in a folder. Everybody is a producer unless `peers` says something else of that name."""

    def __init__(self, folder: Path, **peers: dict[str, Any]) -> None:
        self.folder = folder
        self.peers_file = folder / "peers.yaml"
        self.make("server")
        self.write(**peers)

    @property
    def transport(self) -> dict[str, Any]:
        """The section of a server's configuration."""
        return {"key_file": self.folder / "server.key_secret", "peers_file": self.peers_file}

    @property
    def arguments(self) -> list[str]:
        """The same for `instep serve`."""
        return [word for key, file in self.transport.items() for word in ("--set", f"transport.{key}={file}")]

    def of_client(self, name: str, server: str = "server") -> dict[str, Any]:
        """The arguments of the library's client of that name, whether the server knows it or not."""
        self.make(name)
        self.make(server)
        return {"key_file": self.folder / f"{name}.key_secret", "server_key": self.folder / f"{server}.key"}

    def make(self, name: str) -> tuple[str, str]:
        """The keys of that name, made once."""
        file = self.folder / f"{name}.key_secret"
        if not file.exists():
            create_certificates(self.folder, name)
            file.chmod(0o600)
        public, secret = load_certificate(file)
        assert secret is not None
        return public.decode(), secret.decode()

    def write(self, **peers: dict[str, Any]) -> None:
        """Write the file of peers anew, with only these."""
        entries = {name: {"key": self.make(name)[0], "role": "producer", **peer} for name, peer in peers.items()}
        self.peers_file.write_text(yaml.safe_dump(entries))
        self.peers_file.chmod(0o644)

    def curve(self, name: str, server: str = "server") -> Curve:
        """What the client of that name needs, whether the server knows it or not."""
        public, secret = self.make(name)
        return Curve(self.make(server)[0].encode(), public.encode(), secret.encode())
