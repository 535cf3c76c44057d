"""States as users see them, as rows of bytes, and in files from which a server can continue a stream.

A state is a dict of arrays by the names of the leaves: of a GRU, `h`; of an LSTM, `h` and `c`. States of N streams have
N as their first extent.

A snapshot's file is in the format safetensors, with one tensor `state.NAME` for each leaf; its metadata name the stream
and the model. Only files need the package safetensors, which is therefore imported where they are read and written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep_client.arguments import as_array, float32_copy
from instep_client.connection import MAX_REPLY_BYTES
from instep_client.files import write_file
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.state_spec import U8, Leaf, StateSpec
from instep_client.protocol.wire import ServerInfo

_FORMAT: Final = "instep stream snapshot 2"
_LEAF: Final = "state."
_DTYPES: Final = ("F32", "F64", "I64", "BOOL")
_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 65_536

State: TypeAlias = dict[str, npt.NDArray[Any]]
GivenState: TypeAlias = Mapping[str, npt.ArrayLike] | npt.ArrayLike
"""A state as users may give it. For a model with one leaf, the array alone is enough."""


def state_rows(state: GivenState, spec: StateSpec, count: int | None) -> U8:
    """Turn a user's states of `count` streams, or the state of one if None, into rows of bytes [N, row_bytes].

    Raises:
        InvalidInput: naming the shape or leaf that does not fit.
    """
    leading = () if count is None else (count,)
    if not isinstance(state, Mapping) and len(spec.leaves) == 1:
        state = {spec.leaves[0].name: state}
    if not isinstance(state, Mapping) or set(state) != {leaf.name for leaf in spec.leaves}:
        names = ", ".join(leaf.name for leaf in spec.leaves)
        raise InvalidInput(f"a state of this model must be a dict of arrays called {names}")
    arrays = {leaf.name: _leaf(state[leaf.name], leaf, (*leading, *leaf.shape)) for leaf in spec.leaves}
    return spec.pack({leaf.name: arrays[leaf.name].reshape(-1, *leaf.shape) for leaf in spec.leaves})


def as_state(rows: U8, spec: StateSpec, *, single: bool) -> State:
    """Turn rows of bytes [N, row_bytes] into states of N streams, or into the state of the only one.

    The arrays are copies. A single value is an array too.
    """
    return {name: np.array(array[0] if single else array, order="C") for name, array in spec.unpack(rows).items()}


def _leaf(x: npt.ArrayLike, leaf: Leaf, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if leaf.dtype == np.float32:
        array: npt.NDArray[Any] = float32_copy(x, f"the state's leaf {leaf.name}")
    else:
        array = as_array(x, f"the state's leaf {leaf.name}", "an array")
        if not np.can_cast(array.dtype, leaf.dtype, "safe"):
            raise InvalidInput(f"the state's leaf {leaf.name} must be {leaf.dtype}, not {array.dtype}")
        array = array.astype(leaf.dtype)
    if array.shape != shape:
        raise InvalidInput(
            f"the state's leaf {leaf.name} must have shape {list(shape)}; this array has shape {list(array.shape)}"
        )
    return array


@dataclass(frozen=True, slots=True, eq=False)
class StreamSnapshot:
    """A stream's state before the frame `seq`."""

    name: str
    seq: int
    state: State = field(repr=False)
    fingerprint: str
    """The model's fingerprint."""
    model: str

    def save(self, path: str | os.PathLike[str], overwrite: bool = True) -> None:
        """Write a safetensors file, which appears once it is complete and on the disk.

        Raises:
            FileExistsError: when the file exists and may not be overwritten.
            OSError: as the file system says.
            ModuleNotFoundError: when safetensors is not installed; it says how to install it.
        """
        of = {name: str(getattr(self, name)) for name in ("name", "seq", "fingerprint", "model")}
        tensors = {_LEAF + name: np.array(leaf, order="C") for name, leaf in self.state.items()}
        content = _safetensors().numpy.save(tensors, {"format": _FORMAT, **of})
        write_file(Path(path), content, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamSnapshot:
        """Read a snapshot from a file.

        Raises:
            InvalidInput: when the file is not a snapshot of a stream.
            OSError: as the file system says.
            ModuleNotFoundError: when safetensors is not installed; it says how to install it.
        """
        safetensors, path = _safetensors(), Path(path)
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            file_bytes = os.fstat(file.fileno()).st_size
        try:
            # safetensors allows headers of 100 MB and tensors of any size; no server could have sent a larger state.
            if header_bytes > _MAX_HEADER_BYTES or file_bytes > _LENGTH_BYTES + header_bytes + MAX_REPLY_BYTES:
                raise ValueError("it is longer than any snapshot")
            return cls._read(safetensors, path)
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            raise InvalidInput(f"{path} is not a snapshot of a stream: {error}") from None

    @classmethod
    def _read(cls, safetensors: ModuleType, path: Path) -> StreamSnapshot:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            names = list(file.keys())
            if about.get("format") != _FORMAT:
                raise ValueError(f"its metadata do not say that it is an {_FORMAT}")
            if not names or not all(name.startswith(_LEAF) for name in names):
                raise ValueError("its tensors must be called `state.NAME`, one for each leaf")
            for name in names:
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _DTYPES or 0 in tensor.get_shape():
                    raise ValueError(f"its {name} is {tensor.get_dtype()} {tensor.get_shape()}, which no state is")
            state = {name.removeprefix(_LEAF): np.array(file.get_tensor(name)) for name in names}
        seq = int(about["seq"])
        if not 0 <= seq < 2**62:
            raise ValueError("its seq is out of range")
        return cls(about["name"], seq, state, about["fingerprint"], about["model"])

    def check(self, info: ServerInfo) -> None:
        """Check that a server can continue from this snapshot.

        Raises:
            InvalidInput: when the server has another model, or no stream can have this state.
        """
        if self.fingerprint != info.fingerprint:
            raise InvalidInput(
                f"the snapshot is of model {self.model!r} (fingerprint {self.fingerprint[:12]}), the server runs "
                f"{info.model!r} ({info.fingerprint[:12]}); a state is valid only with the weights that made it"
            )
        try:
            rows = state_rows(self.state, info.state, None)
        except InvalidInput as error:
            raise InvalidInput(f"the snapshot was changed since it was taken: {error}") from None
        if not info.state.valid(rows).all():
            raise InvalidInput(
                f"the snapshot's state, before frame {self.seq} of stream {self.name!r}, holds NaN or infinity, which "
                "no server accepts: use an earlier snapshot, or the initial state"
            )


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "files of snapshots need the package 'safetensors', which is not installed: "
            'pip install "instep[cli]", or pip install safetensors',
            name="safetensors",
        ) from None
    return safetensors
