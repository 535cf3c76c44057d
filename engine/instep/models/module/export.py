"""`export_step`: a user's step module to a model folder."""

from __future__ import annotations

import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import nn
from torch.export import Dim, ExportedProgram, export

import instep
from instep.models.errors import ModelError, first_line
from instep.models.folder import check_free, check_name, check_output_names, write_model
from instep.models.model import Model, check_weights
from instep.models.module.capture import captured
from instep.models.module.description import ModuleDescription
from instep.models.module.example import ROWS, Example, example_of
from instep.models.network import PortableNetwork
from instep.models.numerics import evaluating
from instep.models.portable.trace import form_of_module
from instep.models.registry import KINDS, sentences
from instep_tools.words import counted

MOST_ROWS: Final = 4096
_STEPS: Final = 6
_TOLERANCE: Final = 2e-5
"""Of the largest value, at least 1: far more than rounding, and less than anything a step computes otherwise."""


def export_step(
    module: nn.Module,
    example_x: torch.Tensor,
    example_state: Any,
    path: str | Path,
    *,
    initial_state: Literal["zeros", "example"] = "zeros",
    name: str | None = None,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write the model folder of a step module, `y, new_state = module(x, state)`.

    The module is exported as a graph, checked, and compared with itself over some steps. Nothing of it but the graph
    and its tensors is written, and loading the folder runs none of its code.

    Args:
        module: the step of a batch: frames x, float32 [rows, features], and the state before them; it returns outputs,
            float32 [rows, outputs], and the state after them. Several outputs, as a tuple or dict, are concatenated.
        example_x: frames of any number of rows; only the shape counts.
        example_state: a tuple or dict of tensors [rows, …], float32, float64, int64 or bool, with equal rows.
        path: the folder; made if it does not exist.
        initial_state: what every stream begins with. `zeros`: the example is zeros, and anything else in it is refused
            as a mistake. `example`: a row of the example, as where a first state was learned.
        name: what clients are told; the folder's name if None.
        outputs: a name for each output; those of the dict if the step returns one.
        overwrite: replace a model that the folder holds.

    Raises:
        ModelError: the step does something that cannot be served, and the message says what; the folder holds a model,
            or cannot be written. Nothing is written then.
    """
    folder = Path(path)
    if not overwrite:
        check_free(folder, KINDS["module"])  # before the export, which takes seconds
    name = folder.resolve().name if name is None else name
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        kind = "TorchScript" if isinstance(module, nn.Module) else f"one {type(module).__name__}"
        raise ModelError(f"the step is {kind}; give an nn.Module whose forward is y, new_state = step(x, state)")
    if initial_state not in ("zeros", "example"):
        raise ModelError(f'initial_state is {initial_state!r:.80}: expected "zeros" or "example"')
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    with evaluating(module), _in_silence():
        mine = copied(module, "the step").cpu()
        with _remembering_nothing(mine):
            example = example_of(mine, example_x, example_state)
        if initial_state == "zeros" and (given := [leaf.name for leaf in example.leaves if leaf.initial != 0]):
            raise ModelError(
                f"the example state is not zeros in {', '.join(given)}, and every stream would begin with it: say so "
                'with initial_state="example", or give zeros'
            )
        model = _model(_exported_step(example), example, name, outputs)
        with _remembering_nothing(mine):
            _compare(example, PortableNetwork(model))
    write_model(folder, model, overwrite=overwrite)
    return model


def _model(program: ExportedProgram, example: Example, name: str, outputs: Sequence[str]) -> Model:
    try:
        capture = captured(program, [leaf.name for leaf in example.leaves])
        frame = [torch.zeros(1, example.features), *example.initial(1)]
        traced = form_of_module(capture.graph, capture.tensors, frame, capture.lines)
        description = ModuleDescription(
            features=example.features, state=example.leaves, form=traced.form, graph=capture.graph
        )
    except ValidationError as error:
        raise ModelError(f"the step cannot be served: {sentences(error)}") from None
    tensors = capture.tensors | traced.constants | example.learned()
    check_weights(tensors, description, "the step")
    names = check_output_names(list(outputs) or list(example.output_names), description)
    return Model(check_name(name), description, tensors, names)


def _exported_step(example: Example) -> ExportedProgram:
    batch = Dim("B", min=1, max=MOST_ROWS)
    arguments = (example.frames(ROWS, torch.Generator().manual_seed(0)), *example.initial(ROWS))
    shapes = {"x": {0: batch}, "leaves": tuple({0: batch} for _ in example.leaves)}
    try:
        return exported(example.flat, arguments, shapes)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_refusal(error)) from error


def exported(module: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    """The graph of a module's forward, in which nothing changes in place."""
    # While it fails, torch.export prints the graph so far.
    with _in_silence(), redirect_stderr(io.StringIO()):
        program = export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)
        # With no operator to decompose, this only makes new tensors of changes in place.
        return program.run_decompositions({})  # type: ignore[no-any-return]


