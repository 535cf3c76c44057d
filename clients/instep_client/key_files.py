"""Key files, in the format of `zmq.auth`: NAME.key holds a public key, NAME.key_secret the pair."""

from __future__ import annotations

import os
import re
import stat
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from instep_client.daemon_thread import begin_in_thread
from instep_client.protocol.errors import InvalidInput

MAX_FILE_BYTES: Final = 2**20
_READ_WITHIN_S: Final = 2.0
"""A network file system that hangs would otherwise hold the caller forever."""
_KEY: Final = re.compile(r'[ \t]*(public|secret)-key[ \t]*=[ \t]*["\']?([^"\'\s]+)["\']?[ \t]*\r?')
_Z85: Final = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")


def is_key(text: str) -> bool:
    """Whether a text could be a public or a secret key: 40 characters of Z85."""
    return _Z85.fullmatch(text) is not None


def read_public_key(path: Path) -> str:
    """Read a public key from NAME.key.

    Raises:
        InvalidInput: the file cannot be read, holds no public key, or holds a secret one.
    """
    keys, _ = _read_keys(path)
    if "secret" in keys:
        raise InvalidInput(f"{path} holds a secret key, and a public one belongs here: give NAME.key next to it")
    return keys["public"]


def read_key_pair(path: Path) -> tuple[str, str]:
    """Read the public and the secret key from NAME.key_secret.

    Raises:
        InvalidInput: the file cannot be read, other users can read it, or it holds no secret key.
    """
    keys, status = _read_keys(path)
    if "secret" not in keys:
        raise InvalidInput(f"{path} holds no secret key, which belongs here: give NAME.key_secret next to it")
    # Of a file that is root's, as a service manager or a container gives it, the group may be the reader's own.
    if status.st_mode & (0o037 if status.st_uid == 0 else 0o077):
        raise InvalidInput(f"other users can read {path}: chmod go-rwx {path}")
    return keys["public"], keys["secret"]


ClientKeys: TypeAlias = tuple[str, str, str]
"""The keys of a connection, in Z85: the server's public one, and the client's public and secret ones."""


def read_client_keys(key_file: str | Path | None, server_key: str | Path | None) -> ClientKeys | None:
    """Read NAME.key_secret of the client, and the server's public key, or NAME.key where there is such a file.

    None for either stands for the variable INSTEP_KEY_FILE or INSTEP_SERVER_KEY.

    Without both it returns None.

    Raises:
        InvalidInput: a file cannot be used, or one of them is missing.
    """
    key_file = os.environ.get("INSTEP_KEY_FILE") if key_file is None else key_file
    server_key = os.environ.get("INSTEP_SERVER_KEY") if server_key is None else server_key
    if not key_file and not server_key:
        return None
    if not key_file or not server_key:
        raise InvalidInput("a client with keys has its own key_file and the server_key: give both")
    is_text = is_key(str(server_key)) and not os.path.exists(server_key)
    return str(server_key) if is_text else read_public_key(Path(server_key)), *read_key_pair(Path(key_file))


def _read_keys(path: Path) -> tuple[dict[str, str], os.stat_result]:
    text, status = read_text(path)
    found = [_KEY.fullmatch(line) for line in text.split("\n")]
    keys = {match[1]: match[2] for match in found if match}
    if "public" not in keys or not all(map(is_key, keys.values())):
        raise InvalidInput(f"{path} is not a key file: make a pair of them with `instep keys new NAME`")
    return keys, status


def read_text(path: Path) -> tuple[str, os.stat_result]:
    """Read a regular file of at most 1 MiB, and its owner and mode.

    Raises:
        InvalidInput: the file is something else, or cannot be read within 2 s.
    """
    reading = begin_in_thread(partial(_read_text, path), "instep-read-file")
    try:
        return reading.result(_READ_WITHIN_S)
    except TimeoutError:
        raise InvalidInput(f"{path} could not be read within {_READ_WITHIN_S:g} s: put it on a local disk") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # the text is no UTF-8, or the path has a null byte
        raise InvalidInput(f"{str(path)!r} is not a text file") from None


def _read_text(path: Path) -> tuple[str, os.stat_result]:
    # Without O_NONBLOCK, a FIFO would wait for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(0, f"it is larger than {MAX_FILE_BYTES} bytes")
    return content.decode(), status
