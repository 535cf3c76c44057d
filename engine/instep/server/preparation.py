"""Loads and compiles the models and chooses the device, before the socket is bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import structlog
import torch

from instep.config import Config
from instep.models.base import RecurrentModel
from instep.models.errors import ModelError
from instep.models.folder import check_name, load_model
from instep.models.model import Model
from instep.models.network import IN_WORDS
from instep.models.numerics import prepare as prepare_numerics
from instep.models.portable.form import ARITHMETIC
from instep.models.portable.machine import host
from instep.models.portable.self_check import check_arithmetic
from instep.models.registry import build
from instep.recording.errors import RecordingError, with_advice
from instep.recording.lock import check_not_written
from instep.server.checks import CannotServe as CannotServe
from instep.server.recording_files import recording_file, recordings

_NO_FMA: Final = (
    "this processor has no fused multiply-add (FMA), without which a step takes 7 to 30 times as long: serve on x86-64 "
    "with FMA (Intel since Haswell, AMD since Piledriver) or on ARM; `instep verify` works here, slowly"
)
_ON_GPU: Final = "on a GPU torch's operators serve, within a tolerance and without a promise of bits"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A loaded and compiled model with its device."""

    model: Model
    model_path: Path
    network: RecurrentModel

    @property
    def device(self) -> torch.device:
        """The device on which the network is."""
        return self.network.device

    @property
    def exactness(self) -> Literal["exact", "tolerance"]:
        """See `About.exactness`."""
        return "exact" if self.network.arithmetic == ARITHMETIC else "tolerance"

    @property
    def arithmetic(self) -> str:
        """See `RecordingHeader.arithmetic`."""
        word = self.network.arithmetic
        return word if word == ARITHMETIC else f"{word} {torch.__version__.partition('+')[0]} on {self.device}"


def prepare(config: Config, log: structlog.stdlib.BoundLogger, *, restart: bool = False) -> list[Prepared]:
    """Load, check and compile every model, and choose the device.

    Args:
        config: names the models.
        log: gets a line about the arithmetic of each model.
        restart: as in `serve.run`.

    Raises:
        CannotServe: with a sentence.
    """
    prepare_numerics()
    find_device(config.engine.device)
    try:
        loaded = load_models(config.model.folders)
        is_only = len(loaded) == 1
        for model, _ in loaded:
            if (file := recording_file(config, model.name)) is not None:
                for each in recordings(file):
                    check_not_written(each)
        if restart and find_device(config.engine.device).type != "cpu":
            raise CannotServe(
                "--restart and --shards fork servers with their models loaded, which needs engine.device cpu; leave "
                "them out, and let systemd restart the server"
            )
        check_arithmetic()
        return [
            prepare_loaded(config, model, folder, log_of(model.name, log, is_only=is_only)) for model, folder in loaded
        ]
    except (ModelError, RecordingError) as error:
        raise CannotServe(with_advice(error)) from None


def prepare_loaded(config: Config, model: Model, folder: Path, log: structlog.stdlib.BoundLogger) -> Prepared:
    """Check and compile a model.

    Raises:
        CannotServe, ModelError: with a sentence.
    """
    network = build(model, find_device(config.engine.device))
    if config.engine.device.startswith("cuda") and network.device.type == "cpu":
        kind = model.description.kind
        raise CannotServe(f"engine.device is {config.engine.device}, but models of kind {kind} run on the CPU; use cpu")
    if network.arithmetic == ARITHMETIC:
        log.info("compiled", arithmetic=IN_WORDS)
    else:
        log.warning("not exact", reason=_ON_GPU)
    return Prepared(model, folder, network)


def log_of(name: str, log: structlog.stdlib.BoundLogger, *, is_only: bool) -> structlog.stdlib.BoundLogger:
    """A logger that names the model in each line, unless the server has only one."""
    return log.bind() if is_only else log.bind(model=name)


def load_models(folders: Sequence[tuple[str | None, Path]]) -> list[tuple[Model, Path]]:
    """Every model and its folder, the default one first.

    Raises:
        CannotServe, ModelError: with a sentence, if a model cannot be loaded or no model is named.
    """
    if not folders:
        raise CannotServe(
            "no model to serve: name its folder (instep serve FOLDER, or model.folder in the configuration), or "
            "serve the demo's to try things out (instep serve --demo)"
        )
    loaded: dict[str, tuple[Model, Path]] = {}
    for name, folder in folders:
        model = load_model(folder)
        if name is not None:
            model = replace(model, name=check_name(name, "give it another in model.folder"))
        if model.name in loaded:
            raise CannotServe(
                f"two models are called {model.name!r}: {loaded[model.name][1]} and {folder.resolve()}; give one of "
                "them another `name` in its model.yaml, or name both in the configuration: "
                "model: {folder: {NAME: FOLDER, OTHER: FOLDER}}"
            )
        loaded[model.name] = model, folder.resolve()
    return list(loaded.values())


def find_device(name: str) -> torch.device:
    """The device with that name.

    Raises:
        CannotServe: when this machine does not have it, or it is a CPU without fused multiply-adds.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cpu" and not host().has_fma:
        raise CannotServe(_NO_FMA)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotServe(f"engine.device is {name}, but torch finds no CUDA device here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CannotServe(f"engine.device is {name}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device
