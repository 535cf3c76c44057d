"""A model folder compared with the module that it was made from: the command `instep model check`."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from instep.core.typing import F32
from instep.models.agreement import agreement, first_output
from instep.models.errors import ModelError, first_line
from instep.models.folder import load_model
from instep.models.handover.traced_module import evaluating
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
    tolerance: float
    """The largest difference that rounding explains."""

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

    def _verdict(self) -> str:
        if not self.error:
            return "They agree bit for bit on these frames."
        largest = f"the largest difference is {self.error:.1e}, and rounding explains {self.tolerance:.1e}"
        if self.agrees:
            return f"They agree: {largest}."
        return (
            f"They differ: {largest}. {self.model} holds other weights or other layers than the module: make it again "
            "with instep.models.save_model or export_step. A function that makes a module may give it random weights."
        )


def check(folder: Path, against: str) -> Check:
    """Run a model folder, frame by frame, and a module of the user's over random sequences.

    Args:
        folder: the model.
        against: `net.py:net`, a Python file and an attribute in it: an nn.Module over sequences, or a function that
            returns one.

    Raises:
        ModelError: the folder cannot be read, the file fails or has no such module, or the module takes other frames.
    """
    prepare()
    model = load_model(folder)
    module = _module(against)
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    x = torch.randn(ROWS, STEPS, model.description.features, generator=torch.Generator().manual_seed(0))
    y = _outputs(module, x.to(device), against)
    found = agreement(build(model, torch.device("cpu")), x.numpy(), y)
    if found is None:
        raise ModelError(
            f"{against} gives the shape {list(y.shape)} for frames {list(x.shape)}, and {folder} gives "
            f"{model.description.outputs} values for each frame: name the module that {folder} was made from"
        )
    return Check(str(folder), against, tuple(x.shape), found.error, found.tolerance)


def _outputs(module: nn.Module, x: torch.Tensor, against: str) -> F32:
    try:
        with evaluating(module):
            y: F32 = first_output(module(x.clone()), against).float().cpu().numpy()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{against} fails on random frames {list(x.shape)} of the folder's size ({first_line(error)}): "
            "name the network over whole sequences, or a function that returns one which takes frames alone; a step is "
            "compared by export_step"
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
    if isinstance(value, type):
        raise ModelError(f"{against} is a class, whose weights would be random: name a trained module of it")
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
