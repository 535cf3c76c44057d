"""The commands `instep model`, as typed: make, import, check, show a model folder, and compare one on live streams."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from instep_tools.command_line import CommandLine

if TYPE_CHECKING:
    from instep.models.recurrent.description import RecurrentDescription

Value = TypeVar("Value")

app = CommandLine(help="Make a model folder, import one, check it, look into it, or compare it on live streams.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that the folder holds.")]


@app.command(
    "make",
    examples=(
        "instep model make my-model --features 40 --hidden 128",
        "instep model make ears --features 40 --hidden 128 --after 10:softmax",
        "instep model make deep --features 40 --kind lstm --hidden 128 --layers 2",
    ),
)
def make(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it; made if it does not exist.")],
    features: Annotated[int, typer.Option(help="Values per frame.", show_default=False)],
    hidden: Annotated[int, typer.Option(help="The hidden size.", show_default=False)],
    kind: Annotated[Literal["gru", "lstm", "rnn"], typer.Option(help="The recurrent layers.")] = "gru",
    layers: Annotated[int, typer.Option(help="How many recurrent layers.")] = 1,
    nonlinearity: Annotated[
        Literal["tanh", "relu"] | None, typer.Option(help="Of an RNN; tanh if not given.", show_default=False)
    ] = None,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Layers without biases.")] = False,
    before: Annotated[
        list[str],
        typer.Option(metavar="LAYER[:ACTIVATION]", help="A layer before them: 64, or layer_norm; repeat for more."),
    ] = [],  # noqa: B006
    after: Annotated[
        list[str],
        typer.Option(metavar="LAYER[:ACTIVATION]", help="A layer after them: 64, or layer_norm; repeat for more."),
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
    recurrent: dict[str, Any] = {"hidden_size": hidden, "num_layers": layers, "bias": not no_bias}
    if nonlinearity is not None:
        recurrent["nonlinearity"] = nonlinearity
    typed = {"before": before, "after": after}
    around = {place: [_layer(text, not no_bias) for text in texts] for place, texts in typed.items()}
    description = _described(kind, {"features": features, kind: recurrent, **around}, typed)

    from instep.models.folder import make_model, write_model

    made = make_model(description, init, name=name or folder.resolve().name, seed=seed, weight=weight, bias=bias)
    write_model(folder, made, overwrite=overwrite)
    say(f"{folder}: {description.in_words()}")


@app.command(
    "import",
    examples=(
        "instep model import net.safetensors --after head:none",
        "instep model import ears.pt --after fc:softmax --leave-out decoder",
        "instep model import vad.onnx --shape input=rows,576 --constant sr=16000",
    ),
)
def import_model(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A state dict (.pt of torch.save, or .safetensors), or a graph (.onnx).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The new folder; default: FILE without its suffix.", show_default=False),
    ] = None,
    nonlinearity: Annotated[
        Literal["tanh", "relu"] | None, typer.Option(help="Of an RNN: weights do not say.", show_default=False)
    ] = None,
    before: Annotated[
        list[str],
        typer.Option(metavar="NAME:ACTIVATION", help="A Linear or LayerNorm before it; repeat for more, in order."),
    ] = [],  # noqa: B006
    after: Annotated[
        list[str],
        typer.Option(metavar="NAME:ACTIVATION", help="A Linear or LayerNorm after it; repeat for more, in order."),
    ] = [],  # noqa: B006
    leave_out: Annotated[
        list[str], typer.Option("--leave-out", metavar="NAME", help="A layer that is not served; repeat for more.")
    ] = [],  # noqa: B006
    outputs: Annotated[
        str | None, typer.Option(metavar="NAMES", help="A name for each output: yes,no,perhaps.", show_default=False)
    ] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="OUTPUT", help="Of an ONNX graph: the answer.", show_default=False)
    ] = None,
    state: Annotated[
        list[str],
        typer.Option(metavar="INPUT=OUTPUT", help="Of an ONNX graph: a state and the next one; repeat for more."),
    ] = [],  # noqa: B006
    constant: Annotated[
        list[str], typer.Option(metavar="INPUT=NUMBER", help="Of an ONNX graph: an input that is always the same.")
    ] = [],  # noqa: B006
    shape: Annotated[
        list[str],
        typer.Option(metavar="INPUT=SHAPE", help="Of an ONNX graph: a shape that it leaves open, as x=rows,40."),
    ] = [],  # noqa: B006
    name: Annotated[
        str | None, typer.Option(help="The name shown to clients. Default: the folder's.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder of the weights of a trained network, or of a graph in ONNX.

    Name the layers of weights and their activations, in order: weights alone do not say. Without options, it says what
    the file holds. Nothing in it is executed.

    The state of an ONNX graph is found by name, as h and hn; the other options say what the names do not.
    """
    folder = output or file.with_suffix("")
    names = [] if outputs is None else [each.strip() for each in outputs.split(",")]
    if file.suffix == ".onnx" and (nonlinearity or before or after or leave_out):
        raise typer.BadParameter("--nonlinearity, --before, --after and --leave-out go with weights, not with a graph")
    if file.suffix != ".onnx" and (answer or state or constant or shape):
        raise typer.BadParameter("--answer, --state, --constant and --shape go with an .onnx graph")
    if file.suffix == ".onnx":
        from instep.models.onnx.importer import import_onnx

        model = import_onnx(
            file,
            folder,
            state=_assigned("state", state, str) or None,
            answer=answer,
            constants=_assigned("constant", constant, _number),
            shapes=_assigned("shape", shape, _extents),
            name=name,
            outputs=names,
            overwrite=overwrite,
        )
        say(f"{folder}: {model.description.in_words()}")
        return

    from instep.models.handover.save import save_model

    model = save_model(
        folder,
        file,
        [_named("before", text) for text in before],
        [_named("after", text) for text in after],
        name,
        outputs=names,
        nonlinearity=nonlinearity,
        leave_out=leave_out,
        overwrite=overwrite,
    )
    say(f"{folder}: {model.description.in_words()}")


