"""The layers of a state dict, or of a file that holds one: the names of its tensors and their shapes say what they are.

They do not say in which order the layers run, nor with which activations, so these have to be told.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final, TypeAlias, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from instep.models.errors import ModelError
from instep.models.folder import GRAPHS
from instep.models.handover.layers import SERVED, Chain, Dense, Gru
from instep.models.handover.tracer import activation_of, plain_path
from instep.models.recurrent.description import BIDIRECTIONAL

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Those of one layer, by their own names."""
_RECURRENT: Final[dict[float, str]] = {1: "nn.RNN", 3: "GRU", 4: "nn.LSTM"}
"""By how many gates a layer has."""


def chain_of_tensors(
    given: Mapping[str, object],
    before: Sequence[tuple[str, object]],
    after: Sequence[tuple[str, object]],
    gru: str | None,
    source: str,
) -> Chain:
    """The layers of a state dict.

    Args:
        given: tensors by name, as `state_dict()` gives them.
        before: name and activation of each Linear before the GRU, in order.
        after: the same for those after it.
        gru: the GRU's name, which leaves everything out that is not named; None if there is only one, and everything
            else is named.
        source: how sentences call it.

    Raises:
        ModelError: naming the layer that is missing, of another kind, or left over.
    """
    layers = _layers(given, source)
    grus = [name for name, tensors in layers.items() if _kind(tensors) == "GRU"]
    if gru is not None:
        found = _find(gru, layers, "a GRU", source)
    elif len(grus) == 1:
        (found,) = grus
    elif grus:
        raise ModelError(
            f'{source} has {len(grus)} GRUs ({", ".join(grus)}); name the one to serve: gru="{grus[0]}", or --gru '
            f"{grus[0]} on the command line"
        )
    else:
        others = [_told(name, tensors) for name, tensors in layers.items() if not _is_linear(tensors)]
        raise ModelError(f"{source} has no GRU{': ' if others else ''}{', '.join(others)}; train a torch.nn.GRU")
    if "weight_ih_l0_reverse" in layers[found]:
        raise ModelError(BIDIRECTIONAL)
    chain = Chain(
        [_dense("before", pair, layers, source) for pair in before],
        Gru(f"`{found}`" if found else "the GRU", layers[found]),
        [_dense("after", pair, layers, source) for pair in after],
    )
    named = {found, *(name for name, _ in (*before, *after))}
    left = {name: tensors for name, tensors in layers.items() if name not in named}
    if left and gru is None:
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
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror or error}; name a file that torch.save(net.state_dict(), path) or "
            "safetensors wrote"
        ) from None
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); save the weights again") from None
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than tensors, such as a whole module, and reading that would run code from the file: "
            "where you trust it, load it in Python and call save_model(path, net), or save net.state_dict()"
        ) from None
    except Exception as error:  # torch.load raises what it happens to meet in a file of another kind
        kind = "a TorchScript archive" if "TorchScript" in str(error) else "not a file of weights"
        raise ModelError(f"{path} is {kind}: make one with torch.save(net.state_dict(), path)") from None
    return _state_dict(content, path)


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


def _layers(given: Mapping[str, object], source: str) -> dict[str, Tensors]:
    """The tensors of each layer, by its name and theirs."""
    names = {plain_path(str(name)): name for name in given}
    if all(name.startswith("module.") for name in names):  # of nn.DataParallel
        names = {name.removeprefix("module."): key for name, key in names.items()}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, key in names.items():
        tensor = given[key]
        layer, _, kind = name.rpartition(".")
        if not isinstance(tensor, torch.Tensor):
            quantised = "quantised weights" if "packed" in name or "_all_weight" in name else type(tensor).__name__
            raise ModelError(
                f"{source} holds `{name}`, which is {quantised} and not a tensor; hand over float32 weights"
            )
        layers.setdefault(layer, {})[kind] = tensor
    return dict(layers)


