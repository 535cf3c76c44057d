"""`instep model import net.onnx`: a model folder of a step graph in ONNX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from instep.models.base import RecurrentModel
from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names, graph_bytes, write_model
from instep.models.model import Model, check_weights
from instep.models.module.description import ModuleDescription
from instep.models.network import PortableNetwork
from instep.models.onnx.operators import Array
from instep.models.onnx.reader import ROWS, Extents, StepGraph, Tensor, explain, open_session, parse, read_onnx
from instep.models.portable.network import shaped, unpacked
from instep.models.registry import sentences
from instep_client.protocol.state_spec import DTYPES
from instep_tools.words import counted

_IN: Final = "in|input|prev|previous|past|old|init|initial"
_OUT: Final = "out|output|next|new|present|updated"
_BEFORE: Final = re.compile(rf"^(?:{_IN})_|_(?:{_IN})$|(?<=[a-z])(?:In|Prev)$|_?0$")
_AFTER: Final = re.compile(rf"^(?:{_OUT})_|_(?:{_OUT})$|(?<=[a-z])(?:Out|Next|New)$|_?[nN1]$")
"""What marks the name of an input, and of an output."""
_TRIALS: Final = ((1, 4), (32, 2))
"""Rows and frames for which a step is compared with onnxruntime."""
_TOLERANCE: Final = 2e-4
"""Of the largest value of an output or leaf, or of 1 if that is larger."""


def import_onnx(
    file: str | Path,
    folder: str | Path,
    *,
    state: Mapping[str, str] | None = None,
    answer: str | None = None,
    constants: Mapping[str, float] | None = None,
    shapes: Mapping[str, Extents] | None = None,
    name: str | None = None,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write a step graph in ONNX as a model folder of kind `module`, compared with onnxruntime.

    Args:
        file: the graph, from a frame and the state to an answer and the next state; nothing in it is trusted.
        folder: where to write it; made if it does not exist.
        state: inputs with the outputs that take their place in the next step; matched by name if not given.
        answer: the output that is answered, where several are not state.
        constants: inputs with what each of their values always is.
        shapes: of inputs whose shapes the graph leaves open; without `rows` for a graph of one row.
        name: what clients are told; the folder's name if None.
        outputs: a name for each output; none if they have no names.
        overwrite: replace a model that the folder holds.

    Raises:
        ModelError: with what cannot be served, and what to do. Nothing is written then.
    """
    file, folder = Path(file), Path(folder)
    content, source = graph_bytes(file), str(file)
    graph = parse(content, source)
    session = open_session(content, source)
    step = describe(session, source, state, answer, constants or {}, shapes or {})
    traced = read_onnx(graph, step)
    leaves = [
        {"name": name, "shape": leaf.of_row, "dtype": leaf.dtype}
        for name, leaf in zip(_leaf_names(step), step.leaves, strict=True)
    ]
    try:
        description = ModuleDescription.model_validate(
            {"features": step.frame.elements, "state": leaves, "form": traced.form}
        )
    except ValidationError as error:
        raise ModelError(f"{source} cannot be served: {sentences(error)}") from None
    weights = {tensor: values.reshape(-1) for tensor, values in traced.constants.items()}
    check_weights(weights, description, source)
    name = check_name(folder.resolve().name if name is None else name)
    model = Model(name, description, weights, check_output_names(list(outputs), description))
    _compare(PortableNetwork(model), session, step)
    write_model(folder, model, overwrite=overwrite)
    return model


