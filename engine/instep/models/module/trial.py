"""The step in eager torch compared with its graph, to find what a graph does not show.

torch.export turns everything that is not a tensor into a constant, such as a counter that the step keeps in Python.
So the step runs for some frames beside its graph; and rows of a batch are changed to see that the others do not notice.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from instep.models.errors import ModelError
from instep.models.module.example import ROWS, Example
from instep.models.module.network import ModuleNetwork

STEPS: Final = 6
TOLERANCE: Final = 2e-5
"""Of the largest value, at least 1: far more than rounding, and less than anything a step computes otherwise."""
_PLAIN: Final = (bool, int, float, str, list, tuple, dict, set)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps in attributes that are neither parameters nor buffers, by their paths."""
    usual = vars(nn.Module()).keys()
    return {
        ".".join(filter(None, ("self", path, key))): value.detach().clone()
        if isinstance(value, torch.Tensor)
        else repr(value)
        for path, part in module.named_modules()
        for key, value in vars(part).items()
        if key not in usual and isinstance(value, (torch.Tensor, *_PLAIN))
    }


def check_attributes(module: nn.Module, before: dict[str, Any]) -> None:
    """Refuse a step that changed one of `attributes_of`.

    Raises:
        ModelError: naming it.
    """
    after = attributes_of(module)
    for name in sorted(before.keys() | after.keys()):
        if not _same(before.get(name), after.get(name)):
            raise ModelError(
                f"the step changes its own attribute {name}, which all streams would share and a graph does not "
                "keep: put it into the state, a count as an int64 leaf"
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(((one == other) | (one != one)).all())
    return type(one) is type(other) and bool(one == other)


def compare(example: Example, network: ModuleNetwork) -> None:
    """Run the step and its graph over some frames.

    Raises:
        ModelError: when they differ.
    """
    generator = torch.Generator().manual_seed(1)
    names = ["y", *(f"leaf {leaf.name}" for leaf in example.leaves)]
    for rows in (ROWS, 2 * ROWS):
        leaves = example.initial(rows)
        for _ in range(STEPS):
            x = example.frames(rows, generator)
            given = network.run_once(x, leaves)
            results = example.flat(x, *(leaf.clone() for leaf in leaves))
            for name, one, other in zip(names, results, given, strict=True):
                if not _close(one, other):
                    raise ModelError(
                        f"{name} of the step and of its graph differ after some frames: the step depends on something "
                        "besides x and the state, such as a count or the time in Python; put it into the state or the "
                        "frames"
                    )
            leaves = list(results[1:])


def compare_rows(example: Example, network: ModuleNetwork) -> None:
    """Step a batch again with half of its rows replaced.

    Raises:
        ModelError: when the other rows differ.
    """
    generator = torch.Generator().manual_seed(2)
    leaves = example.initial(2 * ROWS)
    for _ in range(STEPS):
        x = example.frames(2 * ROWS, generator)
        _, *leaves = network.run_once(x, leaves)
    one = network.run_once(x, leaves)
    fewer = [torch.cat([leaf[:ROWS], leaf[:ROWS]]) for leaf in leaves]
    other = network.run_once(torch.cat([x[:ROWS], -5 * x[:ROWS]]), fewer)
    if not all(_close(a[:ROWS], b[:ROWS]) for a, b in zip(one, other, strict=True)):
        raise ModelError(
            "the rows of a batch influence one another in the step, and each row is another stream: work along the "
            "other dimensions only; a layer that takes a sequence wants x.unsqueeze(1), since it takes [rows, "
            "features] for one sequence"
        )


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * max(largest, 1), equal_nan=True)
