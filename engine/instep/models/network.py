"""A compiled network on a CPU, with everything that it can be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.models import registry
from instep.models.base import Floats, Reference, StateSpec, scan
from instep.models.model import Model
from instep.models.portable.compiler import CompiledStep, Rows, as_arrays, shaped
from instep.models.portable.form import ARITHMETIC, Form

if TYPE_CHECKING:
    import numpy.typing as npt

    from instep.models.torch_network import TorchNetwork

IN_WORDS = f"{ARITHMETIC}: the same bits in every batch, on every processor with FMA"


class PortableNetwork:
    """A `RecurrentModel` in the arithmetic `portable-1`.

    Raises:
        ModelError: when its normal form cannot be computed.
    """

    arithmetic = ARITHMETIC

    def __init__(self, model: Model) -> None:
        self.model = model
        self.description, self.fingerprint = model.description, model.fingerprint
        self.state: StateSpec = model.state
        self.device = torch.device("cpu")
        self.form = registry.normal_form(model.description)
        self._tensors = as_arrays(model.weights)
        self._step = CompiledStep(self.form, self._tensors, self.state, f"the normal form of {model.name}")

    def bind(self, inputs: F32, states: U8, outputs: F32) -> Rows:
        """Prepare to step rows of three tables; see `CompiledStep.bind`."""
        return self._step.bind(inputs, states, outputs)

    def step(self, x: F32, states: U8) -> tuple[F32, U8]:
        """See `RecurrentModel.step`."""
        return self._step.run(x, states)

    def sequence(self, x: F32, states: U8) -> tuple[F32, U8] | None:
        """See `RecurrentModel.sequence`."""
        return None if self._module is None else self._module.sequence(x, states)

    def definition(self) -> Reference:
        """The definition of the arithmetic, as a `Reference`."""
        return DefinitionReference(self.form, self._tensors, self.state)

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The reference of the model's kind."""
        return registry.reference(self.model, dtype)

    @cached_property
    def _module(self) -> TorchNetwork | None:
        return registry.torch_network(self.model, self.device)


class DefinitionReference:
    """The definition of the arithmetic as a `Reference`. In float32 it has the bits of the step."""

    def __init__(
        self,
        form: Form,
        tensors: Mapping[str, npt.NDArray[Any]],
        state: StateSpec,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        from instep.models.portable.definition import Definition

        self.independent = False
        is_wide = dtype is np.float64
        self._form, self._state = form, state
        self._definition = Definition(form, tensors, double=True) if is_wide else Definition(form, tensors)
        self._dtypes = {
            leaf.name: np.dtype(np.float64) if is_wide and leaf.dtype.name == "float32" else leaf.dtype
            for leaf in state.leaves
        }
        self._dtype = np.dtype(np.float64 if is_wide else np.float32)

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """See `Reference`."""
        leaves = {name: np.asarray(state[name], dtype) for name, dtype in self._dtypes.items()}
        frames = np.ascontiguousarray(x, self._dtype)
        return scan(self._step, frames, leaves, active, self._form.outputs[0].elements)

    def _step(self, x: Floats, state: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        leaves = [np.ascontiguousarray(leaf).reshape(len(x), -1) for leaf in state.values()]
        y, *after = self._definition.step([x, *leaves])
        return y, shaped(self._state, after)
