"""A server that compares a candidate with the model that it serves, while it serves it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from instep.cli import app
from instep.config import Config
from instep.core.typing import F32
from instep.models.folder import write_model
from instep.models.model import Model
from instep.recording.reader import RecordingReader
from instep.server.check import check
from instep.server.live_shadow import LiveShadow
from instep.server.log import Threshold
from instep.server.preparation import CannotServe
from instep.server.reload import Kept, reload
from instep.server.server import Server
from instep.streaming.candidate import CandidateStatus
from instep_client import AsyncClient, ConnectionFailed, Refused
from tests.support.beside import IN_FRESH_INTERPRETERS, frames, until
from tests.support.models import plain, torch_gru
from tests.support.running import log_into, running

EARS = replace(plain(5, 8), name="ears")
NEWER = replace(plain(5, 8, seed=9), name="ears")
ENGINE = {"max_batch_size": 16}


def perturbed() -> Model:
    """The served model with one weight that is another."""
    weights = {name: tensor.clone() for name, tensor in EARS.weights.items()}
    weights["gru.weight_ih_l0"][19, 2] += 0.25
    return Model("ears", EARS.description, weights)


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    """A folder with the served model."""
    write_model(tmp_path / "candidate", EARS)
    return tmp_path / "candidate"


def sections(candidate: Path, **others: Any) -> dict[str, Any]:
    model, recording = (
        {"shadow": candidate, "shadow_share": 1.0},
        {"file": candidate.parent / "r.instep", "recovery_target_s": 1e6},
    )
    return {"model": model, "recording": recording, "engine": ENGINE, **others}


def found(server: Server) -> CandidateStatus:
    candidate = server.default.candidate
    assert candidate is not None
    return candidate


def of_torch(model: Model, x: F32) -> F32:
    """Outputs of torch's own layers from the initial state, for frames [streams, T, features]."""
    with torch.inference_mode():
        y: F32 = torch_gru(model)(torch.from_numpy(x).transpose(0, 1))[0].transpose(0, 1).numpy()
    return y


async def test_a_candidate_that_is_the_served_model_has_equal_bits(candidate: Path, rng: np.random.Generator) -> None:
    told: list[dict[str, Any]] = []
    async with running(EARS, told=told, background=IN_FRESH_INTERPRETERS, **sections(candidate)) as server:
        async with AsyncClient(server.endpoint) as client:
            await until(lambda: found(server).is_following)
            assert found(server).pid is not None
            for name in ("a", "b", "c"):
                stream = await client.open(name)
                for _ in range(4):
                    await stream.step(frames(rng, 20))
            await until(lambda: found(server).frames == 240)
            numbers = await client.stats()
    assert {name: value for name, value in numbers.items() if name.startswith("shadow_")} == {
        "shadow_following": 1.0,
        "shadow_share": 1.0,
        "shadow_streams": 3.0,
        "shadow_dropped_streams_total": 0.0,
        "shadow_frames_total": 240.0,
        "shadow_equal_frames_total": 240.0,
        "shadow_largest_difference": 0.0,
        "shadow_mean_difference": 0.0,
    }
    (line,) = (line for line in told if line["event"] == "shadowed")
    assert (line["frames"], line["equal"], line["largest_difference"], line["reason"]) == (
        240,
        240,
        0.0,
        "the server ends",
    )
    assert line["candidate"] == EARS.fingerprint[:8]
    assert not any(line["level"] in ("error", "warning") for line in told)


async def test_what_it_finds_is_what_torch_computes_and_survives_the_death_of_its_process(
    candidate: Path, rng: np.random.Generator
) -> None:
    other, told = perturbed(), list[dict[str, Any]]()
    write_model(candidate, other, overwrite=True)
    x, served = frames(rng, 2, 90), np.zeros((2, 90, 8), np.float32)
    async with running(EARS, told=told, **sections(candidate)) as server:
        async with AsyncClient(server.endpoint) as client:
            await until(lambda: found(server).is_following)
            streams = [await client.open(f"s{number}") for number in range(2)]
            for number, stream in enumerate(streams):
                served[number, :40] = await stream.step(x[number, :40])
            await until(lambda: found(server).frames == 80)
            former = found(server).pid
            assert former is not None
            os.kill(former, signal.SIGKILL)
            for number, stream in enumerate(streams):
                served[number, 40:] = await stream.step(x[number, 40:])
            await until(lambda: found(server).pid not in (former, None) and found(server).is_following)
            await until(lambda: found(server).frames >= 180)
        shown = found(server).as_json()
    apart = np.abs(of_torch(other, x) - served)
    np.testing.assert_allclose(served, of_torch(EARS, x), atol=1e-6)
    assert apart.max() > 0.01
    assert shown["frames"] == 180, "each frame was compared once"
    assert shown["equal"] == 0
    assert shown["largest"] == pytest.approx(apart.max(), abs=1e-5)
    assert shown["mean"] == pytest.approx(apart.mean(), abs=1e-5)
    assert (shown["state"], shown["fingerprint"]) == ("following", other.fingerprint)
    (line,) = (line for line in told if line["level"] in ("error", "warning"))
    assert (line["event"], "SIGKILL" in line["reason"]) == ("shadow restarts", True)


