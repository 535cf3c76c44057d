"""Finding out which inputs and outputs of a step graph are the frame, the answer and the state.

State is matched by name: `h` with `hn`, `state_in` with `state_out`, `past_key` with `new_key`. Whatever is found is
tried: the graph runs with two numbers of rows, and every row must give the same in both. A graph whose shapes are all
fixed is one of a single row, and runs once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from instep.models.errors import ModelError
from instep.models.onnx.description import DTYPE_NAMES, ROWS, Extents, OnnxDescription, Tensor
from instep.models.onnx.graph import explain
from instep.models.registry import sentences

_IN: Final = "in|input|prev|previous|past|old|init|initial"
_OUT: Final = "out|output|next|new|present|updated"
_BEFORE: Final = re.compile(rf"^(?:{_IN})_|_(?:{_IN})$|(?<=[a-z])(?:In|Prev)$|_?0$")
_AFTER: Final = re.compile(rf"^(?:{_OUT})_|_(?:{_OUT})$|(?<=[a-z])(?:Out|Next|New)$|_?[nN1]$")
"""What marks the name of an input, and of an output."""
_TRIED_ROWS: Final = (3, 5)
_SAME: Final = 1e-3
"""Rows that are computed alike differ by less than this part of the largest value, whatever the order of additions."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a user says about a graph, by the names of its inputs and outputs."""

    frame: str | None = None
    answer: str | None = None
    state: Mapping[str, str] = field(default_factory=dict)
    """Inputs with the outputs that take their place in the next step; those that are not named are not state, then."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Inputs with what each of their values always is."""
    shapes: Mapping[str, Extents] = field(default_factory=dict)
    """Of inputs whose shapes the graph leaves open; without `rows` for a graph of one row."""


def pairs(inputs: Sequence[str], outputs: Sequence[str], hints: Hints) -> dict[str, str]:
    """The inputs that are state, each with the output that takes its place."""
    if hints.state:
        return dict(hints.state)
    found: dict[str, str] = {}
    for name in inputs:
        if name != hints.frame and name not in hints.constants:
            keys = _keys(name, _BEFORE)
            shared = {each: keys & _keys(each, _AFTER) for each in outputs if each != hints.answer}
            best = max((len(key) for of_output in shared.values() for key in of_output), default=0)
            fitting = [each for each, of_output in shared.items() if best and best in map(len, of_output)]
            if len(fitting) == 1 and fitting[0] not in found.values():
                found[name] = fitting[0]
    return found


def describe(session: Any, hints: Hints, source: str) -> OnnxDescription:
    """The description of a step graph, tried.

    Args:
        session: onnxruntime's.
        hints: what the user says.
        source: how sentences call the graph.

    Raises:
        ModelError: with what does not fit, and what to say about it.
    """
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = {each.name: each for each in session.get_outputs()}
    _check_shapes(hints, inputs, outputs, source)
    state = pairs(list(inputs), list(outputs), hints)
    frame = _frame(inputs, state, hints, source)
    answer = _answer(outputs, state, hints, source)
    leaves = {name: _leaf_shape(inputs[name], hints, source) for name in state}
    constants = {name: _constant_shape(inputs[name], hints, source) for name in hints.constants}
    symbols = {inputs[name].shape[shape.index(ROWS)] for name, shape in leaves.items() if ROWS in shape}
    failures = []
    for shape in _frame_shapes(inputs[frame], symbols, hints, source):
        _check_batched({frame: shape} | leaves, source)
        values = _random_inputs(inputs, {frame: shape} | leaves | constants, hints.constants)
        try:
            tried = _TRIED_ROWS if ROWS in shape else (1,)
            results = [session.run([answer, *state.values()], values(rows)) for rows in tried]
        except Exception as error:  # onnxruntime's errors have no common class
            failures.append(explain(error))
            continue
        few, many = results[0], results[-1]
        answered = _answered_shape(answer, few[0], many[0], source) if ROWS in shape else few[0].shape
        _check_leaves(state, leaves, many[1:], source)
        if ROWS in shape:
            _check_rows(few, many, [answered, *leaves.values()], source)
        shapes = {frame: shape, answer: answered} | leaves | constants
        return _description(inputs | outputs, shapes, frame, answer, state, hints.constants, source)
    if ROWS not in shape:
        raise ModelError(f"onnxruntime cannot run {source} with one row, so another --shape is needed: {failures[0]}")
    raise ModelError(
        f"{source} cannot run with {_TRIED_ROWS[0]} rows, so something in it has a fixed batch size, or --shape is "
        f"needed, with 1 in place of `rows` for every input where the graph computes only one row: {failures[0]}"
    )