def _refusal(error: Exception) -> str:
    """Why torch.export gave up, in the user's words."""
    text = str(error)
    if "data-dependent" in text:
        return (
            f"{_where(error)} decides by a value in a tensor (if, while, int(), float(), bool() or .item()), and one "
            "way would be taken for all streams of a batch: use torch.where"
        )
    if "specialized it to be a constant" in text:
        return (
            f"the step fixes the batch size (it was exported with {ROWS} rows): use x.shape[0] where a number of rows "
            "is written, and work on all rows at once where a loop runs over them; where a layer takes a sequence, as "
            "nn.GRU does, give it x.unsqueeze(1), since x alone would be one sequence of as many timesteps"
        )
    if "Not all values of B" in text:
        return "the step takes another way at some batch sizes (an if on x.shape[0]); do the same at every size"
    return (
        f"torch.export cannot follow the step ({type(error).__name__}: {first_line(error):.200}); write it with "
        "functions of torch, from x and the state to y and the new state"
    )


def _where(error: Exception) -> str:
    """The line of the user's code that an error comes from."""
    packages = tuple(str(Path(module.__file__).parent) for module in (torch, instep) if module.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(packages)]
    if not frames or not frames[-1].line:
        return "the step"
    return f"the step ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line.strip():.80})"


def copied(module: nn.Module, subject: str) -> nn.Module:
    """A copy, so that the user's module stays as it was; `subject` is how sentences call it.

    Raises:
        ModelError: when it cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"{subject} cannot be copied ({type(error).__name__}: {first_line(error)}); make it of parameters, buffers "
            "and plain values"
        ) from error


@contextmanager
def _remembering_nothing(module: nn.Module) -> Iterator[None]:
    """Refuse a step that changes an attribute, of which a graph holds only one value."""

    def attributes() -> dict[str, str]:
        parts = [(f"self.{path}.".replace("..", "."), vars(part)) for path, part in module.named_modules()]
        return {path + key: repr(value) for path, own in parts for key, value in own.items() if key not in usual}

    usual = vars(nn.Module())
    before = attributes()
    yield
    for name, value in attributes().items():
        if before.get(name) != value:
            raise ModelError(
                f"the step changes its own attribute {name}, which all streams would share and a graph does not keep: "
                "put it into the state, a count as an int64 leaf"
            )


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without what torch.export writes for those who work on it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(example: Example, network: PortableNetwork) -> None:
    """Run the step beside what is served of it and its graph: one row at first, where nothing can be mixed, then 32.

    A graph does not show what is a constant in it, such as a counter in Python, nor that rows of a batch mix.
    """
    generator = torch.Generator().manual_seed(1)
    names = [leaf.name for leaf in example.leaves]
    for rows in (1, ROWS):
        state = example.initial(rows)
        for _ in range(_STEPS):
            x = example.frames(rows, generator)
            try:
                y, *after = example.flat(x.clone(), *(leaf.clone() for leaf in state))
            except Exception as error:  # whatever the user's code raises
                raise ModelError(
                    f"the step fails in a batch of {counted(rows, 'row')} ({first_line(error):.200}), and batches have "
                    "any number of rows"
                ) from error
            before = network.state.pack({name: leaf.numpy() for name, leaf in zip(names, state, strict=True)})
            whole = network.sequence(x[None].numpy(), before)
            assert whole is not None
            for outputs, packed in (network.step(x.numpy(), before), (whole[0][0], whole[1])):
                _check_equal("y", y, outputs)
                leaves = network.state.unpack(packed)
                for name, leaf in zip(names, after, strict=True):
                    _check_equal(f"leaf {name}", leaf, leaves[name])
            state = after


def _check_equal(name: str, of_step: torch.Tensor, found: npt.NDArray[Any]) -> None:
    expected = of_step.numpy()
    largest = float(np.abs(np.nan_to_num(expected, posinf=0, neginf=0)).max(initial=1))
    within = _TOLERANCE if expected.dtype.kind == "f" else 0
    if np.allclose(expected, found, rtol=within, atol=within * largest, equal_nan=True):
        return
    if len(expected) == 1:
        raise ModelError(
            f"{name} of the step and of what would be served differ after some frames: the step depends on something "
            "besides x and the state, such as a count or the time in Python; put it into the state or the frames"
        )
    raise ModelError(
        f"the rows of a batch influence one another in the step, and each row is another stream: {name} of a row is "
        f"another in a batch of {ROWS} than alone. Work along the other dimensions only; a layer that takes a sequence "
        "wants x.unsqueeze(1), since it takes [rows, features] for one sequence"
    )
