"""The layers of a state dict, or of a file that contains one, found by the names and shapes of its tensors.

Tensors do not tell the order of the layers or their activations: the user gives those.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final, TypeAlias, TypeGuard, TypeVar
from warnings import catch_warnings

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from instep.models.errors import DESCRIPTION_FILE, ModelError, first_line
from instep.models.handover.layers import (
    RECURRENT,
    SERVED,
    Chain,
    Layer,
    RecurrentModule,
    activation_of,
    dense,
    plain_path,
)
from instep.models.recurrent.description import BIDIRECTIONAL, GruLayers, LstmLayers, Nonlinearity, RnnLayers

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Tensors by name: within a layer by their own names, over all layers by their paths."""
Module = TypeVar("Module", bound=nn.Module)
_RECURRENT: Final[dict[float, str]] = {layers.GATES: layers.NAME for layers in (GruLayers, LstmLayers, RnnLayers)}
"""Classes of recurrent modules by their number of gates."""
_FRAME_LAYERS: Final = ("Linear", "LayerNorm")
_UNKNOWN: Final = "ACTIVATION"
"""A placeholder in suggested calls. No activation has this name, so a copied call fails until it is replaced."""


def chain_of_tensors(
    given: Mapping[str, object],
    before: Sequence[tuple[str, object]],
    after: Sequence[tuple[str, object]],
    nonlinearity: Nonlinearity | None,
    leave_out: Sequence[str],
    source: str,
) -> Chain:
    """The layers of a state dict.

    Args:
        given: tensors or numpy arrays by name, as `state_dict()` returns them.
        before: name and activation of each Linear or LayerNorm before the recurrent module, in order.
        after: the same for those after it.
        nonlinearity: of an RNN.
        leave_out: names of layers, or of modules of layers, that are not served. `before` and `after` name all others.
        source: its name in error messages.

    Raises:
        ModelError: naming the layer that is missing, of another kind, or left over.
    """
    layers = _layers(_without(leave_out, _tensors(given, source), source))
    kinds = {name: _kind(tensors) for name, tensors in layers.items()}
    recurrent = [name for name, kind in kinds.items() if kind in _RECURRENT.values()]
    strange = [name for name, kind in kinds.items() if kind not in (*_FRAME_LAYERS, *_RECURRENT.values())]
    if strange or not recurrent:
        held = "; ".join(f"`{name or next(iter(layers[name]))}` is {_in_words(layers[name])}" for name in strange)
        # Without a batch norm, the outputs would mean nothing.
        can_leave_out = recurrent and not any(kinds[name] == "BatchNorm" for name in strange)
        advice = f"; to serve the network without: {_to_leave_out(strange, layers)}" if can_leave_out else ""
        raise ModelError(f"{source} cannot be served: {held or 'it has no recurrent layers'}; {SERVED}{advice}")
    if len(recurrent) > 1:
        advice = _to_leave_out(recurrent[1:], layers)
        raise ModelError(f"{source} has {len(recurrent)} recurrent modules ({', '.join(recurrent)}); {advice}")
    chain = Chain(
        [_frame_layer("before", pair, layers, source) for pair in before],
        (f"`{recurrent[0]}`", _recurrent(recurrent[0], layers[recurrent[0]], nonlinearity, source)),
        [_frame_layer("after", pair, layers, source) for pair in after],
    )
    named = {recurrent[0], *(name for name, _ in (*before, *after))}
    if left := [name for name in layers if name not in named]:
        raise ModelError(_left_over(recurrent[0], layers, left, source))
    return chain


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a file of `torch.save` (also inside a checkpoint) or a safetensors file.

    Nothing in the file is executed.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    folder = path if os.path.isdir(path) else path.parent  # Path's raises if its name is too long
    if path != Path() and os.path.exists(folder / DESCRIPTION_FILE):
        raise ModelError(f"{folder} is a model folder already: serve it as it is")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with catch_warnings(action="ignore"):  # about other forms of pickle, which it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}; name a file of weights") from None
    except Exception as error:  # torch.load raises what it happens to meet in a file of another kind
        raise ModelError(
            f"{path} is not a whole file of tensors alone ({first_line(error):.120}): make one with "
            "torch.save(net.state_dict(), path), or load it in Python, where you trust it, and call "
            "save_model(path, net)"
        ) from None
    nested = content.values() if isinstance(content, Mapping) else ()
    dicts = [each for each in (content, *nested) if _is_state_dict(each)]
    if len(dicts) != 1:
        raise ModelError(
            f"{path} holds {len(dicts) or 'no'} state dicts; save the one to serve: torch.save(net.state_dict(), path)"
        )
    return dicts[0]


def _is_state_dict(content: object) -> TypeGuard[dict[str, torch.Tensor]]:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def _tensors(given: Mapping[str, object], source: str) -> Tensors:
    found = {plain_path(str(name)): value for name, value in given.items()}
    if all(name.startswith("module.") for name in found):  # of nn.DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return {name: _tensor(name, value, source) for name, value in found.items()}


def _tensor(name: str, value: object, source: str) -> torch.Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.tensor(value)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        raise ModelError(
            f"{source} holds `{name}`, a {type(value).__name__}, which is not a dense tensor or an array of numbers; "
            "hand over float32 weights"
        )
    return value


def _without(leave_out: Sequence[str], tensors: Tensors, source: str) -> Tensors:
    parts = [".".join(path.split(".")[:depth]) for path in tensors for depth in range(1, path.count(".") + 2)]
    for name in leave_out:
        if name not in parts:
            raise ModelError(_no_layer(name, list(dict.fromkeys(parts)), source))
        tensors = {path: tensor for path, tensor in tensors.items() if not f"{path}.".startswith(f"{name}.")}
    return tensors


