"""The kinds of models: for each its name, the class of its descriptions, and the ways to build and check it.

A description needs no torch, so that a command can check a configuration without the two seconds that importing torch
takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from instep.models.base import Description, RecurrentModel, Reference
from instep.models.errors import ModelError
from instep.models.module.description import ModuleDescription
from instep.models.pipeline import PipelineDescription, form_of, forward_of, reference_of
from instep.models.recurrent.description import DESCRIPTIONS as RECURRENT
from instep.models.recurrent.normal import form_of as recurrent_form
from instep.models.recurrent.reference import RecurrentReference

if TYPE_CHECKING:
    import numpy as np
    import torch

    from instep.models.model import Model
    from instep.models.portable.form import Form
    from instep.models.torch_network import Forward, TorchNetwork

DEFAULT_KIND: Final = "gru"
_MOST_CLAUSES: Final = 12
"""The most clauses in a sentence about a description, because a graph may have thousands of errors."""


@dataclass(frozen=True, slots=True)
class ModelKind:
    """One kind of model. Everything except the description is imported on first use."""

    parse: Callable[[Mapping[str, Any]], Description]
    """Parse a description's fields. Raises pydantic's ValidationError, which names each invalid field."""
    normal_form: Callable[[Any], Form]
    """The normal form of a description."""
    forward: Callable[[Model, torch.device], Forward | None]
    """The model as a module of torch, if there is one."""
    reference: Callable[[Model, type[np.floating[Any]]], Reference | None]
    """See `RecurrentModel.reference`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """JSON files next to `model.yaml`, and the fields of the description that each contains."""


def _recurrent_forward(model: Model, device: torch.device) -> Forward:
    from instep.models.recurrent.module import RecurrentModule

    return RecurrentModule(model, device)


def _recurrent_reference(model: Model, dtype: type[np.floating[Any]]) -> Reference:
    weights = {name: tensor.numpy() for name, tensor in model.weights.items()}
    return RecurrentReference(model.description.as_json(), weights, dtype)


def _step_forward(model: Model, device: torch.device) -> Forward | None:
    from instep.models.module.program import GraphModule

    assert isinstance(model.description, ModuleDescription)
    return None if model.description.graph is None else GraphModule(model, device)


def _step_reference(model: Model, dtype: type[np.floating[Any]]) -> Reference:
    from instep.models.network import DefinitionReference
    from instep.models.portable.compiler import as_arrays

    assert isinstance(model.description, ModuleDescription)
    return DefinitionReference(model.description.form, as_arrays(model.weights), model.state, dtype)


KINDS: Final[dict[str, ModelKind]] = {
    **{
        kind: ModelKind(each.model_validate, recurrent_form, _recurrent_forward, _recurrent_reference)
        for kind, each in RECURRENT.items()
    },
    "module": ModelKind(
        ModuleDescription.model_validate,
        lambda description: description.form,
        _step_forward,
        _step_reference,
        {"normal.json": "form", "graph.json": "graph"},
    ),
    "pipeline": ModelKind(PipelineDescription.model_validate, form_of, forward_of, reference_of),
}


def parse_description(fields: Mapping[str, Any]) -> Description:
    """Parse the keys of `model.yaml` or of a recording's header; `kind` selects the kind of model.

    Raises:
        ModelError: naming each invalid field.
    """
    kind = fields.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelError(f"kind: there is no kind of model {kind!r:.80}; expected {', '.join(KINDS)}")
    try:
        return KINDS[kind].parse(fields)
    except ValidationError as error:
        raise ModelError(sentences(error)) from None


def kind_of_network(description: Description) -> ModelKind:
    """The kind of a network; for a pipeline, of the network inside it."""
    network = description.network if isinstance(description, PipelineDescription) else description
    return KINDS[network.kind]


def normal_form(description: Description) -> Form:
    """The normal form of a network."""
    return KINDS[description.kind].normal_form(description)


def reference(model: Model, dtype: type[np.floating[Any]]) -> Reference | None:
    """See `RecurrentModel.reference`."""
    return KINDS[model.description.kind].reference(model, dtype)


def torch_network(model: Model, device: torch.device) -> TorchNetwork | None:
    """The model in torch's operators; None if it was not made from torch.

    Raises:
        ModelError: when a graph cannot be computed here.
    """
    from instep.models.torch_network import TorchNetwork

    forward = KINDS[model.description.kind].forward(model, device)
    return None if forward is None else TorchNetwork(model, device, forward)


def build(model: Model, device: torch.device) -> RecurrentModel:
    """Build the model on a device, ready to step. A model that was not made from torch is always on the CPU.

    Raises:
        ModelError: when it cannot be computed here.
    """
    from instep.models.network import PortableNetwork

    network = torch_network(model, device) if device.type != "cpu" else None
    return PortableNetwork(model) if network is None else network


def sentences(error: ValidationError) -> str:
    """Pydantic's errors as text, one clause for each field."""
    problems = [(".".join(map(str, problem["loc"])), in_words(problem)) for problem in error.errors()]
    clauses = [f"{place:.120}: {what}" if place else what for place, what in problems]
    left_out = [f"and {len(clauses) - _MOST_CLAUSES:,} more"] if len(clauses) > _MOST_CLAUSES else []
    return "; ".join([*clauses[:_MOST_CLAUSES], *left_out])


def in_words(problem: ErrorDetails) -> str:
    """The problem of a field and its cure."""
    match problem["type"]:
        case "missing":
            return "it is missing; add it"
        case "extra_forbidden":
            return "there is no such key; correct it, or leave it out"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
        case _:
            return problem["msg"].replace("Input should", f"{problem['input']!r:.80} is wrong, it should")
