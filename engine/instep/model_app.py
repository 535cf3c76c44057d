"""The commands `instep model`: import and check a model folder, and compare one on live streams."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from instep_tools.command_line import CommandLine

Value = TypeVar("Value")

app = CommandLine(help="Import and check model folders, and compare one on live streams.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


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
            help="A state dict (.pt or .safetensors), or one step as a graph (.onnx).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The new folder. Default: FILE without its suffix.", show_default=False),
    ] = None,
    before: Annotated[
        list[str],
        typer.Option(metavar="NAME:ACTIVATION", help="A layer before the recurrent ones; repeat for more, in order."),
    ] = [],  # noqa: B006
    after: Annotated[
        list[str],
        typer.Option(metavar="NAME:ACTIVATION", help="A layer after the recurrent ones; repeat for more, in order."),
    ] = [],  # noqa: B006
    leave_out: Annotated[
        list[str], typer.Option("--leave-out", metavar="NAME", help="A layer that is not served; repeat for more.")
    ] = [],  # noqa: B006
    answer: Annotated[
        str | None, typer.Option(metavar="OUTPUT", help="ONNX: the output to serve.", show_default=False)
    ] = None,
    state: Annotated[
        list[str],
        typer.Option(metavar="INPUT=OUTPUT", help="ONNX: a state and its next value; repeat for more."),
    ] = [],  # noqa: B006
    constant: Annotated[
        list[str], typer.Option(metavar="INPUT=NUMBER", help="ONNX: an input with a fixed value; repeat for more.")
    ] = [],  # noqa: B006
    shape: Annotated[
        list[str],
        typer.Option(metavar="INPUT=SHAPE", help="ONNX: the shape of an input with open sizes, as in x=rows,40."),
    ] = [],  # noqa: B006
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
) -> None:
    """Make a model folder from trained weights or an ONNX graph.

    Weights do not record the order of layers and their activations: name them with --before and --after. Without
    options the command lists the layers in the file. Nothing in the file is executed.

    The states of an ONNX graph are matched by name, such as h and hn; use the options where names do not match.
    """
    folder = output or file.with_suffix("")
    if file.suffix == ".onnx" and (before or after or leave_out):
        raise typer.BadParameter("--before, --after and --leave-out go with weights, not with a graph")
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
            overwrite=overwrite,
        )
    else:
        from instep.models.handover.save import save_model

        around = {"before": before, "after": after}
        layers: Any = {place: [_named(place, text) for text in texts] for place, texts in around.items()}
        model = save_model(folder, file, **layers, leave_out=leave_out, overwrite=overwrite)
    say(f"{folder}: {model.description.in_words()}")


@app.command(examples=("instep model check ears", "instep model check ears --against net.py:net"))
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model's folder.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE:NAME",
            help="A Python file and your trained module in it, or a function that returns it.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check a model folder and show its contents, or compare it with your own module.

    Exit status 0: it can be served, and agrees with the module. 1: they differ. 2: it cannot be served or compared.
    """
    if against is None:
        _show(folder, json)
        return
    from instep.models.handover.check import check

    found = check(folder, against)
    typer.echo(jsonlib.dumps(found.as_json(), indent=2) if json else "\n".join(found.lines()))
    raise typer.Exit(0 if found.agrees else 1)


def _show(folder: Path, json: bool) -> None:
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
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="The recording that a running server writes.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The candidate's model folder.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the streams to compare.")] = 0.1,
    seconds: Annotated[
        float | None,
        typer.Option("--for", min=0.0, help="Seconds to run. Default: until Ctrl-C.", show_default=False),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Begin in the initial state, and do not compare this many frames of each stream. Default: begin with "
            "the recorded state, or 256 where the candidate's states have another layout.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="The largest difference to accept.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Compare a candidate with the served model on live streams.

    The candidate runs in this process, at the lowest priority, on the frames in the server's recording. It answers no
    client. Exit status 0: frames were compared. 1: a value differed by more than --tolerance. 2: nothing was compared.
    """
    import os

    from rich.console import Console

    from instep import interrupts
    from instep.replay.shadow import Shadowing, run

    interrupts.raise_stopped()
    os.nice(19)
    asked = Shadowing(recording, folder, share, seconds, warm_up, tolerance, json)
    raise typer.Exit(run(asked, Console(highlight=False, soft_wrap=True)))


def say(sentence: str) -> None:
    """Print a result."""
    from rich.console import Console

    from instep_tools import terminal

    terminal.say(Console(), sentence)


def _named(place: str, text: str) -> tuple[str, str]:
    name, colon, activation = text.rpartition(":")
    if not colon:
        raise typer.BadParameter(
            f"{text!r} should look like {text}:relu, or {text}:none for no activation", param_hint=f"--{place}"
        )
    return name, activation


def _assigned(option: str, texts: Sequence[str], parse: Callable[[str], Value]) -> dict[str, Value]:
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
