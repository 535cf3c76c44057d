"""Pairs of keys: made as files by `instep keys`, and read by a server that starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import zmq

from instep.config import TransportConfig
from instep.security.principals import DEFAULT, NAME, KeysError, Principals
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
            KeysError: with every problem.
        """
        if config.key_file is None or config.peers_file is None:
            return None
        problems: list[str] = []
        try:
            _, secret = read_key_pair(config.key_file)
        except InvalidInput as error:
            problems.append(f"transport.key_file: {error}")
        try:
            principals = Principals.read(config.peers_file)
        except KeysError as error:
            problems += error.problems
        if problems:
            raise KeysError(problems)
        return cls(secret, principals)


def check_name(name: str) -> None:
    """Check the name of a principal.

    Raises:
        KeysError: when it is not one, or is that of the entry for everybody.
    """
    if not NAME.fullmatch(name) or name == DEFAULT:
        use = f"use 1 to 64 letters, digits, dots, hyphens and underscores, and not {DEFAULT!r}"
        raise KeysError([f"{name!r:.80} is not a name: {use}"])


def make_key_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.key, which anybody may read, and NAME.key_secret into a folder that only its owner may enter.

    Raises:
        KeysError: when the name is not one, a file of the name exists, or it cannot be written.
    """
    check_name(name)
    public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
    public = f'metadata\n    name = "{name}"\ncurve\n    public-key = "{public_key}"\n'
    files = folder / f"{name}.key", folder / f"{name}.key_secret"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in files:
            if os.path.lexists(file):
                raise FileExistsError(0, "it exists; a key is never overwritten", str(file))
        secret = f'# Whoever has this file is {name}: keep it secret.\n{public}    secret-key = "{secret_key}"\n'
        _write_new(files[1], secret, 0o600)
        _write_new(files[0], f"# By this key others know {name}; it is no secret.\n{public}", 0o644)
    except OSError as error:
        raise KeysError([f"{error.filename}: {error.strerror}"]) from None
    return files


def _write_new(path: Path, text: str, mode: int) -> None:
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
