"""A stream's state in a file that any server of the same model can go on from.

The file is a safetensors file: the length of a JSON header as a little-endian 64-bit number, the header, and the data.
It holds one tensor, `state`, and says in `__metadata__` what it is of.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Final

import numpy as np

from instep_client.outbox import MAX_REPLY_BYTES
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import F32, ServerInfo

_FORMAT: Final = "instep stream snapshot 1"
_LENGTH_BYTES: Final = 8
_MOST_HEADER_BYTES: Final = 65_536
_MOST_STATE_BYTES: Final = MAX_REPLY_BYTES
"""No server could have sent a larger one."""


@dataclass(frozen=True, slots=True, eq=False)
class StreamSnapshot:
    """A stream's state before the frame `seq`."""

    name: str
    seq: int
    state: F32
    """float32 [state_layers, state_size]."""
    fingerprint: str
    """Of the model, see `ServerInfo`."""
    model: str

    def save(self, path: str | os.PathLike[str], overwrite: bool = True) -> None:
        """Write it as a safetensors file, which appears when it is complete; file and name are on the disk then.

        Raises:
            FileExistsError: when there is such a file already and it may not be written over.
            OSError: as the file system says.
        """
        state = np.ascontiguousarray(self.state, "<f4")
        header = {
            "__metadata__": {
                "format": _FORMAT,
                "name": self.name,
                "seq": str(self.seq),
                "fingerprint": self.fingerprint,
                "model": self.model,
            },
            "state": {"dtype": "F32", "shape": list(state.shape), "data_offsets": [0, state.nbytes]},
        }
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)  # the data is aligned
        target = Path(path)
        part = target.with_name(f".{target.name}.{token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text + state.tobytes())
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                part.replace(target)
            else:
                _rename_to_new(part, target)
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(target.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamSnapshot:
        """Read one from a file.

        Raises:
            InvalidInput: when the file is none.
            OSError: as the file system says.
        """
        try:
            with Path(path).open("rb") as file:
                return cls._read(file)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidInput(f"{path} is no snapshot of a stream: {error}") from None

    @classmethod
    def _read(cls, file: BinaryIO) -> StreamSnapshot:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError("it does not begin as a safetensors file of one does")
        text = file.read(length)
        if len(text) < length:
            raise ValueError("it does not begin as a safetensors file of one does")
        header: dict[str, Any] = json.loads(text)
        about, tensor = header["__metadata__"], header["state"]
        if about["format"] != _FORMAT or len(header) != 2:
            raise ValueError("it is a safetensors file of something else")
        layers, size = (int(length) for length in tensor["shape"])
        if not (layers >= 0 and size >= 0 and layers * size * 4 <= _MOST_STATE_BYTES):
            raise ValueError("its state has no shape of a state")
        data = file.read(layers * size * 4 + 1)  # one byte more than there should be
        if tensor["dtype"] != "F32" or tensor["data_offsets"] != [0, len(data)] or len(data) != layers * size * 4:
            raise ValueError("its state is cut off, or no float32")
        state = np.frombuffer(data, "<f4").reshape(layers, size).astype(np.float32)
        seq = int(about["seq"])
        if not 0 <= seq < 2**62:
            raise ValueError("its seq is out of range")
        return cls(str(about["name"]), seq, state, str(about["fingerprint"]), str(about["model"]))

    def check(self, info: ServerInfo) -> None:
        """Whether a server can go on from it.

        Raises:
            InvalidInput: when it serves another model, or no stream can have this state.
        """
        if self.fingerprint != info.fingerprint:
            raise InvalidInput(
                f"the snapshot is of model {self.model!r} (fingerprint {self.fingerprint[:12]}), the server runs "
                f"{info.model!r} ({info.fingerprint[:12]}); a state goes on only with the weights that made it"
            )
        if self.state.shape != (info.state_layers, info.state_size):
            raise InvalidInput(
                f"the snapshot's state has shape {list(self.state.shape)}, and those of model {info.model!r} have "
                f"{[info.state_layers, info.state_size]}: it was changed since it was taken"
            )
        if not np.isfinite(self.state).all():
            raise InvalidInput(
                f"the snapshot's state, before frame {self.seq} of stream {self.name!r}, holds NaN or infinity, which "
                "no server takes: go on from an earlier one, or from zeros"
            )


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; without it, a new name may not outlive the loss of power."""
    if os.name == "nt":  # folders cannot be opened there, and names need no syncing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_new(part: Path, target: Path) -> None:
    """Give a file its name unless there is one of that name.

    Raises:
        FileExistsError: when there is.
    """
    try:
        target.hardlink_to(part)  # refuses what is there by itself, at no moment too late
    except FileExistsError:
        raise
    except OSError:  # no links here
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        part.rename(target)