def _layers(tensors: Tensors) -> dict[str, Tensors]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        layer, _, name = path.rpartition(".")
        layers.setdefault(layer, {})[name] = tensor
    return dict(layers)


def _kind(tensors: Tensors) -> str:
    names = tensors.keys()
    if {"weight_ih_l0", "weight_hh_l0"} <= names and "weight_hr_l0" not in names:
        of_input, of_state = tensors["weight_ih_l0"].shape, tensors["weight_hh_l0"].shape
        if len(of_input) == len(of_state) == 2 and of_state[1]:
            return _RECURRENT.get(of_state[0] / of_state[1], "other")
    if {"weight"} <= names <= {"weight", "bias"} and tensors["weight"].ndim == 2:
        return "Linear"
    if names == {"weight", "bias"} and tensors["weight"].ndim == 1:
        return "LayerNorm"
    return "BatchNorm" if "running_mean" in names else "other"


def _in_words(tensors: Tensors) -> str:
    match _kind(tensors):
        case "GRU" | "LSTM" | "RNN" as kind:
            deep = sum(name.startswith("weight_ih_l") for name in tensors)
            layers = f" × {deep} layers" if deep > 1 else ""
            return f"{kind} {tensors['weight_ih_l0'].shape[1]}→{tensors['weight_hh_l0'].shape[1]}{layers}"
        case "Linear":
            return f"Linear {tensors['weight'].shape[1]}→{tensors['weight'].shape[0]}"
        case "LayerNorm":
            return f"LayerNorm {tensors['weight'].shape[0]}"
        case "BatchNorm":
            return "a batch norm, whose eps a state dict does not hold: hand over the module, save_model(path, net)"
        case _:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            return f"not a layer that can be served ({shapes})"


def _no_layer(name: str, names: Sequence[str], source: str) -> str:
    meant = get_close_matches(name, names, 1)
    hint = f"did you mean `{meant[0]}`?" if meant else f"it has {', '.join(f'`{each}`' for each in names)}"
    return f"{source} has no layer `{name}`; {hint}"


def _frame_layer(place: str, pair: tuple[str, object], layers: Mapping[str, Tensors], source: str) -> Layer:
    name, given = pair
    if name not in layers:
        raise ModelError(_no_layer(name, list(layers), source))
    tensors, kind = layers[name], _kind(layers[name])
    if kind not in _FRAME_LAYERS:
        raise ModelError(f"`{name}` of {source} is not a Linear or LayerNorm: it is {_in_words(tensors)}")
    activation = activation_of(given, f"the activation of `{name}` in {place}")
    if kind == "Linear":
        return Layer(f"`{name}`", dense(tensors["weight"], tensors.get("bias")), activation)
    norm = nn.LayerNorm(len(tensors["weight"]), device="meta")  # whose eps no state dict holds
    return Layer(f"`{name}`", _loaded(name, norm, tensors), activation)


def _recurrent(name: str, tensors: Tensors, nonlinearity: Nonlinearity | None, source: str) -> RecurrentModule:
    kind = _kind(tensors)
    if "weight_ih_l0_reverse" in tensors:
        raise ModelError(BIDIRECTIONAL.format(kind))
    if (kind == "RNN") != (nonlinearity is not None):
        raise ModelError(
            f'`{name}` of {source} is an {kind}: nonlinearity="tanh" or "relu" in Python goes with an RNN, whose '
            "weights do not tell, and with nothing else"
        )
    layers = sum(each.startswith("weight_ih") for each in tensors)
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    inputs, hidden = tensors["weight_ih_l0"].shape[1], tensors["weight_hh_l0"].shape[1]
    made = RECURRENT[kind.lower()](inputs, hidden, layers, bias="bias_ih_l0" in tensors, device="meta", **options)
    return _loaded(name, made, tensors)


def _loaded(name: str, module: Module, tensors: Tensors) -> Module:
    try:
        module.requires_grad_(False).load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ModelError(f"`{name}` is not whole: {' '.join(str(error).split())}") from None
    return module


def _to_leave_out(names: Sequence[str], layers: Mapping[str, Tensors]) -> str:
    given = [each for name in names for each in ([name] if name else layers[name])]
    python = f"leave_out=[{', '.join(map(json.dumps, given))}]"
    return f"{python}, or{''.join(f' --leave-out {name}' for name in given)} on the command line"


def _left_over(recurrent: str, layers: Mapping[str, Tensors], left: Sequence[str], source: str) -> str:
    """Advice about layers that the call does not name; if it names none at all, a call to copy."""
    if len(left) < len(layers) - 1:
        words = ", ".join(f"`{name}` ({_in_words(layers[name])})" for name in left)
        advice = _to_leave_out(left, layers)
        return f"{source} also has {words}: name each in before or after, or leave it out: {advice}"
    order = list(layers)
    python, command = "", ""
    for place in ("before", "after"):
        names = [name for name in left if (order.index(name) < order.index(recurrent)) == (place == "before")]
        pairs = ", ".join(f'("{name}", "{_UNKNOWN}")' for name in names)
        python += f", {place}=[{pairs}]" if names else ""
        command += "".join(f" --{place} {name}:{_UNKNOWN}" for name in names)
    words = ", ".join(f"`{name}` ({_in_words(tensors)})" for name, tensors in layers.items())
    return (
        f"{source} has {words}; weights do not say in which order layers run and with which activations: "
        f"save_model(path, weights{python}), or{command} on the command line"
    )
