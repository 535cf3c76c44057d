"""The versions of a model: which of them may follow another, and which are served after a start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from instep.config import Config
from instep.config.sections import StreamPolicy
from instep.models.base import RecurrentModel, StateSpec
from instep.models.errors import ModelError
from instep.models.folder import check_name, load_model
from instep.models.model import Model
from instep.recording.schema import MOVED_EVENT, RecordingHeader
from instep.recording.writer import RecordingWriter
from instep.server.preparation import CannotServe, Prepared, prepare_loaded
from instep.server.recording_files import Former, Versions, find_versions, recording_file, say_not_served
from instep_client.protocol.wire import ServerInfo

_FINGERPRINT: Final = 8


def check_sizes(former: RecordingHeader | ServerInfo, network: RecurrentModel, *, allowed: bool) -> None:
    """Refuse a version with other sizes of frames or outputs than the former one, unless `allowed`.

    Raises:
        CannotServe: with a sentence.
    """
    there, here = (former.features, former.outputs), (network.description.features, network.description.outputs)
    if there != here and not allowed:
        raise CannotServe(
            f"it takes {here[0]:,} features and gives {here[1]:,} outputs, and the version before {there[0]:,} and "
            f"{there[1]:,}: clients would break; set model.allow_other_sizes if that is meant"
        )


def check_policy(
    policy: StreamPolicy, former: RecordingHeader | ServerInfo, state: StateSpec, network: RecurrentModel
) -> None:
    """Refuse a version in which streams of the former one cannot continue by this policy.

    Raises:
        CannotServe: with a sentence.
    """
    if policy.word == "keep":
        return
    if (former.features, former.outputs) != (network.description.features, network.description.outputs):
        raise CannotServe(f"its frames or outputs have other sizes, so no stream can be moved to it: {use('keep')}")
    if policy.word == "move" and state != network.state:
        raise CannotServe(
            f"its state differs from that of the version before, so no stream can be moved to it: "
            f"{use('replay:N', 'keep')}"
        )


def use(*policies: str) -> str:
    """Advice to use another policy."""
    return f"use `model.on_reload: {'` or `'.join(policies)}`"


def find_recording(config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger) -> Versions | None:
    """The recording of the version to serve, and those of earlier versions; None without recordings.

    Raises:
        RecordingError: as `recording_file` and `find_versions`.
        CannotServe: when streams of an earlier version cannot continue in this one as `model.on_reload` says.
    """
    first = recording_file(config, prepared.model.name)
    if first is None:
        return None
    if config.recording.is_one_file:
        return Versions(first, None, [])
    versions = find_versions(first, prepared.model.fingerprint, log)
    policy = StreamPolicy.parse(config.model.on_reload)
    try:
        if versions.newest is not None:
            check_sizes(versions.newest, prepared.network, allowed=config.model.allow_other_sizes)
        for former in formers_to_move(versions, prepared.model.fingerprint, policy):
            if former.streams:
                check_policy(policy, former.header, former.header.state_spec, prepared.network)
    except CannotServe as error:
        raise CannotServe(f"{prepared.model_path}: {error}") from None
    return versions


@dataclass(frozen=True, slots=True)
class Planned:
    """A version of a model that is to be served."""

    prepared: Prepared
    log: structlog.stdlib.BoundLogger
    file: Path | None = None
    formers: Sequence[Former] = ()
    """The former recordings whose streams continue in it."""
    kept_as: str = ""
    """The name of a former version that keeps its streams."""


def plan(config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger) -> list[Planned]:
    """Plan a model, and former versions of it that keep their streams.

    If a server was killed during a change, the change is first completed in the recordings.

    Raises:
        RecordingError, CannotServe: as `find_recording`.
    """
    versions = find_recording(config, prepared, log)
    if versions is None:
        return [Planned(prepared, log)]
    for former in versions.formers:
        end_moved(former)
    moves = formers_to_move(versions, prepared.model.fingerprint, StreamPolicy.parse(config.model.on_reload))
    planned = [Planned(prepared, log, versions.file, [each for each in moves if each.streams])]
    keep = [each for each in versions.formers if each not in moves and each.streams]
    while keep:
        former, fingerprint = keep[-1], keep.pop().header.model_fingerprint
        kept_as = name_kept(prepared.model.name, fingerprint)
        its_log = log.bind(model=kept_as)
        try:
            loaded = prepare_former(config, former, its_log)
        except (ModelError, CannotServe) as error:
            say_not_served(former.file, f"streams keep the version that they have, but {error}", log)
            continue
        older = [each for each in keep if each.header.model_fingerprint == fingerprint]
        keep = [each for each in keep if each not in older]
        planned.append(Planned(loaded, its_log, former.file, older, kept_as))
    return planned


def name_kept(name: str, fingerprint: str) -> str:
    """The name of a replaced version that keeps its streams."""
    return check_name(f"{name}@{fingerprint[:_FINGERPRINT]}", "give the model a shorter one")


def formers_to_move(versions: Versions, fingerprint: str, policy: StreamPolicy) -> list[Former]:
    """The recordings whose streams continue in the version with that fingerprint; others keep their versions."""
    return [each for each in versions.formers if policy.word != "keep" or each.header.model_fingerprint == fingerprint]


def prepare_former(config: Config, former: Former, log: structlog.stdlib.BoundLogger) -> Prepared:
    """Load the version of the model that made a recording, from the folder that it had.

    Raises:
        ModelError: when that cannot be loaded, or holds another version now.
        CannotServe: when it cannot be served.
    """
    return prepare_loaded(config, model_of(former), Path(former.header.model_folder), log)


def model_of(former: Former) -> Model:
    """Load the version of the model that made a recording; raises ModelError."""
    header = former.header
    model = replace(load_model(header.model_folder), name=header.model_name)
    if model.fingerprint != header.model_fingerprint:
        raise ModelError(f"{header.model_folder} holds another version of the model now")
    return model


def end_moved(former: Former) -> None:
    """Record the ends of streams that already continue elsewhere, which a killed server did not record.

    Raises:
        RecordingError: when the recording cannot be written.
    """
    if former.moved:
        writer = RecordingWriter.resume(former.file, former.header)
        try:
            numbers, seqs = (np.array(list(each), np.int64) for each in (former.moved, former.moved.values()))
            states, lost = former.header.state_spec.missing(len(numbers)), np.ones(len(numbers), np.bool_)
            writer.close_streams(time.time_ns(), numbers, MOVED_EVENT, seqs, states, lost)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