def _kind(tensors: Tensors) -> str:
    """What a layer is by its tensors."""
    names = tensors.keys()
    if {"weight_ih_l0", "weight_hh_l0"} <= names:
        of_input, of_state = tensors["weight_ih_l0"].shape, tensors["weight_hh_l0"].shape
        if len(of_input) == len(of_state) == 2 and of_state[1]:
            return _RECURRENT.get(of_state[0] / of_state[1], "other")
        return "other"
    if "weight_ih" in names:
        return "cell"
    if _is_linear(tensors):
        return "Linear"
    return "BatchNorm" if "running_mean" in names else "other"


def _is_linear(tensors: Tensors) -> bool:
    return {"weight"} <= tensors.keys() <= {"weight", "bias"} and tensors["weight"].ndim == 2


def _in_words(tensors: Tensors) -> str:
    """A layer and its sizes."""
    match _kind(tensors):
        case "GRU":
            return f"GRU {tensors['weight_ih_l0'].shape[1]}→{tensors['weight_hh_l0'].shape[1]}"
        case "Linear":
            return f"Linear {tensors['weight'].shape[1]}→{tensors['weight'].shape[0]}"
        case "nn.LSTM" | "nn.RNN" as kind:
            return f"an {kind}, which cannot be served yet"
        case "cell":
            return "one step of a recurrent network, such as an nn.GRUCell: copy its weights to an nn.GRU"
        case "BatchNorm":
            return "a batch norm, whose eps a state dict does not hold: hand over the module, save_model(path, net)"
        case _:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            return f"no Linear and no GRU ({shapes}), and cannot be served yet"


def _told(name: str, tensors: Tensors) -> str:
    return f"`{name or next(iter(tensors))}` is {_in_words(tensors)}"


def _find(name: str, layers: Mapping[str, Tensors], wanted: str, source: str) -> str:
    """A layer's name, checked to be of the kind that is wanted."""
    kind = wanted.split()[1]
    if name in layers and _kind(layers[name]) == kind:
        return name
    if name in layers:
        raise ModelError(f"`{name}` of {source} is not {wanted}: it is {_in_words(layers[name])}")
    meant = get_close_matches(name, layers, 1)
    hint = f"did you mean `{meant[0]}`?" if meant else f"it has {', '.join(f'`{each}`' for each in layers)}"
    raise ModelError(f"{source} has no layer `{name}`; {hint}")


def _dense(place: str, pair: tuple[str, object], layers: Mapping[str, Tensors], source: str) -> Dense:
    name, activation = pair
    tensors = layers[_find(name, layers, "a Linear", source)]
    return Dense(
        f"`{name}`",
        tensors["weight"],
        tensors.get("bias"),
        activation_of(activation, f"the activation of `{name}` in {place}"),
    )


def _left_over(gru: str, layers: Mapping[str, Tensors], left: Mapping[str, Tensors], source: str) -> str:
    """What to do about layers that nobody named."""
    strange = [_told(name, tensors) for name, tensors in left.items() if not _is_linear(tensors)]
    if strange:
        return (
            f"{source} cannot be served as it is: {'; '.join(strange)}; {SERVED}. To serve the named layers without "
            f'the rest, name the GRU too: gru="{gru}", or --gru {gru} on the command line'
        )
    linears = {name: tensors for name, tensors in layers.items() if _is_linear(tensors)}
    order = list(layers)
    places = {name: "before" if order.index(name) < order.index(gru) else "after" for name in linears}
    python, command = "", ""
    for place in ("before", "after"):
        names = [name for name in linears if places[name] == place]
        pairs = ", ".join(f'("{name}", "none")' for name in names)
        python += f", {place}=[{pairs}]" if names else ""
        command += "".join(f" --{place} {name}:none" for name in names)
    words = ", ".join(f"`{name}` ({_in_words(tensors)})" for name, tensors in layers.items())
    return (
        f"{source} has {words}; weights do not say in which order layers run and with which activations: "
        f"save_model(path, weights{python}), or{command} on the command line"
    )
