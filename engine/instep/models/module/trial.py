"""The step in eager torch compared with what is served, to find errors that the graph does not show.

torch.export turns everything that is not a tensor into a constant, such as a counter that the step keeps in Python; and
a step that mixes the rows of a batch is served as if each were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from instep.core.typing import F32, U8
from instep.models.errors import ModelError, first_line
from instep.models.module.example import ROWS, Example
from instep.models.network import PortableNetwork
from instep_tools.words import counted

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


def compare(example: Example, network: PortableNetwork) -> None:
    """Run the step, what is served of it and its graph: one row at first, where nothing can be mixed, then several.

    Raises:
        ModelError: when they differ.
    """
    generator = torch.Generator().manual_seed(1)
    names = ["y", *(f"leaf {leaf.name}" for leaf in example.leaves)]
    for rows in (1, ROWS):
        leaves = example.initial(rows)
        for _ in range(STEPS):
            x = example.frames(rows, generator)
            graph, served = _of_graph(network, x, leaves), _served(network, x, leaves)
            results = _of_module(example, x, leaves)
            for name, result, of_graph, given in zip(names, results, graph, served, strict=True):
                if not _close(result, of_graph):
                    raise ModelError(_differs(name, "graph"))
                if not _close(result, given):
                    raise ModelError(_differs(name, "normal form") if rows == 1 else _mixes(name))
            leaves = list(results[1:])


def _of_module(example: Example, x: torch.Tensor, leaves: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    try:
        results: Sequence[torch.Tensor] = example.flat(x, *(leaf.clone() for leaf in leaves))
    except Exception as error:
        raise ModelError(
            f"the step fails in a batch of {counted(len(x), 'row')} ({first_line(error):.200}), and batches have any "
            "number of rows"
        ) from error
    return results


def _of_graph(network: PortableNetwork, x: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    found = network.sequence(x[None].numpy(), _packed(network, leaves))
    assert found is not None
    return _unpacked(network, found[0][0], found[1])


def _served(network: PortableNetwork, x: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return _unpacked(network, *network.step(x.numpy(), _packed(network, leaves)))


def _packed(network: PortableNetwork, leaves: Sequence[torch.Tensor]) -> U8:
    names = [leaf.name for leaf in network.state.leaves]
    return network.state.pack({name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)})


def _unpacked(network: PortableNetwork, y: F32, rows: U8) -> list[torch.Tensor]:
    return [torch.from_numpy(y), *(torch.from_numpy(leaf.copy()) for leaf in network.state.unpack(rows).values())]


def _differs(name: str, other: str) -> str:
    return (
        f"{name} of the step and of its {other} differ after some frames: the step depends on something besides x "
        "and the state, such as a count or the time in Python; put it into the state or the frames"
    )


def _mixes(name: str) -> str:
    return (
        f"the rows of a batch influence one another in the step, and each row is another stream: {name} of a row is "
        f"another in a batch of {ROWS} than alone. Work along the other dimensions only; a layer that takes a sequence "
        "wants x.unsqueeze(1), since it takes [rows, features] for one sequence"
    )


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * max(largest, 1), equal_nan=True)
