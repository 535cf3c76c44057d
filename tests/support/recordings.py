"""Recordings of networks as they are served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from instep.models.base import RecurrentModel
from instep.models.folder import write_model
from instep.models.handover.save import save_model
from instep.models.model import Model
from instep.models.network import PortableNetwork
from instep.models.portable.form import ARITHMETIC
from instep.models.registry import parse_description
from instep.recording.schema import RecordingHeader
from instep.recording.writer import RecordingWriter
from tests.support.scribe import F32, START_NS, Scribe, Step

NO_BITS: Final[dict[str, Any]] = {"arithmetic": "torch on cuda:0"}
"""The header of an engine that promised no bits."""


def gru_description(gru: torch.nn.GRU) -> dict[str, Any]:
    return {
        "kind": "gru",
        "features": gru.input_size,
        "before": [],
        "gru": {
            "hidden_size": gru.hidden_size,
            "num_layers": gru.num_layers,
            "bias": gru.bias,
        },
        "after": [],
    }


def make_header(description: dict[str, Any], **changes: Any) -> RecordingHeader:
    parsed = parse_description(description)
    fields: dict[str, Any] = {
        "instep_version": "0.1.0",
        "created_ns": START_NS,
        "model_name": "test",
        "model_folder": "",
        "description": description,
        "features": parsed.features,
        "outputs": parsed.outputs,
        "state": parsed.state.encode(),
        "model_fingerprint": "ab" * 32,
        "arithmetic": ARITHMETIC,
        "durability": "commit",
    }
    return RecordingHeader(**{**fields, **changes})


def make_gru(features: int = 3, hidden: int = 4, layers: int = 1, bias: bool = True, seed: int = 0) -> torch.nn.GRU:
    torch.manual_seed(seed)
    return torch.nn.GRU(features, hidden, num_layers=layers, bias=bias)


def make_amplifying_gru() -> torch.nn.GRU:
    """A network in which rounding grows until nothing of the trajectory is left."""
    gru = make_gru(8, 24, 3)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(8)
    return gru


def gru_step(gru: torch.nn.GRU) -> Step:
    """One timestep of a network that is one nn.GRU, as it is served."""
    weights = {f"gru.{name}": tensor.detach() for name, tensor in gru.state_dict().items()}
    return served_step(PortableNetwork(Model("test", parse_description(gru_description(gru)), weights)))


@dataclass(frozen=True)
class Recorded:
    """A recording and the model it was made with."""

    path: Path
    folder: Path
    header: RecordingHeader


def served_step(network: RecurrentModel) -> Step:
    """One timestep of a network with the state `h`, as it is served."""

    def step(x: F32, h: F32) -> tuple[F32, F32]:
        y, states = network.step(x, network.state.pack({"h": np.ascontiguousarray(h.swapaxes(0, 1))}))
        return y, network.state.unpack(states)["h"].swapaxes(0, 1).copy()

    return step


def record_gru(
    where: Path, gru: torch.nn.GRU, lengths: Sequence[int], *, changes: dict[str, Any] | None = None, **how: Any
) -> Recorded:
    """As `record_model`, a network that is one nn.GRU."""
    return _record(where, save_model(where / "model", gru), lengths, changes or {}, how)


def record_model(
    where: Path, model: Model, lengths: Sequence[int], *, changes: dict[str, Any] | None = None, **how: Any
) -> Recorded:
    """Record a model as it is served (`how` as in `record`); its folder lies beside the recording."""
    write_model(where / "model", model)
    return _record(where, model, lengths, changes or {}, how)


def _record(
    where: Path, model: Model, lengths: Sequence[int], changes: dict[str, Any], how: dict[str, Any]
) -> Recorded:
    fields: dict[str, Any] = {
        "model_name": model.name,
        "model_folder": str(where / "model"),
        "model_fingerprint": model.fingerprint,
        **changes,
    }
    header = make_header(model.description.as_json(), **fields)
    record(where / "a.rec", header, served_step(PortableNetwork(model)), lengths, **how)
    return Recorded(where / "a.rec", where / "model", header)


def record(
    path: Path,
    header: RecordingHeader,
    step: Step,
    lengths: Sequence[int],
    *,
    most: int = 8,
    seed: int = 0,
    initial: Sequence[int] = (),
    leave_open: Sequence[int] = (),
    mix_up: tuple[int, int, int] | None = None,
    magnitude: float = 1.0,
    finish: bool = True,
) -> RecordingWriter:
    """Record streams of these lengths, several at a time in random company, as an engine would.

    Args:
        path: the new file.
        header: of the recording.
        step: what computes.
        lengths: frames of each stream; stream numbers count from 1 in this order.
        most: frames in a step.
        seed: of the frames and of who is in which batch.
        initial: indices of streams that start from a random state.
        leave_open: indices of streams that are not closed.
        mix_up: (a, b, seq): stream a goes on from the state of b before its frame `seq`, as in an engine that is wrong.
        magnitude: of the frames.
        finish: close the recording; otherwise the writer still has it open, everything committed.
    """
    writer = RecordingWriter.create(path, header)
    scribe = Scribe(writer, step, seed=seed, magnitude=magnitude)
    for at in range(len(lengths)):
        scribe.open(at + 1, scribe.random_state() if at in initial else None)
    done = np.zeros(len(lengths), np.int64)
    while len(pending := np.flatnonzero(done < np.asarray(lengths))):
        chosen = scribe.rng.permutation(pending)[: scribe.rng.integers(1, most + 1)]
        if mix_up is not None and mix_up[0] in chosen and done[mix_up[0]] == mix_up[2]:
            scribe.states[mix_up[0] + 1] = scribe.states[mix_up[1] + 1]
        scribe.step((chosen + 1).tolist())
        done[chosen] += 1
    for at in range(len(lengths)):
        if at not in leave_open:
            scribe.close(at + 1)
    writer.commit()
    if finish:
        writer.close()
    return writer