def _random_inputs(
    inputs: Mapping[str, Any], shapes: Mapping[str, Extents], constants: Mapping[str, float]
) -> Callable[[int], dict[str, npt.NDArray[Any]]]:
    """Inputs for a number of rows, of which a row is the same whatever that number is."""
    random, found = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        tensor = Tensor(name, shape, DTYPE_NAMES[inputs[name].type])
        values = random.uniform(-1, 1, tensor.sized(max(_TRIED_ROWS))) if "float" in tensor.dtype else 0
        values = np.broadcast_to(constants.get(name, values), tensor.sized(max(_TRIED_ROWS)))
        found[name] = values.astype(tensor.dtype)
    axes = {name: shape.index(ROWS) for name, shape in shapes.items() if ROWS in shape}
    return lambda rows: found | {name: found[name].take(range(rows), axis) for name, axis in axes.items()}


def _keys(name: str, affix: re.Pattern[str]) -> set[str]:
    """A name, and what it is without what marks it as an input, or as an output."""
    keys, left = set[str](), name
    while left and left.lower() not in keys:
        keys.add(left.lower())
        left = affix.sub("", left, count=1)
    return keys


def check_names(hints: Hints, inputs: Sequence[str], outputs: Sequence[str], source: str) -> None:
    """Check that a graph has what hints name.

    Raises:
        ModelError: when it has not.
    """
    of_inputs = [*hints.state, *hints.constants, *hints.shapes, *([hints.frame] if hints.frame else [])]
    of_outputs = [*hints.state.values(), *([hints.answer] if hints.answer else [])]
    for what, names, there in (("input", of_inputs, inputs), ("output", of_outputs, outputs)):
        for name in names:
            if name not in there:
                raise ModelError(f"{source} has no {what} {name!r:.80}; it has {', '.join(there):.300}")


def _check_shapes(hints: Hints, inputs: Mapping[str, Any], outputs: Mapping[str, Any], source: str) -> None:
    for name, shape in hints.shapes.items():
        if len(shape) != len(inputs[name].shape) or (shape.count(ROWS) != 1 and (ROWS in shape or 1 not in shape)):
            raise ModelError(
                f"input {name!r:.80} of {source} has the shape {_in_words(inputs[name].shape)}, not "
                f"{_in_words(shape)}: give an extent for each axis, and for the one that counts the rows of a batch "
                "`rows`, or 1 where the graph computes only one row"
            )
    for what, infos in (("input", inputs), ("output", outputs)):
        for info in infos.values():
            if info.type not in DTYPE_NAMES:
                raise ModelError(
                    f"{what} {info.name!r:.80} of {source} is {info.type:.80}: expected float32, float64, int64 or "
                    "bool; convert the graph"
                )


def _frame(inputs: Mapping[str, Any], state: Mapping[str, str], hints: Hints, source: str) -> str:
    left = [name for name in inputs if name not in state and name not in hints.constants and name != hints.frame]
    open_ones = [name for name in left if not all(isinstance(extent, int) for extent in inputs[name].shape)]
    found = open_ones or [name for name in left if inputs[name].shape]  # a graph of one row leaves no shape open
    found = found if hints.frame is None else [hints.frame, *open_ones]
    if len(found) > 1:
        names = ", ".join(map(repr, found if hints.frame is None else open_ones))
        raise ModelError(
            f"{source} has inputs that are neither its frame nor match an output: {names:.300}; say which one is the "
            "frame with --frame NAME, and which output takes the place of another with --state INPUT=OUTPUT"
        )
    if not found:
        raise ModelError(
            f"every input of {source} has an output of a similar name, or is a single number, so none is the frame: "
            f"say which one is with --frame NAME; the inputs are {', '.join(inputs):.300}"
        )
    if constants := [name for name in left if name not in found]:
        raise ModelError(
            f"input {constants[0]!r:.80} of {source} has no batch dimension and matches no output: say what it always "
            f"is, as in --constant {constants[0]}=16000"
        )
    return found[0]


def _answer(outputs: Mapping[str, Any], state: Mapping[str, str], hints: Hints, source: str) -> str:
    left = [name for name in outputs if name not in state.values()]
    if hints.answer is not None:
        return hints.answer
    if not left:
        raise ModelError(
            f"every output of {source} takes the place of an input, so none is the answer: say which one is with "
            "--answer NAME"
        )
    if len(left) > 1:
        raise ModelError(
            f"{source} has several outputs besides its state, {', '.join(map(repr, left)):.300}: say which one is "
            "answered with --answer NAME, or concatenate them in the graph"
        )
    return left[0]


def _leaf_shape(info: Any, hints: Hints, source: str) -> Extents:
    if info.name in hints.shapes:
        return hints.shapes[info.name]
    dynamic = [axis for axis, extent in enumerate(info.shape) if not isinstance(extent, int)]
    if len(dynamic) > 1:
        raise ModelError(_open(info, source))
    return tuple(ROWS if axis in dynamic else extent for axis, extent in enumerate(info.shape))


def _constant_shape(info: Any, hints: Hints, source: str) -> Extents:
    if all(isinstance(extent, int) for extent in info.shape):
        return tuple(info.shape)
    return _leaf_shape(info, hints, source)


