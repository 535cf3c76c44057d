"""The commands `instep model`, as typed: make a model folder, import one, check it, look into it."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from instep_tools.command_line import CommandLine

if TYPE_CHECKING:
    from instep.models.recurrent.description import GruDescription

app = CommandLine(help="Make a model folder, import one, check it, or look into it.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that the folder holds.")]


@app.command(
    "make",
    examples=(
        "instep model make my-model --features 40 --hidden 128",
        "instep model make ears --features 40 --hidden 128 --after 10:softmax",
    ),
)
def make(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it; made if it does not exist.")],
    features: Annotated[int, typer.Option(help="Values per frame.", show_default=False)],
    hidden: Annotated[int, typer.Option(help="The GRU's hidden size.", show_default=False)],
    layers: Annotated[int, typer.Option(help="The GRU's layers.")] = 1,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Layers without biases.")] = False,
    before: Annotated[
        list[str], typer.Option(metavar="SIZE[:ACTIVATION]", help="A dense layer before the GRU; repeat for more.")
    ] = [],  # noqa: B006
    after: Annotated[
        list[str], typer.Option(metavar="SIZE[:ACTIVATION]", help="A dense layer after the GRU; repeat for more.")
    ] = [],  # noqa: B006
    init: Annotated[Literal["random", "constant"], typer.Option(help="How weights are made.")] = "random",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="For --init random: the same seed, the same weights.")
    ] = 0,
    weight: Annotated[float, typer.Option(help="For --init constant: every weight.")] = 0.5,
    bias: Annotated[float, typer.Option(help="For --init constant: every bias.")] = 0.0,
    name: Annotated[
        str | None, typer.Option(help="The name shown to clients. Default: the folder's.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder, with random or constant weights, for trying things out."""
    gru = {"hidden_size": hidden, "num_layers": layers, "bias": not no_bias}
    description = _described(features, gru, {"before": before, "after": after}, bias=not no_bias)

    from instep.models.folder import make_model, write_model

    made = make_model(description, init, name=name or folder.resolve().name, seed=seed, weight=weight, bias=bias)
    write_model(folder, made, overwrite=overwrite)
    typer.echo(f"{folder}: {description.in_words()}")


@app.command(
    "import",
    examples=(
        "instep model import net.safetensors --after head:none",
        "instep model import last.ckpt --output ears --gru rnn --after fc:softmax",
    ),
)
def import_weights(
    weights: Annotated[Path, typer.Argument(metavar="FILE", help="A state dict: .pt of torch.save, or .safetensors.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The new folder; default: FILE without its suffix.", show_default=False),
    ] = None,
    gru: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The GRU; leaves layers out that are not named.", show_default=False),
    ] = None,
    before: Annotated[
        list[str], typer.Option(metavar="NAME:ACTIVATION", help="A Linear before the GRU; repeat for more, in order.")
    ] = [],  # noqa: B006
    after: Annotated[
        list[str], typer.Option(metavar="NAME:ACTIVATION", help="A Linear after the GRU; repeat for more, in order.")
    ] = [],  # noqa: B006
    outputs: Annotated[
        str | None, typer.Option(metavar="NAMES", help="A name for each output: yes,no,perhaps.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The name shown to clients. Default: the folder's.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder of the weights of a trained network.

    Name its layers and their activations, in order: weights alone do not say.

    Without options, it says what the file holds. Nothing in it is executed.
    """
    from instep.models.handover.save import save_model

    folder = output or weights.with_suffix("")
    layers = {place: [_named(place, text) for text in texts] for place, texts in (("before", before), ("after", after))}
    names = [] if outputs is None else [each.strip() for each in outputs.split(",")]
    model = save_model(folder, weights, **layers, gru=gru, name=name, outputs=names, overwrite=overwrite)
    typer.echo(f"{folder}: {model.description.in_words()}")


@app.command(examples=("instep model check ears --against net.py:net",))
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model's folder.")],
    against: Annotated[
        str, typer.Option(metavar="FILE:NAME", help="Your module, or a function that returns it.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Compare what a model folder gives with what your own module gives.

    Exit status 0: they agree. 1: they differ. 2: they cannot be compared.
    """
    from instep.models.handover.check import check

    found = check(folder, against)
    typer.echo(jsonlib.dumps(found.as_json(), indent=2) if json else "\n".join(found.lines()))
    raise typer.Exit(0 if found.agrees else 1)


@app.command("info", examples=("instep model info my-model",))
def info(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model's folder.")], json: Json = False
) -> None:
    """Check a model folder and show what is in it."""
    from instep.models.folder import load_model

    model = load_model(folder)
    shapes = {name: list(tensor.shape) for name, tensor in model.weights.items()}
    if json:
        shown = {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "parameters": model.parameters,
            "description": model.description.as_json(),
            "output_names": list(model.output_names),
            "tensors": shapes,
        }
        typer.echo(jsonlib.dumps(shown, indent=2))
        return
    typer.echo(f"{model.name}: {model.description.in_words()}")
    typer.echo(f"{model.parameters:,} parameters; fingerprint {model.fingerprint}")
    if model.output_names:
        typer.echo(f"outputs: {', '.join(model.output_names)}")
    for name, shape in shapes.items():
        typer.echo(f"  {name} {shape}")


def _described(
    features: int, gru: Mapping[str, Any], dense: Mapping[str, Sequence[str]], *, bias: bool
) -> GruDescription:
    """The description, checked.

    Args:
        features: values a frame.
        gru: the keys of `GruLayers`.
        dense: what was typed for each dense layer, `64:relu` or `64`, by `before` and `after`.
        bias: whether the dense layers have biases.

    Raises:
        ConfigError: naming each flag that is wrong, those of dense layers as they were typed.
    """
    from pydantic import ValidationError

    from instep.config import ConfigError, Problem
    from instep.models.recurrent.description import GruDescription
    from instep.models.registry import in_words

    layers = {place: [_dense(text, bias) for text in texts] for place, texts in dense.items()}
    try:
        return GruDescription.model_validate({"features": features, "gru": gru, **layers})
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    "",
                    _flag(found["loc"], dense),
                    in_words(found),
                    "see `instep model make --help`",
                )
                for found in error.errors(include_url=False)
            ]
        ) from None


def _named(place: str, text: str) -> tuple[str, str]:
    name, colon, activation = text.rpartition(":")
    if not colon:
        raise typer.BadParameter(
            f"{text!r} should look like {text}:relu, or {text}:none for no activation", param_hint=f"--{place}"
        )
    return name, activation


def _dense(text: str, bias: bool) -> dict[str, Any]:
    size, _, activation = text.partition(":")
    return {"size": int(size) if size.isdecimal() else size, "activation": activation or "none", "bias": bias}


def _flag(location: tuple[int | str, ...], dense: Mapping[str, Sequence[str]]) -> str:
    """Which flag gave that part of a description: `--after 3:softmx`."""
    match location:
        case (("before" | "after") as place, int(index), *_):
            return f"--{place} {dense[place][index]}"
        case ("gru", "hidden_size"):
            return "--hidden"
        case ("gru", "num_layers"):
            return "--layers"
        case _:
            return f"--{location[0]}"
