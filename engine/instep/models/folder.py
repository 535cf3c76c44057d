"""A model on disk: a folder with `model.yaml` (the description, and a name) and `weights.safetensors`.

The folder of a step also holds `normal.json`, its normal form, and `graph.json` where it came from torch.

`make_model` makes one from a description alone, `write_model` writes and `load_model` reads one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

import torch
import yaml

from instep.models.base import Description
from instep.models.errors import DESCRIPTION_FILE, ModelError, in_line, no_folder
from instep.models.model import Model, check_weights, load_weights, weights_bytes
from instep.models.module.description import MAX_JSON_BYTES, graph_text, parsed_graph
from instep.models.registry import KINDS, ModelKind, kind_of_network, parse_description
from instep_client.key_files import read_text
from instep_client.protocol.errors import InvalidInput
from instep_tools.problems import part_of

WEIGHTS_FILE: Final = "weights.safetensors"
MAX_NAME_LENGTH: Final = 100
MAX_GRAPH_BYTES: Final = 2**29
"""The size limit of an ONNX graph with its weights."""
_FILES: Final = (WEIGHTS_FILE, *(file for kind in KINDS.values() for file in kind.files))


class _ModelLoader(yaml.SafeLoader):
    """Safe YAML without aliases, because a few lines of aliases could expand to more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not used here", mark)
        return super().compose_node(parent, index)


def load_model(folder: str | Path) -> Model:
    """Read a model folder; its name is the folder's where `model.yaml` gives none.

    Raises:
        ModelError: naming the file, and the key or tensor that is wrong; or when the model is replaced meanwhile.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    if problem := no_folder(folder):
        raise ModelError(": ".join(problem))
    try:
        written_ns = _written_ns(path)
        content, _ = read_text(path)
    except (InvalidInput, OSError) as error:
        raise ModelError(
            f"{error}; a model folder holds {DESCRIPTION_FILE} and {WEIGHTS_FILE}, and instep.models.save_model or "
            "`instep model import` makes one"
        ) from None
    try:
        fields = yaml.load(content, _ModelLoader)
    except Exception as error:  # also PyYAML's own, of values that do not fit their tags, and nesting that is too deep
        raise ModelError(f"{path} is not YAML{in_line(error)}; correct it") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path} must hold the keys of a network's description, such as features and gru; add them")
    for network in _networks(fields):
        kind = KINDS.get(str(network.get("kind")))
        for name, key in kind.files.items() if kind is not None else ():
            if key == "form" and key not in network:
                raise ModelError(
                    f"{path} names no normal form, by which a step is served: make the folder again with "
                    "instep.models.export_step or `instep model import`"
                )
            if network.get(key) == name:
                network[key] = parsed_graph(graph_bytes(folder / name, MAX_JSON_BYTES), str(folder / name))
    name, outputs = fields.pop("name", folder.resolve().name), fields.pop("outputs", ())
    try:
        description = parse_description(fields)
        output_names = check_output_names(outputs, description)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    name = check_name(name, f"give one as name in {path}")
    check_regular(folder / WEIGHTS_FILE)
    weights = load_weights(folder / WEIGHTS_FILE, description) if description.tensor_shapes() else {}
    if _written_ns(path) != written_ns:
        raise ModelError(f"{folder} was written while it was read: try again")
    return Model(name, description, weights, output_names)


def graph_bytes(path: Path, most: int = MAX_GRAPH_BYTES) -> bytes:
    """Read a graph file of at most `most` bytes.

    Raises:
        ModelError: when it cannot be read, or is larger.
    """
    try:
        check_regular(path)
        if (size := path.stat().st_size) > most:
            raise ModelError(f"the graph {path} has {size:,} bytes, and at most {most:,} can be served")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read the graph {path}: {error.strerror}; put it there, or name another") from None


def check_regular(path: Path) -> None:
    """Refuse a named pipe or a device, because reading one may never end.

    Raises:
        ModelError: naming it.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ModelError(f"{path} is not a regular file: put the model's file there")


def _written_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _networks(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (fields, fields.get("network")) if isinstance(part, dict)]