async def test_a_candidate_that_breaks_meanwhile_is_said_and_disturbs_nothing(
    candidate: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    async with running(EARS, told=told, **sections(candidate)) as server:
        async with AsyncClient(server.endpoint) as client:
            await until(lambda: found(server).is_following)
            found(server).quiet_s = 1.5
            os.kill(found(server).pid or 0, signal.SIGSTOP)
            await until(lambda: found(server).state == "late")
            write_model(candidate, NEWER, overwrite=True)
            os.kill(found(server).pid or 0, signal.SIGKILL)
            x = frames(rng, 30)
            y = await (await client.open("s")).step(x)
            await until(lambda: found(server).state == "ended")
            np.testing.assert_allclose(y, of_torch(EARS, x[None])[0], atol=1e-6)
    assert "holds another version now" in found(server).reason
    assert [line["event"] for line in told if line["level"] == "warning"] == ["shadow restarts", "shadow ended"]


async def test_it_follows_the_next_version_while_that_is_another_one_of_its_sizes(
    candidate: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / "recordings").mkdir()
    write_model(tmp_path / "newer", NEWER)
    write_model(tmp_path / "wider", plain(5, 9))
    changed = sections(candidate, recording={"file": tmp_path / "recordings"})
    async with running(EARS, told=told, **changed) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("s")
        await stream.step(frames(rng, 20))
        await until(lambda: found(server).is_following)
        first = server.default
        await client.swap_model("ears", tmp_path / "newer", "keep")
        assert first is not server.default
        assert first.candidate is not None
        assert (first.candidate.state, first.candidate.pid) == ("ended", None)
        async with AsyncClient(server.endpoint) as other:
            await until(lambda: found(server).is_following)
            moved, x = await other.open("t"), frames(rng, 30)
            y = await moved.step(x)
            await until(lambda: found(server).frames == 30)
            assert found(server).largest == pytest.approx(np.abs(of_torch(EARS, x[None])[0] - y).max(), abs=1e-5)
            with pytest.raises(Refused, match="is served already"):
                await other.swap_model("ears", tmp_path / "newer", "move")
            assert found(server).state == "following", "a swap that fails changes nothing"
            await other.swap_model("ears", candidate, "move")
            assert server.default.candidate is None
            await moved.step(x)
            await other.unload_model(f"ears@{EARS.fingerprint[:8]}", force=True)
            await other.swap_model("ears", tmp_path / "wider", "keep")
            assert server.default.candidate is None
    ended = [line["reason"] for line in told if line["event"] == "not shadowed"]
    assert [reason.removeprefix(f"{candidate} ") for reason in ended] == [
        "is the version that is served now",
        f"model.shadow: {candidate} has 8 outputs, and the model 'ears', which it is to shadow, with 9",
    ]
    assert len([line for line in told if line["event"] == "shadowed"]) == 2


async def test_what_a_new_version_has_recorded_outlives_an_end_that_is_forced_before_the_former_candidate_has_ended(
    candidate: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recordings").mkdir()
    write_model(tmp_path / "newer", NEWER)
    ends, stop = asyncio.Event(), LiveShadow.stop

    async def stop_late(shadow: LiveShadow, reason: str) -> None:
        ends.set()
        try:
            if reason == "another version is served now":
                await asyncio.Event().wait()
        finally:
            await stop(shadow, reason)

    monkeypatch.setattr(LiveShadow, "stop", stop_late)
    async with running(EARS, **sections(candidate, recording={"file": tmp_path / "recordings"})) as server:
        async with AsyncClient(server.endpoint, reconnect_s=0) as client:
            swapping = asyncio.create_task(client.swap_model("ears", tmp_path / "newer", "keep"))
            await ends.wait()
            other = AsyncClient(server.endpoint)
            await other.connect()
            await (await other.open("s")).step(frames(rng, 3))
            await other.close(park=True)
            server.stop(drain=False)
            with pytest.raises(ConnectionFailed):
                await swapping
    with RecordingReader(tmp_path / "recordings" / "ears@2.instep") as reader:
        assert [stream.name for stream in reader.streams()] == ["s"]


async def test_a_reload_exchanges_the_candidate(candidate: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / "recordings").mkdir()
    write_model(tmp_path / "ears", EARS)
    write_model(candidate, perturbed(), overwrite=True)

    def reloads(shadow: Path | dict[str, Path] | None, folder: str = "ears") -> None:
        wanted = replaced(server.config, {"folder": tmp_path / folder, "shadow": shadow, "shadow_share": 1.0})
        reload(server, lambda: wanted, Threshold("info"), log_into(told), Kept())

    def said(event: str) -> list[str]:
        return [line["reason"] for line in told if line["event"] == event]

    async with running(EARS, told=told, recording={"file": tmp_path / "recordings"}, engine=ENGINE) as server:
        assert server.default.candidate is None
        reloads(candidate)
        await until(lambda: server.default.candidate is not None and found(server).is_following)
        async with AsyncClient(server.endpoint) as client:
            stream = await client.open("s")
            await stream.step(frames(rng, 20))
            await until(lambda: found(server).frames == 20)
            write_model(candidate, NEWER, overwrite=True)
            reloads(candidate)
            await until(lambda: found(server).fingerprint == NEWER.fingerprint and found(server).is_following)
            await stream.step(frames(rng, 20))
            await until(lambda: found(server).frames == 20)
            assert found(server).equal == 0
            reloads(tmp_path / ("x" * 300))
            await until(lambda: len(said("candidate not reloaded")) == 1)
            reloads({"eers": candidate})
            await until(lambda: len(said("candidate not reloaded")) == 2)
            assert "did you mean 'ears'?" in said("candidate not reloaded")[1]
            assert found(server).state == "following"
            os.rename(candidate, tmp_path / "away")
            os.kill(found(server).pid or 0, signal.SIGKILL)
            await until(lambda: found(server).state == "ended")
            os.rename(tmp_path / "away", candidate)
            reloads(candidate)
            await until(lambda: found(server).is_following)
            reloads(None)
            await until(lambda: server.default.candidate is None)
        reloads(candidate, folder=candidate.name)
        await until(lambda: said("not shadowed") == [f"{candidate} is the version that is served now"])
        assert server.default.about.fingerprint == NEWER.fingerprint
        assert server.default.candidate is None
        reloads(candidate)
        await until(lambda: server.default.candidate is not None and found(server).is_following)
        await until(lambda: len(server.services) == 1)  # the client's connection kept the first version for a while
        reloads(candidate, folder=candidate.name)
        await until(lambda: len(said("not shadowed")) == 2)
        reloads(tmp_path / ("y" * 300), folder=candidate.name)
        await until(lambda: len(said("candidate not reloaded")) == 3)
        assert len(said("not shadowed")) == 2, "once for each swap"
    assert not any(line["event"] == "restart needed" for line in told)


async def test_a_server_that_ends_does_not_wait_until_a_candidate_is_read(
    candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read, may_end = threading.Event(), threading.Event()

    def read_slowly(*_: Any, **__: Any) -> None:
        is_read.set()
        may_end.wait(30)

    async with running(EARS, recording={"file": candidate.parent / "r.instep"}, engine=ENGINE) as server:
        monkeypatch.setattr("instep.server.live_shadow.find_candidate", read_slowly)
        wanted = replaced(server.config, {"folder": candidate, "shadow": candidate})
        reload(server, lambda: wanted, Threshold("info"), log_into([]), Kept())
        await until(is_read.is_set)
        began = time.monotonic()
    may_end.set()
    assert time.monotonic() - began < 15


def replaced(config: Config, model: dict[str, Any]) -> Config:
    return Config.model_validate(config.model_dump() | {"model": model})


def test_what_cannot_shadow_is_refused_in_a_sentence_before_anything_is_served(candidate: Path) -> None:
    def refused(**model: Any) -> str:
        config = Config.model_validate(
            {
                "transport": {"endpoint": "tcp://127.0.0.1:*"},
                "http": {"endpoint": "off"},
                "recording": {"file": candidate.parent},
                "model": {"folder": {"ears": candidate}, **model},
            }
        )
        with pytest.raises(CannotServe) as error:
            check(config)
        return str(error.value)

    wide = candidate.parent / "wide"
    write_model(wide, plain(5, 9))
    assert refused(shadow=wide / "x").startswith(f"model.shadow: there is no model folder {wide / 'x'}: ")
    assert f"{wide} has 9 outputs, and the model 'ears', which it is to shadow, with 8" in refused(shadow=wide)
    assert "did you mean 'ears'?" in refused(shadow={"eers": candidate})


def test_contradictions_are_refused_with_the_others(candidate: Path) -> None:
    ears, recorded = ["serve", str(candidate), "--shadow", str(candidate)], ["--record", str(candidate.parent)]
    two = ["serve", str(candidate), str(candidate.parent), "--shadow", str(candidate), *recorded]
    listed = ["serve", str(candidate), "--shadow", '["a", "b"]', *recorded]
    nameless = "does not say which model each folder is for"
    for command, words in ((ears, "nothing is recorded"), (two, "with the name of the model"), (listed, nameless)):
        result = CliRunner().invoke(app, [*command, "--set", "log.format=json", "--check"])
        assert result.exit_code == 2
        said = " ".join(json.loads(result.stderr.splitlines()[-1])["reasons"])
        assert words in said, result.stderr
