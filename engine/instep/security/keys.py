"""Pairs of keys: made as files by `instep keys`, and read by a server that starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import zmq

from instep.config import TransportConfig
from instep.security.principals import DEFAULT, NAME, Principals
from instep_client.key_files import read_key_pair
from instep_client.protocol.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A server's secret key, and who may connect."""

    secret: str = field(repr=False)
    principals: Principals

    @classmethod
    def read(cls, config: TransportConfig) -> Self | None:
        """Read both files of a configuration; None if it names none.

        Raises:
            InvalidInput: with a line for each problem of one of them.
        """
        if config.key_file is None or config.peers_file is None:
            return None
        return cls(read_key_pair(config.key_file)[1], Principals.read(config.peers_file))


def make_key_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.key, which anybody may read, and NAME.key_secret into a folder that only its owner may enter.

    Raises:
        InvalidInput: when the name is not one, a file of the name exists, or it cannot be written.
    """
    if not NAME.fullmatch(name) or name == DEFAULT:
        use = f"use 1 to 64 letters, digits, dots, hyphens and underscores, and not {DEFAULT!r}"
        raise InvalidInput(f"{name!r:.80} is not a name: {use}")
    public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
    public = f'metadata\n    name = "{name}"\ncurve\n    public-key = "{public_key}"\n'
    files = folder / f"{name}.key", folder / f"{name}.key_secret"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in files:
            if os.path.lexists(file):
                raise InvalidInput(f"{file} exists, and a key is never overwritten")
        secret = f'# Whoever has this file is {name}: keep it secret.\n{public}    secret-key = "{secret_key}"\n'
        _write_new(files[1], secret, 0o600)
        _write_new(files[0], f"# By this key others know {name}; it is no secret.\n{public}", 0o644)
    except OSError as error:
        raise InvalidInput(f"{error.filename}: {error.strerror}") from None
    return files


def _write_new(path: Path, text: str, mode: int) -> None:
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