def _frame_shapes(info: Any, symbols: set[str | None], hints: Hints, source: str) -> Iterator[Extents]:
    """What the shape of the frames may be: one dynamic axis counts rows, others before the last count timesteps."""
    if info.name in hints.shapes:
        yield hints.shapes[info.name]
        return
    dynamic = [axis for axis, extent in enumerate(info.shape) if not isinstance(extent, int)]
    named = [axis for axis in dynamic if info.shape[axis] in symbols and info.shape[axis]]
    if not dynamic:
        yield tuple(info.shape)
        return
    if len(dynamic) > 1 and dynamic[-1] == len(info.shape) - 1:
        raise ModelError(_open(info, source))
    for rows in named if len(named) == 1 else dynamic:
        yield tuple(ROWS if axis == rows else 1 if axis in dynamic else each for axis, each in enumerate(info.shape))


def _check_batched(shapes: Mapping[str, Extents], source: str) -> None:
    """Check that all inputs that differ by row have an axis of rows, or none has one. The first is the frame."""
    fixed = [name for name, shape in shapes.items() if ROWS not in shape]
    shape = next(iter(shapes.values()))
    if 0 < len(fixed) < len(shapes) or (fixed and shape[:1] != (1,)):
        raise ModelError(
            f"input {fixed[0]!r:.80} of {source} has the fixed shape {_in_words(shapes[fixed[0]])}: export it with a "
            "dynamic batch dimension (dynamic_axes or dynamic_shapes of torch.onnx.export), or all inputs for one row"
        )


def _open(info: Any, source: str) -> str:
    example = ",".join([ROWS, *("1" * (len(info.shape) - 2)), "40"])
    return (
        f"input {info.name!r:.80} of {source} has the shape {_in_words(info.shape)}, which leaves more open than the "
        f"number of rows: say what it is, as in --shape {info.name}={example}"
    )


def _in_words(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(extent or '?') for extent in shape)}]"


def _answered_shape(name: str, few: npt.NDArray[Any], many: npt.NDArray[Any], source: str) -> Extents:
    extents = list(zip(few.shape, many.shape, strict=False))
    changing = [axis for axis, (one, other) in enumerate(extents) if one != other]
    if few.ndim != many.ndim or [extents[axis] for axis in changing] != [_TRIED_ROWS]:
        raise ModelError(
            f"output {name!r:.80} of {source} has the shape {list(few.shape)} for {_TRIED_ROWS[0]} rows and "
            f"{list(many.shape)} for {_TRIED_ROWS[1]}: one axis must be the number of rows; name another with --answer"
        )
    return tuple(ROWS if axis in changing else extent for axis, extent in enumerate(few.shape))


def _check_leaves(
    state: Mapping[str, str], leaves: Mapping[str, Extents], found: list[npt.NDArray[Any]], source: str
) -> None:
    for (before, after), values in zip(state.items(), found, strict=True):
        wanted = tuple(_TRIED_ROWS[1] if extent == ROWS else extent for extent in leaves[before])
        if values.shape != wanted:
            raise ModelError(
                f"a state changes its shape in {source}: {before!r:.80} is {list(wanted)}, and {after!r:.80}, which "
                f"takes its place, is {list(values.shape)}; keep its size, or pair others with --state INPUT=OUTPUT"
            )


def _check_rows(few: list[npt.NDArray[Any]], many: list[npt.NDArray[Any]], shapes: list[Extents], source: str) -> None:
    for one, other, shape in zip(few, many, shapes, strict=True):
        same = other.take(range(_TRIED_ROWS[0]), shape.index(ROWS)).astype(np.float64)
        if not np.allclose(one, same, _SAME, _SAME * float(np.abs(same).max(initial=0)), equal_nan=True):
            raise ModelError(
                f"in {source}, the results of a row depend on the rows beside it, as with a mean over the batch: "
                "streams that are served together would influence each other"
            )


def _description(
    infos: Mapping[str, Any],
    shapes: Mapping[str, Extents],
    frame: str,
    answer: str,
    state: Mapping[str, str],
    constants: Mapping[str, float],
    source: str,
) -> OnnxDescription:
    def fields(name: str) -> dict[str, Any]:
        return {"shape": shapes[name], "dtype": DTYPE_NAMES[infos[name].type]}

    names = _leaf_names(state)
    try:
        return OnnxDescription.model_validate(
            {
                "frame": {"tensor": frame, **fields(frame)},
                "answer": {"tensor": answer, **fields(answer)},
                "leaves": [
                    {"name": names[before], "input": before, "output": after, **fields(before)}
                    for before, after in state.items()
                ],
                "constants": [{"input": name, "value": value, **fields(name)} for name, value in constants.items()],
            }
        )
    except ValidationError as error:
        raise ModelError(f"{source} cannot be served: {sentences(error)}") from None


def _leaf_names(state: Mapping[str, str]) -> dict[str, str]:
    """A name for each leaf: what the names of its input and output share, in letters that a leaf's name may have."""
    names: dict[str, str] = {}
    for at, (before, after) in enumerate(state.items()):
        shared = max(_keys(before, _BEFORE) & _keys(after, _AFTER), key=len, default=before)
        name = re.sub(r"[^A-Za-z0-9_.]", "_", shared).lstrip("0123456789.")[:32]
        names[before] = name if name and name not in names.values() else f"state_{at}"
    return names