def describe(
    session: Any,
    source: str,
    state: Mapping[str, str] | None,
    answer: str | None,
    constants: Mapping[str, float],
    shapes: Mapping[str, Extents],
) -> StepGraph:
    """Which inputs and outputs of a graph are the frame, the answer and the state; see `import_onnx`.

    Raises:
        ModelError: with what to name.
    """
    inputs, outputs = ({each.name: each for each in all_of} for all_of in (session.get_inputs(), session.get_outputs()))
    named = {
        "input": [*(state or {}), *constants, *shapes],
        "output": [*(state or {}).values(), *filter(None, [answer])],
    }
    for (what, names), there in zip(named.items(), (inputs, outputs), strict=True):
        if unknown := [name for name in names if name not in there]:
            raise ModelError(f"{source} has no {what} {unknown[0]!r:.80}; it has {', '.join(there):.300}")
    if state is None:
        candidates = [each for name, each in inputs.items() if name not in constants]
        state = _pairs(candidates, [each for name, each in outputs.items() if name != answer])
    frames = [name for name in inputs if name not in state and name not in constants]
    answers = [name for name in outputs if name not in state.values()] if answer is None else [answer]
    if not state or len(frames) != 1 or len(answers) != 1 or len({*state.values(), *answers}) <= len(state):
        found = ", ".join(f"{before}={after}" for before, after in state.items())
        raise ModelError(
            f"{source} has the inputs {', '.join(inputs):.300} and the outputs {', '.join(outputs):.300}, of which "
            f"{found or 'none'} are known to be a state: name every state with --state INPUT=OUTPUT, inputs that are "
            "always the same with --constant INPUT=NUMBER, and the answer with --answer OUTPUT, so that one input is "
            "left, which is the frame"
        )
    frame, *leaves = [_tensor(inputs[name], shapes, source) for name in (*frames, *state)]
    given = {_tensor(inputs[name], shapes, source): value for name, value in constants.items()}
    odd = [each for each in leaves if (ROWS in each.shape) != (ROWS in frame.shape)]
    before_rows = frame.shape[: frame.shape.index(ROWS)] if ROWS in frame.shape else frame.shape[:1]
    if odd or {*before_rows} - {1}:
        shown = ", ".join(f"{each.name} {_in_words(each.shape)}" for each in (frame, *leaves))
        raise ModelError(
            f"the inputs of {source} have the shapes {shown:.300}: export it with a dynamic batch in all of them "
            "(dynamic_axes or dynamic_shapes of torch.onnx.export), first of their axes in frames, or all for one row"
        )
    return StepGraph(source, frame, answers[0], dict(zip(leaves, state.values(), strict=True)), given)


def _pairs(inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, str]:
    """The inputs that have an output of the same shape and a similar name, with that output."""
    found: dict[str, str] = {}
    for each in inputs:
        keys = _keys(each.name, _BEFORE)
        shared = {
            other.name: max(map(len, keys & _keys(other.name, _AFTER)), default=0)
            for other in outputs
            if _fit(each.shape, other.shape)
        }
        most = max(shared.values(), default=0)
        fitting = [name for name, length in shared.items() if length == most > 0]
        if len(fitting) == 1 and fitting[0] not in found.values():
            found[each.name] = fitting[0]
    return found


def _fit(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether shapes are equal, as far as the graph says them."""
    both = zip(one, other, strict=False)
    return len(one) == len(other) and all(a == b for a, b in both if isinstance(a, int) and isinstance(b, int))


def _keys(name: str, affix: re.Pattern[str]) -> set[str]:
    """A name, and what it is without what marks it as an input, or as an output."""
    keys, left = set[str](), name
    while left and left.lower() not in keys:
        keys.add(left.lower())
        left = affix.sub("", left, count=1)
    return keys


def _leaf_names(step: StepGraph) -> list[str]:
    """A name for each leaf: what the names of its input and output share, in letters that a leaf's name may have."""
    names: list[str] = []
    for at, (leaf, after) in enumerate(step.state.items()):
        shared = max(_keys(leaf.name, _BEFORE) & _keys(after, _AFTER), key=len, default=leaf.name)
        name = re.sub(r"[^A-Za-z0-9_.]", "_", shared).lstrip("0123456789.")[:32]
        names.append(name if name and name not in names else f"state_{at}")
    return names


def _tensor(info: Any, shapes: Mapping[str, Extents], source: str) -> Tensor:
    given: tuple[Any, ...] = tuple(info.shape)
    shape = shapes.get(info.name, tuple(each if isinstance(each, int) else ROWS for each in given))
    if (
        len(shape) != len(given)
        or shape.count(ROWS) > 1
        or 0 in shape
        or (info.name in shapes and not {ROWS, 1} & {*shape})
    ):
        raise ModelError(
            f"input {info.name!r:.80} of {source} has the shape {_in_words(given)}: give an extent for each axis, and "
            "for the one that counts the rows of a batch `rows`, or 1 where the graph computes only one row, as in "
            f"--shape {info.name}={','.join([ROWS, *('1' * (len(given) - 2)), '40'])}"
        )
    dtype = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(info.type, info.type[7:-1])
    if dtype not in DTYPES:
        raise ModelError(
            f"input {info.name!r:.80} of {source} is {dtype:.80}: convert it to one of {', '.join(DTYPES)}"
        )
    return Tensor(info.name, shape, dtype)


def _in_words(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(extent or '?') for extent in shape)}]"


