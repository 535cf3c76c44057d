"""The layers of a state dict, or of a file that holds one: the names of its tensors and their shapes say what they are.

They do not say in which order the layers run, nor with which activations, so these have to be told.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Final, TypeAlias, TypeGuard
from warnings import catch_warnings
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from instep.models.errors import ModelError
from instep.models.folder import DESCRIPTION_FILE, GRAPHS, WEIGHTS_FILE
from instep.models.handover.layers import SERVED, Chain, FrameLayer, Recurrent, dense, layer_norm
from instep.models.handover.tracer import activation_of, plain_path
from instep.models.recurrent.description import (
    BIDIRECTIONAL,
    GruLayers,
    LstmLayers,
    Nonlinearity,
    RnnLayers,
)

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Tensors by their names: those of one layer by their own ones, all of them by their paths."""
_RECURRENT: Final[dict[float, str]] = {layers.GATES: layers.NAME for layers in (GruLayers, LstmLayers, RnnLayers)}
"""By how many gates a module has."""
_FRAME_LAYERS: Final = ("Linear", "LayerNorm")
_UNKNOWN: Final = "ACTIVATION"
"""In a call to copy: no activation has this name, so that none is chosen by mistake."""
_DEFAULT_EPS: Final = 1e-5
"""Torch's default for an nn.LayerNorm: a state dict does not hold it."""
_NO_WEIGHTS: Final = "{} is {}: make one with torch.save(net.state_dict(), path)"


def chain_of_tensors(
    given: Mapping[str, object],
    before: Sequence[tuple[str, object]],
    after: Sequence[tuple[str, object]],
    recurrent: str | None,
    nonlinearity: Nonlinearity | None,
    leave_out: Sequence[str],
    source: str,
) -> Chain:
    """The layers of a state dict.

    Args:
        given: tensors by name, as `state_dict()` gives them.
        before: name and activation of each Linear or LayerNorm before the recurrent module, in order.
        after: the same for those after it.
        recurrent: the recurrent module's name; None if there is only one.
        nonlinearity: of an RNN.
        leave_out: names of layers, or of modules that hold some, which are not served. Every other one is named above.
        source: how sentences call it.

    Raises:
        ModelError: naming the layer that is missing, of another kind, or left over.
    """
    layers = _layers(_without(leave_out, _tensors(given, source), source))
    candidates = [name for name, tensors in layers.items() if _kind(tensors) in _RECURRENT.values()]
    if recurrent is not None:
        found = _find(recurrent, layers, "a GRU, LSTM or RNN", tuple(_RECURRENT.values()), source)
    elif len(candidates) == 1:
        (found,) = candidates
    elif candidates:
        raise ModelError(
            f"{source} has {len(candidates)} recurrent modules ({', '.join(candidates)}); name the one to serve: "
            f'recurrent="{candidates[0]}", or --recurrent {candidates[0]} on the command line'
        )
    else:
        others = [_told(name, tensors) for name, tensors in layers.items() if _kind(tensors) not in _FRAME_LAYERS]
        raise ModelError(f"{source} has no GRU, LSTM or RNN{': ' if others else ''}{', '.join(others)}; {SERVED}")
    chain = Chain(
        [_frame_layer("before", pair, layers, source) for pair in before],
        _recurrent(found, layers[found], nonlinearity, source),
        [_frame_layer("after", pair, layers, source) for pair in after],
    )
    named = {found, *(name for name, _ in (*before, *after))}
    left = {name: tensors for name, tensors in layers.items() if name not in named}
    if left:
        raise ModelError(_left_over(found, layers, left, source))
    return chain


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file: of `torch.save`, also inside a checkpoint, or safetensors.

    Nothing in the file is executed.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    if path.suffix in GRAPHS:
        raise ModelError(f"{path} {GRAPHS[path.suffix]}")
    is_folder = os.path.isdir(path)  # Path's raises if its name is too long
    folder = path if is_folder else path.parent
    if path in (folder, folder / WEIGHTS_FILE, folder / DESCRIPTION_FILE) and (folder / DESCRIPTION_FILE).exists():
        raise ModelError(f"{folder} is a model folder already: there is nothing to import; serve it as it is")
    if is_folder:
        raise ModelError(f"{path} is a folder: name a file of weights in it, or an .onnx graph")
    if _is_cut_short(path):
        raise ModelError(f"{path} is damaged or cut short: copy it again, or save the weights again")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with catch_warnings(action="ignore"):  # about other forms of pickle, which it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror or error}; name a file that torch.save(net.state_dict(), path) or "
            "safetensors wrote"
        ) from None
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); save the weights again") from None
    except pickle.UnpicklingError:
        if not path.read_bytes().startswith((b"PK", b"\x80")):  # of torch.save, since 1.6 and before
            raise ModelError(_NO_WEIGHTS.format(path, "not a file of weights")) from None
        raise ModelError(
            f"{path} holds more than tensors, such as a whole module, and reading that would run code from the file: "
            "where you trust it, load it in Python and call save_model(path, net), or save net.state_dict()"
        ) from None
    except Exception as error:  # torch.load raises what it happens to meet in a file of another kind
        kind = "a TorchScript archive" if "TorchScript" in str(error) else "not a file of weights"
        raise ModelError(_NO_WEIGHTS.format(path, kind)) from None
    return _state_dict(content, path)


