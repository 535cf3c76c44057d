"""The user's module as a function of frames and leaves: what it takes and gives, in eager torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from instep.models.base import LEARNED
from instep.models.errors import ModelError, first_line
from instep.models.module.description import StateLeaf
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec, Leaf
from instep_tools.words import counted

ROWS: Final = 32
"""Of the batch that is exported, and of those that are compared."""
FORM: Final = "step(x, state) must return (y, new_state)"


@dataclass(frozen=True, slots=True)
class Structure:
    """How a state is made of its leaves."""

    kind: type[Any]
    names: tuple[str, ...]

    @classmethod
    def of(cls, state: Any) -> Structure:
        """Of the example state: a tensor, or a tuple, list, named tuple or dict of tensors.

        Raises:
            ModelError: when it is anything else.
        """
        values: Sequence[Any]
        match state:
            case torch.Tensor():
                return cls(torch.Tensor, ("state",))
            case dict():
                names, values = tuple(state), list(state.values())
            case tuple() | list():
                names = getattr(state, "_fields", tuple(f"s{at}" for at in range(len(state))))
                values = state
            case _:
                raise ModelError(f"example_state is one {type(state).__name__}; give a tuple or dict of tensors")
        if not values or not all(isinstance(each, torch.Tensor) for each in values):
            raise ModelError("example_state must be a tuple or dict of tensors, at least one and none inside another")
        return cls(type(state), names)

    def build(self, leaves: Sequence[torch.Tensor]) -> Any:
        """A state of these leaves."""
        if self.kind is torch.Tensor:
            return leaves[0]
        if issubclass(self.kind, dict):
            return dict(zip(self.names, leaves, strict=True))
        return self.kind(*leaves) if hasattr(self.kind, "_fields") else self.kind(leaves)

    def leaves(self, state: Any) -> list[Any]:
        """The leaves of a state that the step returned.

        Raises:
            ModelError: when it has other leaves than the example state.
        """
        if self.kind is torch.Tensor and isinstance(state, torch.Tensor):
            return [state]
        if isinstance(state, Mapping) and issubclass(self.kind, dict) and set(state) == set(self.names):
            return [state[name] for name in self.names]
        if isinstance(state, tuple | list) and issubclass(self.kind, tuple | list) and len(state) == len(self.names):
            return list(state)
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else f"one {type(state).__name__}"
        raise ModelError(
            f"the new state has the leaves {found}, and the state before the frame, one {self.kind.__name__}, "
            f"{', '.join(map(str, self.names))}: return the same ones in the same form"
        )


class Flat(nn.Module):
    """The user's step as `forward(x, *leaves) -> (y, *leaves)`, y as [rows, outputs]."""

    def __init__(self, step: nn.Module, structure: Structure) -> None:
        super().__init__()
        self.step = step
        self.structure = structure

    def forward(self, x: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs [rows, outputs] and the new leaves."""
        y, state = split(self.step(x, self.structure.build(leaves)))
        return joined_outputs(y), *self.structure.leaves(state)


@dataclass(frozen=True, slots=True)
class Example:
    """A step with what it takes and gives."""

    flat: Flat
    features: int
    leaves: tuple[StateLeaf, ...]
    begins_with: tuple[torch.Tensor, ...]
    """The leaves [*shape] of a stream before its first frame."""
    output_names: tuple[str, ...]
    """Of outputs that the step returns in a dict; empty otherwise."""

    def initial(self, rows: int) -> list[torch.Tensor]:
        """The state of streams before their first frame."""
        return [leaf.repeat(rows, *[1] * leaf.dim()) for leaf in self.begins_with]

    def learned(self) -> dict[str, torch.Tensor]:
        """What leaves begin with that have more than one value, by their names in the weights file."""
        both = zip(self.leaves, self.begins_with, strict=True)
        return {LEARNED + leaf.name: values for leaf, values in both if leaf.initial == "learned"}

    def frames(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Random frames."""
        return torch.randn(rows, self.features, generator=generator)


def example_of(module: nn.Module, x: Any, state: Any) -> Example:
    """Run a step once and check what it returns.

    Raises:
        ModelError: naming what does not fit.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.dtype != torch.float32 or not x.numel():
        shown = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ModelError(
            f"example_x must be a float32 tensor of frames [rows, features], not {shown}".replace("torch.", "")
        )
    structure = Structure.of(state)
    given = list(state.values()) if isinstance(state, dict) else [state] if isinstance(state, torch.Tensor) else state
    leaves = tuple(_leaf(name, leaf, len(x)) for name, leaf in zip(structure.names, given, strict=True))
    begins_with = tuple(leaf[0].detach().cpu().clone() for leaf in given)
    plain = Example(Flat(module, structure), x.shape[1], leaves, begins_with, ())
    frames = plain.frames(ROWS, torch.Generator().manual_seed(0))
    try:
        result = module(frames, structure.build(plain.initial(ROWS)))
    except Exception as error:
        raise ModelError(
            f"the step fails on frames [{ROWS}, {plain.features}] and a state like the example's "
            f"({type(error).__name__}: {first_line(error)}); correct it or the example, and convert weights of other "
            "dtypes with .float()"
        ) from error
    y, after = split(result)
    parts = outputs_of(y)
    for leaf, new in zip(leaves, structure.leaves(after), strict=True):
        _check_leaf(leaf, new)
    return replace(plain, output_names=_output_names(parts))


def split(result: Any) -> tuple[Any, Any]:
    """The outputs and the new state that a step returned."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        shown = f"{len(result)} values" if isinstance(result, tuple | list) else f"one {type(result).__name__}"
        raise ModelError(f"{FORM}, and it returns {shown}; several outputs go into y, as a tuple or dict of them")
    return result[0], result[1]


def joined_outputs(y: Any) -> torch.Tensor:
    """All outputs that a step returned as one tensor [rows, outputs]."""
    parts = [part if part.dim() > 1 else part.unsqueeze(1) for _, part in outputs_of(y)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def outputs_of(y: Any) -> list[tuple[str, torch.Tensor]]:
    """The outputs and their names, which are empty unless y is a dict."""
    unnamed = y if isinstance(y, tuple | list) else [y]
    parts = list(y.items()) if isinstance(y, Mapping) else [("", each) for each in unnamed]
    for name, part in parts or [("", None)]:
        shown = f"one {type(part).__name__}"
        if isinstance(part, torch.Tensor):
            if part.dtype == torch.float32 and part.dim() in (1, 2) and 0 not in part.shape[1:]:
                continue
            shown = f"{_plain(part.dtype)} {list(part.shape)}"
        words = f"the output {name}" if name else "y"
        raise ModelError(f"{words} is {shown}; return float32 [rows, outputs], as with .float() or .flatten(1)")
    return parts


def _output_names(parts: Sequence[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
    names: list[str] = []
    for name, part in parts:
        width = part.shape[1] if part.dim() > 1 else 1
        names += [str(name)] if width == 1 else [f"{name}.{at}" for at in range(width)]
        if part.shape[0] != ROWS:
            raise ModelError(f"y has the shape {list(part.shape)} for {ROWS} frames; return one row for each row of x")
    return tuple(names) if all(name for name, _ in parts) else ()


def _leaf(name: Any, leaf: torch.Tensor, rows: int) -> StateLeaf:
    dtype = _plain(leaf.dtype)
    if dtype not in DTYPES:
        raise ModelError(f"leaf {name} of the example state is {dtype}; a state is made of {', '.join(DTYPES)}")
    if leaf.dim() < 1 or leaf.shape[0] != rows:
        raise ModelError(
            f"leaf {name} of the example state has the shape {list(leaf.shape)} for {counted(rows, 'row')} of "
            "example_x; the first dimension of both must be the batch"
        )
    first = leaf[:1]
    if not first.numel() or not bool((leaf == first).all()):
        raise ModelError(
            f"leaf {name} of the example state is empty, differs from row to row, or holds NaN, and it is what every "
            "stream begins with: give all rows the same finite values, and open a stream with another state where it "
            "needs one"
        )
    shape, value = tuple(leaf.shape[1:]), float(first.flatten()[0].item())
    is_learned = not bool((first == first.flatten()[0]).all())
    try:
        Leaf(name, shape, DTYPES[dtype], None if is_learned else value)
    except InvalidStateSpec as error:
        raise ModelError(f"{error}; correct the example state") from None
    return StateLeaf.model_validate(
        {"name": name, "shape": shape, "dtype": dtype, "initial": "learned" if is_learned else value}
    )


def _check_leaf(leaf: StateLeaf, new: Any) -> None:
    shown = f"{_plain(new.dtype)} {list(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
    before = f"{leaf.dtype} {[ROWS, *leaf.shape]}"
    if shown != before:
        raise ModelError(
            f"leaf {leaf.name} is {before} before a frame and {shown} after it; keep dtype and shape: a window of "
            "fixed length, as torch.cat([old[:, 1:], new], 1), does not grow"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