def _compare(network: RecurrentModel, session: Any, step: StepGraph) -> None:
    """Compare a step with the graph, computed by onnxruntime for random frames.

    Raises:
        ModelError: naming the output that differs most, and by how much.
    """
    random = np.random.default_rng(0)
    names = [step.answer, *step.state.values()]
    for rows, frames in _TRIALS if ROWS in step.frame.shape else _TRIALS[:1]:
        fed = {each.name: each.filled(rows, value) for each, value in step.constants.items()}
        fed |= {leaf.name: leaf.filled(rows, 0) for leaf in step.leaves}
        states = network.state.initial(rows)
        for _ in range(frames):
            x = random.standard_normal((rows, step.frame.elements)).astype(np.float32)
            fed[step.frame.name] = x.reshape(step.frame.sized(rows)).astype(step.frame.dtype)
            try:
                answer, *after = session.run(names, fed)
            except Exception as error:  # onnxruntime's errors have no common class
                raise ModelError(
                    f"onnxruntime cannot run {step.source} with {counted(rows, 'row')}, so another --shape or a "
                    f"dynamic batch is needed: {explain(error)}"
                ) from None
            fed |= {leaf.name: values for leaf, values in zip(step.leaves, after, strict=True)}
            for leaf, values in zip(step.leaves, after, strict=True):
                if values.shape != leaf.sized(rows):
                    raise ModelError(
                        f"{step.state[leaf]!r:.80} of {step.source} is {list(values.shape)}, unlike its input"
                    )
            axis = next((at for at, extent in enumerate(answer.shape) if extent == rows > 1), None)
            wanted = [_by_row(answer, axis), *map(_by_row, after, (leaf.axis for leaf in step.leaves))]
            y, states = network.step(x, states)
            for name, one, other in zip(names, [y, *unpacked(network.state, states)], wanted, strict=True):
                _check(one, other, f"output {name!r:.80} of {step.source}")
            states = network.state.pack(shaped(network.state, wanted[1:]))


def _by_row(values: Array, axis: int | None) -> Array:
    """Values [rows, elements]."""
    return values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _check(found: Array, wanted: Array, output: str) -> None:
    if found.shape != wanted.shape:
        raise ModelError(
            f"{output} has not {counted(found.shape[1], 'value')} for each row; name another with --answer"
        )
    tolerance = _TOLERANCE if wanted.dtype.kind == "f" else 0.0
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(all="ignore"):
        away = np.where((found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0, np.abs(found - wanted))
    largest = np.abs(wanted).max(initial=1, where=np.isfinite(wanted))
    worst = float(np.nan_to_num(away, nan=np.inf).max(initial=0))
    if worst > tolerance * largest:
        raise ModelError(
            f"{output} differs by {worst:.1e} from onnxruntime's, whose values reach {largest:.1e}: the results of a "
            "row may depend on the rows beside it; if they do not, please report this"
        )