def make_model(
    description: Description,
    init: Literal["random", "constant"],
    *,
    name: str,
    seed: int = 0,
    weight: float = 0.5,
    bias: float = 0.0,
) -> Model:
    """Make an untrained model.

    `random` draws as torch does for a new module (uniform in ±1/√n for n inputs of a layer, or n units of a recurrent
    one), from `seed` alone; `constant` sets every weight to `weight` and every bias to `bias`.

    Raises:
        ModelError: for a constant that is not finite, or a name that is not 1 to 100 printable characters.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = description.tensor_shapes()
    weights = {tensor_name: torch.empty(shape, dtype=torch.float32) for tensor_name, shape in shapes.items()}
    for tensor_name, tensor in weights.items():
        layer, _, kind = tensor_name.rpartition(".")
        if init == "constant":
            tensor.fill_(bias if kind.startswith("bias") else weight)
        else:
            of_layer = (shapes.get(f"{layer}.{name}") for name in ("weight", "weight_hh_l0"))
            bound = 1 / math.sqrt(next(filter(None, of_layer), shapes[tensor_name])[-1])
            tensor.uniform_(-bound, bound, generator=generator)
    check_weights(weights, description, "the initialisation")
    return Model(check_name(name), description, weights)


def write_model(folder: str | Path, model: Model, *, overwrite: bool = False) -> None:
    """Write `model.yaml`, the weights and the graph, as far as the model has them.

    Files of the replaced model that the new one does not have are removed.

    Raises:
        ModelError: when the folder contains a model and `overwrite` is not set, or cannot be written. Nothing is
            written then.
    """
    folder = Path(folder)
    fields = {"name": model.name} | model.description.as_json(defaults=False)
    files = {}
    for network in _networks(fields):
        for name, key in kind_of_network(model.description).files.items():
            if network.get(key) is not None:
                files[name], network[key] = network[key], name
    if model.output_names:
        fields["outputs"] = list(model.output_names)
    kind = kind_of_network(model.description)
    if not overwrite:
        check_free(folder, kind)
    try:
        contents = {WEIGHTS_FILE: weights_bytes(model.weights)} if model.weights else {}
        contents |= {name: graph_text(values).encode() for name, values in files.items()}
        contents[DESCRIPTION_FILE] = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).encode()
        _replace_files(folder, contents)
    except OSError as error:
        raise _not_written(folder, error) from None


def _replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace the files of another model, `DESCRIPTION_FILE` last; on failure everything stays as it was.

    Meanwhile there is no description, so no reader can mix files of two models.
    """
    if others := [file for file in (DESCRIPTION_FILE, *_FILES) if (folder / file).is_dir()]:
        raise ModelError(f"{folder / others[0]} is a folder where a model has a file; choose another place")
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    parts = {name: part_of(folder / name) for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            part.write_bytes(contents[name])
        if (folder / DESCRIPTION_FILE).exists():
            for file in (DESCRIPTION_FILE, *({*_FILES} - contents.keys())):
                (folder / file).unlink(missing_ok=True)
        for name, part in parts.items():
            part.replace(folder / name)
    except BaseException:
        for part in parts.values():
            with suppress(OSError):
                part.unlink()
        for each in absent:
            with suppress(OSError):
                each.rmdir()
        raise


def check_free(folder: Path, kind: ModelKind) -> None:
    """Refuse a folder that contains a model, or a part of one of this kind.

    Raises:
        ModelError: also when the folder cannot be read.
    """
    try:
        if any((folder / file).exists() for file in (DESCRIPTION_FILE, *(kind.files or [WEIGHTS_FILE]))):
            raise ModelError(
                f"{folder} holds a model already; choose another folder, or replace it with overwrite=True "
                "(--overwrite of a command)"
            )
    except OSError as error:
        raise _not_written(folder, error) from None


def _not_written(folder: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot write the model folder {folder}: {error.strerror}; choose another place")


def _is_name(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def check_name(name: object, cure: str = "give another, with name= in Python or --output on the command line") -> str:
    """Check the name of a model; `cure` tells the user how to give another one.

    Raises:
        ModelError: when it is not 1 to 100 printable characters.
    """
    if not _is_name(name):
        raise ModelError(
            f"a model's name must be 1 to {MAX_NAME_LENGTH} printable characters, not {name!r:.120}; {cure}"
        )
    return name


def check_output_names(names: object, description: Description) -> tuple[str, ...]:
    """Check the names of a network's outputs, in order. An empty list is valid.

    Raises:
        ModelError: unless there is one name for each output, all are different, and each has 1 to 100 printable
            characters.
    """
    if not isinstance(names, list | tuple):
        raise ModelError(f"outputs: expected a list of names, one for each output, not {names!r:.80}")
    if not names:
        return ()
    if len(names) != description.outputs:
        raise ModelError(
            f"outputs: {len(names)} names for {description.outputs} outputs; give one for each, or leave them out"
        )
    for at, name in enumerate(names):
        if not _is_name(name):
            raise ModelError(
                f"outputs: a name must be 1 to {MAX_NAME_LENGTH} printable characters, not {name!r:.120}; put it in "
                "quotes where YAML takes it for something else"
            )
        if name in names[:at]:
            raise ModelError(f"outputs: two outputs have the name {name!r}; give each its own")
    return tuple(names)