def _is_cut_short(path: Path) -> bool:
    """Whether a file of `torch.save` begins as a zip archive, whose directory at the end is missing."""
    with suppress(OSError), path.open("rb") as file:  # whoever reads it says why it cannot be read
        return file.read(4) == b"PK\x03\x04" and not is_zipfile(path)
    return False


def _state_dict(content: object, path: Path) -> dict[str, torch.Tensor]:
    """The state dict that was saved, or the one inside a checkpoint."""
    if _is_state_dict(content):
        return content
    inside = {}
    if isinstance(content, Mapping):
        inside = {str(key): value for key, value in content.items() if _is_state_dict(value)}
    if len(inside) == 1:
        return next(iter(inside.values()))
    if inside:
        raise ModelError(f"{path} holds {len(inside)} state dicts ({', '.join(inside)}); save the one to serve alone")
    raise ModelError(f"{path} holds no state dict; make one with torch.save(net.state_dict(), path)")


def _is_state_dict(content: object) -> TypeGuard[dict[str, torch.Tensor]]:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def _tensors(given: Mapping[str, object], source: str) -> Tensors:
    """All tensors, by their paths in the network."""
    names = {plain_path(str(name)): name for name in given}
    if all(name.startswith("module.") for name in names):  # of nn.DataParallel
        names = {name.removeprefix("module."): key for name, key in names.items()}
    found = {}
    for name, key in names.items():
        tensor = given[key]
        if not isinstance(tensor, torch.Tensor):
            quantised = "quantised weights" if "packed" in name or "_all_weight" in name else type(tensor).__name__
            raise ModelError(
                f"{source} holds `{name}`, which is {quantised} and not a tensor; hand over float32 weights"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            form = "on the meta device, without values" if tensor.is_meta else "sparse"
            raise ModelError(f"{source} holds `{name}`, which is {form}; hand over dense float32 weights")
        found[name] = tensor
    return found


def _without(leave_out: Sequence[str], tensors: Tensors, source: str) -> Tensors:
    """The tensors that are not these, nor inside one of these."""
    parts = [".".join(path.split(".")[:depth]) for path in tensors for depth in range(1, path.count(".") + 2)]
    for name in leave_out:
        if name not in parts:
            raise ModelError(_no_layer(name, list(dict.fromkeys(parts)), source))
        tensors = {path: tensor for path, tensor in tensors.items() if not f"{path}.".startswith(f"{name}.")}
    return tensors


def _layers(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors of each layer, by its name and theirs."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        layer, _, name = path.rpartition(".")
        layers.setdefault(layer, {})[name] = tensor
    return dict(layers)


def _kind(tensors: Tensors) -> str:
    """What a layer is by its tensors."""
    names = tensors.keys()
    if {"weight_ih_l0", "weight_hh_l0"} <= names:
        if "weight_hr_l0" in names:
            return "LSTM with projections"
        of_input, of_state = tensors["weight_ih_l0"].shape, tensors["weight_hh_l0"].shape
        if len(of_input) == len(of_state) == 2 and of_state[1]:
            return _RECURRENT.get(of_state[0] / of_state[1], "other")
        return "other"
    if "weight_ih" in names:
        return "cell"
    if {"weight"} <= names <= {"weight", "bias"} and tensors["weight"].ndim == 2:
        return "Linear"
    if names == {"weight", "bias"} and tensors["weight"].ndim == 1:
        return "LayerNorm"
    return "BatchNorm" if "running_mean" in names else "other"


def _in_words(tensors: Tensors) -> str:
    """A layer and its sizes."""
    match _kind(tensors):
        case "GRU" | "LSTM" | "RNN" as kind:
            deep = sum(name.startswith("weight_ih_l") for name in tensors)
            layers = f" × {deep} layers" if deep > 1 else ""
            return f"{kind} {tensors['weight_ih_l0'].shape[1]}→{tensors['weight_hh_l0'].shape[1]}{layers}"
        case "Linear":
            return f"Linear {tensors['weight'].shape[1]}→{tensors['weight'].shape[0]}"
        case "LSTM with projections":
            return "an LSTM with projections, which cannot be served: train one with proj_size=0"
        case "LayerNorm":
            return f"LayerNorm {tensors['weight'].shape[0]}"
        case "cell":
            return "one step of a recurrent network, such as an nn.GRUCell: copy its weights to an nn.GRU"
        case "BatchNorm":
            return "a batch norm, whose eps a state dict does not hold: hand over the module, save_model(path, net)"
        case _:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            return f"not a layer that can be served yet ({shapes})"


def _told(name: str, tensors: Tensors) -> str:
    return f"`{name or next(iter(tensors))}` is {_in_words(tensors)}"


def _find(name: str, layers: Mapping[str, Tensors], wanted: str, kinds: Sequence[str], source: str) -> str:
    """A layer's name, checked to be of a kind that is wanted."""
    if name in layers and _kind(layers[name]) in kinds:
        return name
    if name in layers:
        raise ModelError(f"`{name}` of {source} is not {wanted}: it is {_in_words(layers[name])}")
    raise ModelError(_no_layer(name, list(layers), source))


def _no_layer(name: str, names: Sequence[str], source: str) -> str:
    meant = get_close_matches(name, names, 1)
    hint = f"did you mean `{meant[0]}`?" if meant else f"it has {', '.join(f'`{each}`' for each in names)}"
    return f"{source} has no layer `{name}`; {hint}"


def _frame_layer(place: str, pair: tuple[str, object], layers: Mapping[str, Tensors], source: str) -> FrameLayer:
    name, given = pair
    tensors = layers[_find(name, layers, "a Linear or LayerNorm", _FRAME_LAYERS, source)]
    activation = activation_of(given, f"the activation of `{name}` in {place}")
    weight, bias = tensors["weight"], tensors.get("bias")
    if _kind(tensors) == "Linear":
        return dense(f"`{name}`", weight, bias, activation)
    return layer_norm(f"`{name}`", len(weight), _DEFAULT_EPS, weight, bias, activation)


def _recurrent(name: str, tensors: Tensors, nonlinearity: Nonlinearity | None, source: str) -> Recurrent:
    kind = _kind(tensors)
    if "weight_ih_l0_reverse" in tensors:
        raise ModelError(BIDIRECTIONAL.format(kind))
    label = f"`{name}`" if name else f"the {kind}"
    if kind != "RNN":
        if nonlinearity is not None:
            raise ModelError(f"{label} of {source} is a {kind}, which has no nonlinearity to choose: leave it out")
        return Recurrent(label, kind.lower(), tensors)
    if nonlinearity is None:
        raise ModelError(
            f"{label} of {source} is an RNN, and weights do not say whether its nonlinearity is tanh or relu: "
            'nonlinearity="tanh", or --nonlinearity tanh on the command line'
        )
    return Recurrent(label, "rnn", tensors, {"nonlinearity": nonlinearity})


def _left_over(recurrent: str, layers: Mapping[str, Tensors], left: Mapping[str, Tensors], source: str) -> str:
    """What to do about layers that nobody named."""
    strange = {name: tensors for name, tensors in left.items() if _kind(tensors) not in _FRAME_LAYERS}
    names = [each for name, tensors in (strange or left).items() for each in ([name] if name else tensors)]
    python = f"leave_out=[{', '.join(map(json.dumps, names))}]"
    leave_out = f"{python}, or{''.join(f' --leave-out {name}' for name in names)} on the command line"
    if strange:
        held = "; ".join(_told(name, tensors) for name, tensors in strange.items())
        advice = f"to serve the network without: {leave_out}"
        if any(_kind(tensors) == "BatchNorm" for tensors in strange.values()):
            return f"{source} cannot be served as it is: {held}"  # without it, the outputs would mean nothing
        return f"{source} cannot be served as it is: {held}; {SERVED}; {advice}"
    words = ", ".join(f"`{name}` ({_in_words(tensors)})" for name, tensors in left.items())
    if len(left) < len(layers) - 1:
        return f"{source} also has {words}: name each in before or after, or leave it out: {leave_out}"
    order = list(layers)
    places = {name: "before" if order.index(name) < order.index(recurrent) else "after" for name in left}
    python, command = "", ""
    for place in ("before", "after"):
        names = [name for name in left if places[name] == place]
        pairs = ", ".join(f'("{name}", "{_UNKNOWN}")' for name in names)
        python += f", {place}=[{pairs}]" if names else ""
        command += "".join(f" --{place} {name}:{_UNKNOWN}" for name in names)
    words = ", ".join(f"`{name}` ({_in_words(tensors)})" for name, tensors in layers.items())
    return (
        f"{source} has {words}; weights do not say in which order layers run and with which activations: "
        f"save_model(path, weights{python}), or{command} on the command line"
    )
