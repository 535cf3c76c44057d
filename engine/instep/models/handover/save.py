"""`save_model`: a model folder from a trained network, in whatever form the user has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from instep.models.errors import ModelError
from instep.models.folder import write_model
from instep.models.handover.layers import Chain, Layer, RecurrentModule, activation_of, check_recurrent, kind_of
from instep.models.handover.tensors import chain_of_tensors, read_tensors
from instep.models.model import Model
from instep.models.recurrent.description import Nonlinearity

Layers: TypeAlias = Sequence[tuple[nn.Linear | nn.LayerNorm | str, object]]
"""Layers in order, each with the activation after it: a name as in `model.yaml`, or torch's module or function."""


def save_model(
    folder: str | Path,
    network: nn.Module | Mapping[str, Any] | str | Path,
    before: Layers = (),
    after: Layers = (),
    name: str | None = None,
    *,
    outputs: Sequence[str] = (),
    nonlinearity: Nonlinearity | None = None,
    leave_out: Sequence[str] = (),
    example: Any = None,
    overwrite: bool = False,
) -> Model:
    """Write a trained network as a model folder.

    `save_model(path, net)` is enough for a module whose forward runs one `nn.GRU`, `nn.LSTM` or `nn.RNN`, with Linear
    and LayerNorm layers before and after it: `torch.export` finds these, and the outputs of the resulting model are
    compared with the module's. A recurrent module by itself, a state dict or a file of weights needs `before` and
    `after` for the layers around it.

    The weights are copied. `batch_first` says nothing about the weights and is ignored, and so is `dropout`, which
    acts in training only. A batch norm is folded into the Linear before it, or becomes a dense layer.

    Args:
        folder: where to write it; made if it does not exist.
        network: the trained module, a recurrent module alone, a state dict (of tensors, or of arrays of numpy), or the
            path of a file that `torch.save` or safetensors wrote from one.
        before: each layer before the recurrent module and its activation, in order.
        after: the same for those after it.
        name: the name that clients see; the folder's name if None.
        outputs: a name for each output; none if they have no names.
        nonlinearity: for an `nn.RNN` in a state dict, which does not contain it: `tanh` or `relu`.
        leave_out: for a state dict, layers (or modules of layers) that are not served; `before` and `after` name all
            others.
        example: for a module, its input or a tuple of its arguments, if random frames are not suitable.
        overwrite: replace an existing model in the folder.

    Raises:
        ModelError: the network does something that a model folder cannot hold, weights are not finite float32, the
            folder holds a model, or it cannot be written. Nothing is written then.
    """
    if isinstance(folder, nn.Module | Mapping):
        raise ModelError("the folder comes first: save_model(folder, net)")
    folder = Path(folder)
    network, traced = _plain(network), None
    if isinstance(network, nn.Module) and (nonlinearity or leave_out):
        raise ModelError("nonlinearity and leave_out are about a state dict: hand over net.state_dict()")
    if isinstance(network, nn.Module) and not isinstance(network, RecurrentModule):
        if before or after:
            raise ModelError(
                "before and after go with a recurrent module: save_model(path, net.gru, after=[…]), not with the whole "
                f"{type(network).__name__}, of which the layers are found: save_model(path, net)"
            )
        from instep.models.handover.traced_module import TracedModule  # torch.export takes a second to import

        traced = TracedModule(network, example)
        chain = traced.chain
    elif example is not None:
        raise ModelError("example goes with a whole module: save_model(path, net, example=x); leave it out")
    elif isinstance(network, RecurrentModule):
        label = f"the {kind_of(network).upper()}"
        check_recurrent(label, network)
        chain = Chain(_layers("before", before), (label, network), _layers("after", after))
    elif isinstance(network, str | Path | Mapping):
        source = "the state dict" if isinstance(network, Mapping) else str(network)
        tensors = network if isinstance(network, Mapping) else read_tensors(Path(network))
        named_before, named_after = _named("before", before), _named("after", after)
        chain = chain_of_tensors(tensors, named_before, named_after, nonlinearity, leave_out, source)
    else:
        raise ModelError(
            f"{network!r:.80} is not a network; give the trained torch module (an object, not its class), its state "
            "dict, or a file of weights"
        )
    model = chain.model(folder.resolve().name if name is None else name, outputs)
    if traced is not None:
        traced.check(model)
    write_model(folder, model, overwrite=overwrite)
    return model


def _plain(network: Any) -> Any:
    """Unwrap a module from torch.compile and from data parallel training."""
    while isinstance(network, nn.Module):
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif hasattr(network, "_orig_mod"):
            network = network._orig_mod
        else:
            break
    return network


def _named(place: str, given: Layers) -> list[tuple[str, object]]:
    return [(name, activation) for _, name, activation in _pairs(place, given, str, '"head"')]


def _layers(place: str, given: Layers) -> list[Layer]:
    return [
        Layer(label, module, activation_of(activation, f"the activation of {label}")).checked()
        for label, module, activation in _pairs(place, given, nn.Linear | nn.LayerNorm, "linear")
    ]


def _pairs(place: str, given: Any, kind: Any, sample: str) -> Iterator[tuple[str, Any, object]]:
    """For each pair: its name in error messages, the layer and the activation. `given` has not been type-checked."""
    pairs = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for index, pair in enumerate(pairs):
        label = f"{place}[{index}]"
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], kind):
            layer = pair[0] if isinstance(pair, Sequence) and pair else pair
            raise ModelError(
                f"{label} begins with one {type(layer).__name__}: {place} must be a list of pairs of a layer and an "
                f'activation, as in {place}=[({sample}, "none")]'
            )
        yield label, *pair
