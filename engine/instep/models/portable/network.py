"""A network in the arithmetic `portable-1`, for any number of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, U8
from instep.models.base import StateSpec
from instep.models.portable.compiler import Compiled, aligned_bytes
from instep.models.portable.form import Form, check


class CompiledStep:
    """A form with its weights, compiled. Any number of threads may use it, each with `Rows` of its own.

    Args:
        form: it is checked, since it may come from a stranger.
        tensors: of the weights file, by name.
        state: the leaves, in the order of the form's inputs after the frame.
        source: how sentences call the form.

    Raises:
        ModelError: when the form cannot be computed.
    """

    def __init__(
        self, form: Form, tensors: Mapping[str, npt.NDArray[Any]], state: StateSpec, source: str = "the step"
    ) -> None:
        check(form, {name: (tensor.dtype.name, tensor.size) for name, tensor in tensors.items()}, source)
        self.form, self.state = form, state
        self._code = Compiled(form, tensors)
        self.features, *_ = self._code.input_sizes
        self.outputs, *_ = self._code.output_sizes

    def bind(self, inputs: F32, states: U8, outputs: F32) -> Rows:
        """Room to step rows of three tables.

        Args:
            inputs: float32 [any, features].
            states: uint8 [any, row_bytes], changed in place.
            outputs: float32 [any, outputs].

        Raises:
            ValueError: for tables of other dtypes or widths.
        """
        for table, dtype, width in (
            (inputs, np.float32, self.features),
            (states, np.uint8, self.state.row_bytes),
            (outputs, np.float32, self.outputs),
        ):
            if table.dtype != dtype or table.ndim != 2 or table.shape[1] != width or table.strides[1] != table.itemsize:
                raise ValueError(
                    f"a table of {table.dtype} {table.shape}, where rows of {width} {dtype.__name__} belong"
                )
        return Rows(self._code, self.state, inputs, states, outputs)

    def run(self, x: F32, states: U8) -> tuple[F32, U8]:
        """Step rows of states, uint8 [R, row_bytes], with a frame each, float32 [R, features].

        Returns:
            Outputs [R, outputs] and the states after the frames, as copies.
        """
        if len(states) != len(x):
            raise ValueError(f"{len(x)} frames for {len(states)} states")
        y, after = np.empty((len(x), self.outputs), np.float32), states.copy()
        self.bind(np.ascontiguousarray(x), after, y).run_all(len(x))
        return y, after


class Rows:
    """Memory for steps over rows of three tables; one thread at a time may use it."""

    def __init__(self, code: Compiled, state: StateSpec, inputs: F32, states: U8, outputs: F32) -> None:
        self._code, self._tables = code, (inputs, states, outputs)
        self._memory = aligned_bytes(code.memory_bytes)
        self._memory_address: int = self._memory.ctypes.data
        leaves = [(states.ctypes.data + offset, states.strides[0]) for offset in state.offsets]
        ports = [(inputs.ctypes.data, inputs.strides[0]), *leaves, (outputs.ctypes.data, outputs.strides[0]), *leaves]
        self._ports: I64 = np.array([(*port, 0) for port in ports], np.int64)
        """The addresses of row numbers are still missing."""
        self._ports_address: int = self._ports.ctypes.data
        self._numbers = self._ports[:, 2]
        self._of_rows = self._numbers[:: 1 + len(leaves)]

    def run(self, slots: I64, rows: I64) -> None:
        """Step the states of `slots` with the frames in `rows` of the inputs; outputs go to the same rows.

        int64 [R] each, contiguous; slots are distinct.
        """
        self._numbers[:] = slots.ctypes.data
        self._of_rows[:] = rows.ctypes.data
        self._code.run(self._memory_address, self._ports_address, 0, len(rows))

    def run_all(self, count: int) -> None:
        """Step the first `count` rows of all tables."""
        self._numbers[:] = 0
        self._code.run(self._memory_address, self._ports_address, 0, count)


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Tensors of torch as arrays."""
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}


def unpacked(state: StateSpec, rows: U8) -> list[npt.NDArray[Any]]:
    """Each leaf of rows of states, [R, elements], contiguous."""
    return [np.ascontiguousarray(leaf).reshape(len(rows), -1) for leaf in state.unpack(rows).values()]


def shaped(state: StateSpec, leaves: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Leaves [R, elements] by name, [R, *shape]."""
    return {leaf.name: values.reshape(-1, *leaf.shape) for leaf, values in zip(state.leaves, leaves, strict=True)}
