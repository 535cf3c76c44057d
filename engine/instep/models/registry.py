"""The kinds of models: a name, the class of their descriptions, and the function that puts one on a device.

A description needs no torch, so that a command can check a configuration without the two seconds that importing torch
takes; `build` imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from instep.models.base import Description, RecurrentModel
from instep.models.errors import ModelError
from instep.models.module.description import ModuleDescription
from instep.models.onnx.description import OnnxDescription
from instep.models.pipeline.description import PipelineDescription
from instep.models.recurrent.description import DESCRIPTIONS as RECURRENT

if TYPE_CHECKING:
    import torch

    from instep.models.model import Model

DEFAULT_KIND: Final = "gru"
_MOST_CLAUSES: Final = 12
"""Of a sentence about a description: a graph may be wrong in thousands of places."""


@dataclass(frozen=True, slots=True)
class ModelKind:
    """One kind of model."""

    parse: Callable[[Mapping[str, Any]], Description]
    """Reads a description's fields. Raises pydantic's ValidationError, which names each field that is wrong."""
    build: Callable[[Model, torch.device], RecurrentModel]
    """Puts a model on a device."""
    graph_file: str = ""
    """The file beside `model.yaml` that holds the network's graph; empty where there is none."""

    @property
    def graph_is_field(self) -> bool:
        """Whether that file is JSON, the field `graph` of the description; otherwise its bytes are `Model.graph`."""
        return self.graph_file.endswith(".json")


def _network(module: str, name: str) -> Callable[[Model, torch.device], RecurrentModel]:
    """A class of `instep.models` that is imported when it is called."""

    def build(model: Model, device: torch.device) -> RecurrentModel:
        network: RecurrentModel = getattr(import_module(f"instep.models.{module}"), name)(model, device)
        return network

    return build


KINDS: Final[dict[str, ModelKind]] = {
    **{
        kind: ModelKind(each.model_validate, _network("recurrent.network", "RecurrentNetwork"))
        for kind, each in RECURRENT.items()
    },
    "module": ModelKind(ModuleDescription.model_validate, _network("module.network", "ModuleNetwork"), "graph.json"),
    "pipeline": ModelKind(PipelineDescription.model_validate, _network("pipeline.network", "PipelineNetwork")),
    "onnx": ModelKind(OnnxDescription.model_validate, _network("onnx.network", "OnnxNetwork"), "graph.onnx"),
}


def parse_description(fields: Mapping[str, Any]) -> Description:
    """A description from the keys of `model.yaml` or of a recording's header; `kind` says how to read the others.

    Raises:
        ModelError: naming each field that is wrong.
    """
    kind = fields.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelError(f"kind: there is no kind of model {kind!r:.80}; expected {', '.join(KINDS)}")
    try:
        return KINDS[kind].parse(fields)
    except ValidationError as error:
        raise ModelError(sentences(error)) from None


def kind_of_network(description: Description) -> ModelKind:
    """The kind of a network; of the one inside a pipeline."""
    network = description.network if isinstance(description, PipelineDescription) else description
    return KINDS[network.kind]


def build(model: Model, device: torch.device) -> RecurrentModel:
    """The model on a device, ready to certify and to step; a kind may know only the CPU, and is there then.

    Raises:
        ModelError: when a graph cannot be computed here.
    """
    return KINDS[model.description.kind].build(model, device)


def sentences(error: ValidationError) -> str:
    """Pydantic's errors, one clause for each field."""
    problems = [(".".join(map(str, problem["loc"])), in_words(problem)) for problem in error.errors()]
    clauses = [f"{place:.120}: {what}" if place else what for place, what in problems]
    left_out = [f"and {len(clauses) - _MOST_CLAUSES:,} more"] if len(clauses) > _MOST_CLAUSES else []
    return "; ".join([*clauses[:_MOST_CLAUSES], *left_out])


def in_words(problem: ErrorDetails) -> str:
    """What is wrong with a field, and what to do."""
    match problem["type"]:
        case "missing":
            return "it is missing; add it"
        case "extra_forbidden":
            return "there is no such key; correct it, or leave it out"
        case "value_error":
            return problem["msg"].removeprefix("Value error, ")
        case _:
            return problem["msg"].replace("Input should", f"{problem['input']!r:.80} is wrong, it should")