@app.command(examples=("instep model check ears --against net.py:net",))
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model's folder.")],
    against: Annotated[
        str, typer.Option(metavar="FILE:NAME", help="Your module, or a function that returns it.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Compare the outputs of a model folder with those of your own module.

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
    """Check a model folder, list its contents, and say in which arithmetic a CPU steps it."""
    import torch

    from instep.models.folder import load_model
    from instep.models.network import IN_WORDS
    from instep.models.registry import build

    model = load_model(folder)
    network = build(model, torch.device("cpu"))
    shapes = {name: list(tensor.shape) for name, tensor in model.weights.items()}
    if json:
        shown = {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "weights": model.weight_count,
            "description": model.description.as_json(),
            "output_names": list(model.output_names),
            "tensors": shapes,
            "arithmetic": network.arithmetic,
        }
        typer.echo(jsonlib.dumps(shown, indent=2))
        return
    say(f"{model.name}: {model.description.in_words()}")
    say(f"{model.size_in_words}; fingerprint {model.fingerprint}")
    say(IN_WORDS)
    if model.output_names:
        say(f"outputs: {', '.join(model.output_names)}")
    for name, shape in shapes.items():
        typer.echo(f"  {name} {shape}")


@app.command(
    examples=(
        "instep model shadow ears.instep models/ears-new --for 600",
        "instep model shadow ears.instep models/ears-new --tolerance 0.01 --json",
    )
)
def shadow(
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="The recording that a server writes.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the candidate.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The share of the streams, by their names.")] = 0.1,
    seconds: Annotated[
        float | None,
        typer.Option("--for", min=0.0, help="Seconds. Default: until Ctrl-C, SIGTERM or SIGHUP.", show_default=False),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Begin with this many frames of each stream, uncompared, instead of its state. Default: the state, or "
            "256 frames where the candidate's states are others.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="The largest difference that is no failure.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Compare a candidate's outputs with those that a server gives, on a share of its streams, while it serves.

    The candidate runs in this process, at the lowest priority, on the frames in the server's recording. It never
    answers, and the server does not know of it. Exit status 0: frames were compared. 1: a value differed by more than
    --tolerance. 2: nothing was compared.
    """
    import os

    from rich.console import Console

    from instep import interrupts
    from instep.shadow.command import Shadowing, run

    interrupts.raise_stopped()
    os.nice(19)
    asked = Shadowing(recording, folder, share, seconds, warm_up, tolerance, json)
    raise typer.Exit(run(asked, Console(highlight=False, soft_wrap=True)))


def say(sentence: str) -> None:
    """Print a result in words."""
    from rich.console import Console

    from instep_tools import terminal

    terminal.say(Console(), sentence)


def _described(kind: str, fields: Mapping[str, Any], typed: Mapping[str, Sequence[str]]) -> RecurrentDescription:
    """The description, checked.

    Args:
        kind: of the recurrent layers.
        fields: the keys of the description.
        typed: the layers as they were typed, `64:relu`, `64` or `layer_norm`, by `before` and `after`.

    Raises:
        ConfigError: naming each flag that is wrong, those of layers as they were typed.
    """
    from pydantic import ValidationError

    from instep.config import ConfigError, Problem
    from instep.models.recurrent.description import DESCRIPTIONS
    from instep.models.registry import in_words

    try:
        return DESCRIPTIONS[kind].model_validate({"kind": kind, **fields})
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    "",
                    _flag(found["loc"], typed),
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


def _assigned(option: str, texts: Sequence[str], parse: Callable[[str], Value]) -> dict[str, Value]:
    """What was typed as `NAME=VALUE`, by name."""
    found = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            found[name] = parse(value)
        except ValueError:
            name = ""
        if not name or not value:
            example = {"state": "h=hn", "constant": "sr=16000", "shape": "x=rows,40"}[option]
            raise typer.BadParameter(f"{text!r} should look like {example}", param_hint=f"--{option}")
    return found


def _number(text: str) -> float:
    return int(text) if text.removeprefix("-").isdecimal() else float(text)


def _extents(text: str) -> tuple[Any, ...]:
    return tuple(each if each == "rows" else int(each) for each in text.replace(" ", "").split(","))


def _layer(text: str, bias: bool) -> dict[str, Any]:
    size, _, activation = text.partition(":")
    first = {"layer_norm": True} if size == "layer_norm" else {"size": int(size) if size.isdecimal() else size}
    return {**first, "activation": activation or "none", "bias": bias}


def _flag(location: tuple[int | str, ...], typed: Mapping[str, Sequence[str]]) -> str:
    """Which flag gave that part of a description: `--after 3:softmx`."""
    match location:
        case (("before" | "after") as place, int(index), *_):
            return f"--{place} {typed[place][index]}"
        case (_, "hidden_size"):
            return "--hidden"
        case (_, "num_layers"):
            return "--layers"
        case _:
            return f"--{location[-1]}"
