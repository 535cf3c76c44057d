"""The interface of a kind of model: a state specification, a step over a batch, and ways to check it.

A kind is one folder or file and one line in `registry`. Everything else (state store, stepper, recording, verifier)
works through these protocols and knows no kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        """Plain JSON values, always with `kind`. The registry reads them back with or without defaults."""


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
    """A model on a device, for inference only; it holds no stream's state. Any thread may use it."""

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
        """The device on which it steps."""

    @property
    def arithmetic(self) -> str:
        """`portable-1`, with the same bits in every batch and on every processor, or `torch` without that promise."""

    def step(self, x: F32, states: U8) -> tuple[F32, U8]:
        """Step any number of rows.

        Args:
            x: frames, float32 [R, features].
            states: uint8 [R, row_bytes]; not changed.

        Returns:
            Outputs, float32 [R, outputs], and the states after the frames.
        """

    def sequence(self, x: F32, states: U8) -> tuple[F32, U8] | None:
        """T frames of every row, computed by the user's kind of module in torch: the same within rounding.

        Args:
            x: float32 [T, R, features].
            states: uint8 [R, row_bytes]; not changed.

        Returns:
            Outputs [T, R, outputs] and the states after them; None where there is no such module.
        """

    def definition(self) -> Reference | None:
        """The arithmetic as a second program, in float32 with the bits of the step; None without a promise of bits."""

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The reference in float64, or in float32 to measure what rounding alone does; None without one."""


def step_frames(network: RecurrentModel, x: F32, rows: U8) -> tuple[F32, U8]:
    """Step frames [T, R, features]: outputs [T, R, outputs] and rows of states after them."""
    y = np.empty((*x.shape[:2], network.description.outputs), np.float32)
    for frame, answers in zip(x, y, strict=True):
        answers[...], rows = network.step(frame, rows)
    return y, rows


def scan(
    step: Callable[[Floats, dict[str, Any]], tuple[Floats, Mapping[str, Any]]],
    x: Floats,
    state: Mapping[str, Any],
    active: I64,
    outputs: int,
) -> tuple[Floats, dict[str, Any]]:
    """Run sequences of different lengths by one step after another; see `Reference.run`.

    Args:
        step: gives outputs [R, outputs] and leaves after frames [R, features] and leaves before them, which are copies.
        x: frames [T, R, features].
        state: by leaf, [R, *shape].
        active: [T], descending.
        outputs: values per frame.
    """
    y, after = np.zeros((*x.shape[:2], outputs), x.dtype), {name: np.array(leaf) for name, leaf in state.items()}
    for timestep, count in enumerate(active.tolist()):
        before = {name: leaf[:count].copy() for name, leaf in after.items()}
        y[timestep, :count], leaves = step(x[timestep, :count], before)
        for name, leaf in leaves.items():
            after[name][:count] = leaf
    return y, after
