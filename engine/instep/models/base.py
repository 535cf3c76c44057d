"""The interface of a kind of model: a state specification, a step over a batch, and ways to check it.

A kind is one folder or file and one line in `registry`. Everything else (state store, stepper, certification,
recording, verifier) works through these protocols and knows no kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from instep.core.typing import F32, I64, U8
from instep_client.protocol.state_spec import Leaf as Leaf
from instep_client.protocol.state_spec import StateSpec as StateSpec

if TYPE_CHECKING:
    import torch

Floats: TypeAlias = npt.NDArray[Any]
"""float64 or float32, as a reference's dtype."""
LEARNED: Final = "initial_state."
"""The tensor of the weights file that a leaf with a learned initial state begins with is called so, and by its name."""
Shape: TypeAlias = tuple[int, ...]


class PlainFields(BaseModel):
    """Values of a description; a key that it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def state_in_words(state: StateSpec) -> str:
    """The leaves with shapes, and with dtypes other than float32: `state h [64], frames [] int64`."""
    leaves = ", ".join(
        f"{leaf.name} {list(leaf.shape)}" + ("" if leaf.dtype.name == "float32" else f" {leaf.dtype.name}")
        for leaf in state.leaves
    )
    return leaves if [leaf.name for leaf in state.leaves] == ["state"] else f"state {leaves}"


def learned_shapes(state: StateSpec) -> dict[str, Shape]:
    """The tensors of the weights file that leaves with a learned initial state begin with."""
    return {LEARNED + leaf.name: leaf.shape for leaf in state.leaves if leaf.initial is None}


class Description(Protocol):
    """A network without its weights, as `model.yaml` holds it: frozen, comparable, importable without torch."""

    @property
    def kind(self) -> str:
        """The name under which the registry finds it."""

    @property
    def features(self) -> int:
        """Values per frame."""

    @property
    def outputs(self) -> int:
        """Values per frame that the network answers."""

    @property
    def state(self) -> StateSpec:
        """The state that is kept for each stream between frames."""

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor of the weights file by name, in the order in which it counts for the fingerprint."""

    def tensor_dtype(self, tensor: str) -> str:
        """The dtype of a tensor of the weights file, as torch calls it: `float32`."""

    def in_words(self) -> str:
        """One line for people: `40 features → GRU 128 → dense 10`."""

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        """As plain JSON values, always with `kind`; the registry reads it back with or without defaults."""


class BoundStep(Protocol):
    """The step of one batch size, on buffers that stay where they are. One thread at a time may use it.

    Fill `x` and `state`, call `run`, read `y` and `new_state`; they are valid until the next `run`.
    """

    @property
    def x(self) -> torch.Tensor:
        """Frames, float32 [rows, at least features]; columns beyond `features` stay zero."""

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """By leaf, [rows, *shape], before the frame: views that need not be contiguous."""

    @property
    def y(self) -> torch.Tensor:
        """Outputs, float32 [rows, at least outputs]; columns beyond `outputs` mean nothing."""

    @property
    def new_state(self) -> Mapping[str, torch.Tensor]:
        """As `state`, after the frame; the very tensors of `state` where the step works in place."""

    def run(self) -> None:
        """Step every row. On a GPU it only enqueues, so that it can be captured in a graph."""


class Reference(Protocol):
    """The network computed in another way than by its step."""

    @property
    def independent(self) -> bool:
        """Whether it shares no code with the step, being written again from the equations; reports say so if not."""

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """Run sequences of different lengths, the longest first.

        Args:
            x: frames [T, R, features], float32 or of the reference's dtype.
            state: by leaf, [R, *shape], before them; not changed. Floats have the reference's dtype.
            active: [T], descending: how many of the rows, from the first, have a frame at each timestep.

        Returns:
            Outputs [T, R, outputs], meaningless where a row has no frame, and the state after each row's last frame.
        """


class RecurrentModel(Protocol):
    """A model on a device, for inference only; it holds no stream's state. Any thread may use it.

    Call it under `torch.inference_mode()` for speed; it builds no graph without it either.
    """

    @property
    def description(self) -> Description:
        """The network."""

    @property
    def fingerprint(self) -> str:
        """sha256, hex, over the description and the weights."""

    @property
    def state(self) -> StateSpec:
        """The state that is kept for each stream between frames."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def row_multiple(self) -> int:
        """Batch sizes are a multiple of it: 1 where certification may try every size."""

    @property
    def multiply_adds(self) -> int:
        """Of one row in one step, about: certification bounds its work by it."""

    @property
    def least_probes(self) -> int:
        """Rows that certification steps in every batch size at least, however long that takes."""

    @property
    def kernel(self) -> str:
        """A word for how it steps, for logs and for what bits depend on."""

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """Choose the quickest way to step that gives the bits of the plain one in all these buckets.

        Certification calls it once, before anything is bound; `rows` is how many frames to compare per bucket.
        """

    def select_quickest(self) -> None:
        """Choose the quickest way to step, whatever its bits: for engines without exactness."""

    def bind(self, rows: int) -> BoundStep:
        """The step of a batch of `rows`, on buffers of its own."""

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8] | None:
        """T frames of every row in one call: outputs [T, R, outputs] and rows of states after them.

        Args:
            x: float32 [T, R, features].
            state: rows of bytes [R, row_bytes]; not changed.

        Returns:
            None where the network has no such call; then a sequence is a scan over steps.
        """

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The reference in float64, or in float32 to measure what rounding alone does; None without one."""
