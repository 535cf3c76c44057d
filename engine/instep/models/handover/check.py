"""A model folder compared with the module that it was made from: the command `instep model check`."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from instep.core.typing import F32
from instep.models.agreement import agreement, distance, first_output, rounding_tolerance, stepped_outputs
from instep.models.base import StateSpec
from instep.models.errors import ModelError, first_line
from instep.models.folder import load_model
from instep.models.handover.traced_module import evaluating
from instep.models.model import Model
from instep.models.module.description import ModuleDescription
from instep.models.module.example import joined_outputs, split
from instep.models.numerics import prepare
from instep.models.registry import build

ROWS: Final = 32
STEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Check:
    """How far a module's outputs are from those that are served, over random frames."""

    model: str
    against: str
    frames: tuple[int, ...]
    """The shape of the random frames."""
    error: float
    """The largest difference from the outputs that are served."""
    alone: float | None
    """The same of the module from itself, one sequence alone and in the batch; None where they do not agree."""
    tolerance: float
    """The largest error that rounding explains."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences."""
        return self.error <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"agrees": self.agrees, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.model} and {self.against}, on random frames {list(self.frames)}"
        yield ""
        yield from textwrap.wrap(self._verdict(), 79)
        yield ""
        yield f"{'':<40}{'largest error':>15}"
        for words, error in (("served", self.error), ("the module itself, alone and in a batch", self.alone)):
            if error is not None:
                yield f"{words:<40}{error:>15.1e}"
        yield f"{'explained by rounding':<40}{self.tolerance:>15.1e}"

    def _verdict(self) -> str:
        if not self.agrees:
            return (
                f"They differ by more than rounding in float32 explains, so {self.model} holds other weights or other "
                "layers than the module: make it again with instep.models.save_model or export_step. If --against "
                "names a class, or a function that makes a module, that module may have random weights."
            )
        if not self.error:
            return "They agree bit for bit on these frames."
        return (
            "They agree: rounding explains every difference. The outputs that are served have the same bits in every "
            "batch and on every processor; those of the module depend on both."
        )


def check(folder: Path, against: str) -> Check:
    """Run a model folder and a module of the user's over random frames.

    Args:
        folder: the model.
        against: `net.py:net`, a Python file and an attribute in it: an nn.Module, or a function that returns one.

    Raises:
        ModelError: the folder cannot be read, the file fails or has no such module, or the module takes other frames.
    """
    prepare()
    model = load_model(folder)
    module = _module(against)
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, STEPS, model.description.features, generator=generator)
    if isinstance(model.description, ModuleDescription) and model.description.graph is not None:
        return _check_step(str(folder), model, against, module, x)
    y = _outputs(module, x.to(device), against)
    network = build(model, torch.device("cpu"))
    found = agreement(network, x.numpy(), y)
    if found is None:
        raise ModelError(
            f"{against} gives the shape {list(y.shape)} for frames {list(x.shape)}, and {folder} gives "
            f"{model.description.outputs} values for each frame: name the module that {folder} was made from"
        )
    checked = Check(str(folder), against, tuple(x.shape), found.error, None, found.tolerance)
    if not checked.agrees:
        return checked
    outputs, rows = model.description.outputs, x.shape[found.rows_axis]
    alone = _outputs(module, x.narrow(found.rows_axis, 0, 1).to(device), against)
    together = found.arrangement.apply(y, rows, outputs)[:, :1]
    return replace(checked, alone=distance(found.arrangement.apply(alone, 1, outputs), together))


def _check_step(folder: str, model: Model, against: str, module: nn.Module, x: torch.Tensor) -> Check:
    network = build(model, torch.device("cpu"))
    frames = x.transpose(0, 1).contiguous()
    served = stepped_outputs(network, frames.numpy())
    y, alone = (_step_outputs(module, network.state, rows, against) for rows in (frames, frames[:, :1]))
    if y.shape != served.shape:
        raise ModelError(
            f"{against} gives {y.shape[2]} outputs for each frame, and {folder} {served.shape[2]}: name the step "
            f"that {folder} was exported from"
        )
    return Check(
        model=folder,
        against=against,
        frames=tuple(x.shape),
        error=distance(y, served),
        alone=distance(alone, y[:, :1]),
        tolerance=rounding_tolerance(network, frames.numpy(), served),
    )


def _step_outputs(module: nn.Module, spec: StateSpec, frames: torch.Tensor, against: str) -> F32:
    """Outputs [T, R, outputs] of a step module; the names of the leaves tell in which form it takes the state."""
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    names = [leaf.name for leaf in spec.leaves]
    leaves = {name: torch.tensor(leaf).to(device) for name, leaf in spec.unpack(spec.initial(frames.shape[1])).items()}
    state: Any = leaves
    if names == ["state"]:
        state = leaves["state"]
    elif names == [f"s{at}" for at in range(len(names))]:
        state = tuple(leaves.values())
    outputs = []
    try:
        with evaluating(module):
            for x in frames.to(device):
                y, state = split(module(x.clone(), state))
                outputs.append(joined_outputs(y).cpu())
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{against} fails on frames {list(frames.shape[1:])} and a state with the leaves {', '.join(names)} "
            f"({first_line(error)}): name the step that the folder was exported from"
        ) from None
    return torch.stack(outputs).numpy()


def _outputs(module: nn.Module, x: torch.Tensor, against: str) -> F32:
    try:
        with evaluating(module):
            y: F32 = first_output(module(x.clone()), against).float().cpu().numpy()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{against} fails on random frames {list(x.shape)} of the folder's size ({first_line(error)}): "
            "name the module that the folder was made from, or a function that returns one which takes frames alone"
        ) from None
    return y


def _module(against: str) -> nn.Module:
    file, colon, attribute = against.rpartition(":")
    if not colon or not attribute:
        raise ModelError(f"--against {against}: name a Python file and the module in it, as in net.py:net")
    if not os.path.isfile(file):
        raise ModelError(
            f"--against {against}: there is no file {file}; name one and the module in it, as in net.py:net"
        )
    namespace = _run(Path(file))
    value: Any = namespace
    for name in attribute.split("."):
        if not hasattr(value, name):
            modules = [key for key, each in vars(namespace).items() if isinstance(each, nn.Module)]
            meant = get_close_matches(name, modules, 1) or modules
            hint = f"; did you mean {file}:{meant[0]}?" if meant else ": it has no nn.Module at its top level"
            raise ModelError(f"{file} has no {attribute}{hint}")
        value = getattr(value, name)
    if not isinstance(value, nn.Module) and callable(value):
        try:
            value = value()
        except Exception as error:
            raise ModelError(_failure(Path(file), error)) from error
    if not isinstance(value, nn.Module):
        raise ModelError(f"{against} is {value!r:.60}: name an nn.Module, or a function that returns one")
    return value


def _run(file: Path) -> ModuleType:
    """What a Python file defines. Its own imports find its neighbours."""
    spec = spec_from_file_location(f"checked_{file.stem}", file)  # a name that hides no other module
    if spec is None or spec.loader is None:
        raise ModelError(f"{file} is not a Python file: name one that ends in .py, as in net.py:net")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(_failure(file, error)) from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _failure(file: Path, error: BaseException) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == file.resolve()
    ]
    where = f"{file}, line {lines[-1]}" if lines else f"{file}"
    what = f"{where}: {type(error).__name__}: {first_line(error)}"
    if isinstance(error, ModelError):  # of `save_model` or `export_step`
        return f'{what}; the file is run to find the module: put what makes the folder under if __name__ == "__main__":'
    return f"{what}; correct it, or name another file"
