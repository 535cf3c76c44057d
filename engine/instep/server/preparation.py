"""Everything that is decided before the socket is bound: the model, the device, and how exact it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from instep.config import Config
from instep.models.base import RecurrentModel
from instep.models.certify import Certification, candidate_buckets, certify
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.model import Model
from instep.models.numerics import prepare as prepare_numerics
from instep.models.registry import build


class CannotServe(Exception):
    """The server cannot start; the message says whose fault it is and what to do."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that is decided before the socket is bound."""

    model: Model
    model_path: Path
    network: RecurrentModel
    device: torch.device
    certification: Certification


def prepare(config: Config, log: structlog.stdlib.BoundLogger) -> Prepared:
    """Load and check the model, choose the device, certify.

    Raises:
        CannotServe: with a sentence.
    """
    prepare_numerics(config.engine.threads)
    try:
        model, path = _load(config)
        network = build(model, _device(config.engine.device))
    except ModelError as error:
        raise CannotServe(str(error)) from None
    if config.engine.device.startswith("cuda") and network.device.type == "cpu":
        kind = model.description.kind
        raise CannotServe(f"engine.device is {config.engine.device}, but models of kind {kind} run on the CPU; use cpu")
    return Prepared(model, path, network, network.device, _certify(config, network, log))


def check_restartable(config: Config, prepared: Prepared) -> None:
    """Refuse what `--restart` cannot start again.

    Raises:
        CannotServe: with a sentence.
    """
    if config.transport.endpoint.endswith(":*"):
        raise CannotServe(
            "--restart needs a port: clients would not find the next server on whichever port is free then"
        )
    if prepared.device.type != "cpu" or config.engine.threads > 1:
        raise CannotServe(
            "--restart forks the server with its model loaded, which needs engine.device cpu and engine.threads 1; "
            "leave it out, and let systemd restart the server"
        )


def _certify(config: Config, network: RecurrentModel, log: structlog.stdlib.BoundLogger) -> Certification:
    buckets = candidate_buckets(network, config.engine.max_batch_size)
    if config.engine.exactness == "off":
        network.select_quickest()
        return Certification("off", buckets, max_ulp=0, whole_sequence=False)
    log.info("certifying", max_batch_size=config.engine.max_batch_size)
    began = time.perf_counter()
    certification = certify(network, buckets)
    seconds = round(time.perf_counter() - began, 2)
    log.info(
        "certified",
        exactness=certification.exactness,
        batch_sizes=certification.buckets,
        step=network.kernel,
        seconds=seconds,
    )
    largest, differ = certification.buckets[-1], f"up to {certification.max_ulp} ULP were seen in one step"
    if certification.exactness != "exact":
        if config.engine.exactness == "require":
            raise CannotServe(
                f"engine.exactness is `require`, but on this machine batches differ from one another: {differ}; "
                "`prefer` serves within that distance and logs it"
            )
        log.warning("not exact", max_ulp=certification.max_ulp, reason=f"batches differ on this machine: {differ}")
    if largest < config.engine.max_batch_size:
        log.warning("smaller batches", max_batch_size=largest, reason="larger ones do not give the same bits here")
    return certification


def _load(config: Config) -> tuple[Model, Path]:
    folder = config.model.folder
    if folder is None:
        raise CannotServe(
            "no model to serve: name its folder (instep serve FOLDER, or model.folder in the configuration), make one "
            "to try things out (instep model make FOLDER --features 40 --hidden 128), or serve the demo's "
            "(instep serve --demo)"
        )
    return load_model(folder), folder.resolve()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotServe(f"engine.device is {name}, but torch finds no CUDA device here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CannotServe(f"engine.device is {name}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device
