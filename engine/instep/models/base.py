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
"""The prefix, before the leaf's name, of the weights tensor that holds a learned initial state."""
Shape: TypeAlias = tuple[int, ...]


class PlainFields(BaseModel):
    """A base for descriptions of plain values; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def state_in_words(state: StateSpec) -> str:
    """The leaves with their shapes, and any dtype other than float32: `state h [64], frames [] int64`."""
    leaves = ", ".join(
        f"{leaf.name} {list(leaf.shape)}" + ("" if leaf.dtype.name == "float32" else f" {leaf.dtype.name}")
        for leaf in state.leaves
    )
    return leaves if [leaf.name for leaf in state.leaves] == ["state"] else f"state {leaves}"


def learned_shapes(state: StateSpec) -> dict[str, Shape]:
    """The shapes of the weights tensors that hold learned initial states."""
    return {LEARNED + leaf.name: leaf.shape for leaf in state.leaves if leaf.initial is None}


class Description(Protocol):
    """A network without its weights, as `model.yaml` holds it: frozen, comparable, importable without torch."""

    @property
    def kind(self) -> str:
        """The name under which the registry finds it."""

    @property
    def features(self) -> int:
        """The number of values in a frame."""

    @property
    def outputs(self) -> int:
        """The number of values that the network returns for a frame."""

    @property
    def state(self) -> StateSpec:
        """The state that is kept for each stream between frames."""

    def tensor_shapes(self) -> dict[str, Shape]:
        """The shape of every weights tensor by name, in the order in which the fingerprint hashes them."""

    def tensor_dtype(self, tensor: str) -> str:
        """The dtype of a tensor of the weights file, as torch calls it: `float32`."""

    def in_words(self) -> str:
        """One line for people: `40 features → GRU 128 → dense 10`."""

    def as_json(self, *, defaults: bool = True) -> dict[str, Any]:
        """Plain JSON values, always with `kind`. The registry reads them back with or without defaults."""


class Reference(Protocol):
    """The network, computed by other means than its step."""

    @property
    def independent(self) -> bool:
        """Whether it was written from the equations and shares no code with the step; reports say so if not."""

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """Run sequences of different lengths, the longest first.

        Args:
            x: frames [T, R, features], float32 or of the reference's dtype.
            state: by leaf, [R, *shape], before these frames; not changed. Floats have the reference's dtype.
            active: [T], descending: the number of rows, counted from the first, that have a frame at each timestep.

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
        """Compute T frames of every row by the user's kind of module in torch; equal to the step within rounding.

        Args:
            x: float32 [T, R, features].
            states: uint8 [R, row_bytes]; not changed.

        Returns:
            Outputs [T, R, outputs] and the states after them; None where there is no such module.
        """

    def definition(self) -> Reference | None:
        """The arithmetic as a second program with the bits of the step; None for a model without a promise of bits."""

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The reference in float64, or in float32 to measure the effect of rounding; None if the kind has none."""


def step_frames(network: RecurrentModel, x: F32, rows: U8) -> tuple[F32, U8]:
    """Step frames [T, R, features]. Returns outputs [T, R, outputs] and the rows of states after the last frame."""
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
    """Run sequences of different lengths step by step; see `Reference.run`.

    Args:
        step: takes frames [R, features] and copies of the leaves, and returns outputs [R, outputs] and the new leaves.
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
