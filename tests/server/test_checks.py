"""Checks of a start: `instep serve --check` tries everything that it needs, and writes nothing."""

from __future__ import annotations

import json
import re
import resource
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.config import Config
from instep.models.folder import write_model
from instep.server import checks
from instep.server.checks import before_loading, rehearse
from instep.server.log import make_log
from instep.server.preparation import CannotServe
from tests.support.models import SMALL, plain
from tests.support.raw import RawClient
from tests.support.running import config as settings
from tests.support.running import running
from tests.support.streaming import random_frames


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", SMALL)
    return tmp_path / "model"


def configured(model: Path, **sections: dict[str, Any]) -> Config:
    return settings(model={"folder": model}, log={"format": "json"}, **sections)


def check(config: Config, *, restart: bool = False) -> None:
    rehearse(config, make_log(config.log), restart=restart)


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {line["event"]: line for line in map(json.loads, capsys.readouterr().err.splitlines())}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_it_says_what_would_be_served(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, file in (("r.instep", "r.instep"), ("new/folder", f"new/folder/{SMALL.name}.instep")):
        check(configured(model, recording={"path": tmp_path / path}, engine={"max_streams": 7}))
        lines = said(capsys)
        assert lines["would record"]["file"] == str(tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing was written"
    assert lines["can serve"]["model"] == SMALL.name
    assert lines["can serve"]["max_streams"] == 7
    assert lines["can serve"]["exactness"] == "exact"
    check(configured(model, http={"endpoint": "127.0.0.1:0"}))
    would = said(capsys)["can serve"]
    assert (would["endpoint"], would["http"]) == (
        "tcp://127.0.0.1:PORT, a free one",
        "http://127.0.0.1:PORT, a free one",
    )
    assert contents(tmp_path) == {}


async def test_a_recording_would_be_continued_and_stays_as_it_is(
    model: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    file = folder / "r.instep"
    config = configured(model, recording={"path": file}, engine={"max_batch_size": 256})
    async with running(SMALL, recording={"path": file}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        await client.step((await client.open("s", "t")).handles()[:1], [0], random_frames(rng, 3))
        capsys.readouterr()
        with pytest.raises(CannotServe, match="being written"):
            check(config)
        assert "compiled" not in said(capsys)
    before = contents(folder)
    capsys.readouterr()
    check(config)
    would = said(capsys)["would continue"]
    assert (would["streams"], would["frames_to_replay"]) == (2, 0)  # it was closed in order, with its states
    assert contents(folder) == before
    write_model(model, plain(5, 4), overwrite=True)
    with pytest.raises(CannotServe, match="model"):
        check(config)
    damaged = bytearray(before[file.name])
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    file.write_bytes(damaged)
    with pytest.raises(CannotServe):
        check(config)
    assert contents(folder) == {file.name: bytes(damaged)}


def test_what_stands_in_the_way_is_said(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CannotServe, match=re.escape(f"cannot bind {endpoint}")):
            check(configured(model, transport={"endpoint": endpoint}))
        endpoint = endpoint.removeprefix("tcp://")
        with pytest.raises(CannotServe, match=f"http.endpoint {endpoint}"):
            check(configured(model, http={"endpoint": endpoint}))
    with pytest.raises(CannotServe, match="no-token"):
        check(configured(model, http={"endpoint": "127.0.0.1:0", "token_file": tmp_path / "no-token"}))
    write_model(tmp_path / "wide", plain(2000, 4))
    with pytest.raises(CannotServe, match="max_message_bytes"):
        check(configured(tmp_path / "wide", transport={"max_message_bytes": 4096}))
    with pytest.raises(CannotServe, match=str(tmp_path / "no")):
        check(configured(model, recording={"path": tmp_path / "no" / "r.instep"}))
    (tmp_path / "same").symlink_to(model)
    for place in (model, tmp_path / "same", tmp_path / "same" / "recordings" / "r.instep", model / "model.yaml" / "r"):
        with pytest.raises(CannotServe, match=re.escape(str(place))):
            check(configured(model, recording={"path": place}))
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nothing", "loop"):
        with pytest.raises(CannotServe, match=re.escape(str(tmp_path / name))):
            check(configured(tmp_path / name))
    assert contents(tmp_path) == {}


def test_all_that_is_known_before_a_model_is_loaded_is_said_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (model / "weights.safetensors").write_bytes(b"")  # would be the next problem
    config = configured(
        model,
        engine={"device": "cuda"},
        http={"endpoint": "127.0.0.1:0", "token_file": tmp_path / "no-token"},
        recording={"path": tmp_path / "no" / "r.instep"},
        audit={"file": tmp_path / "no" / "audit"},
    )
    with pytest.raises(CannotServe) as error:
        check(config, restart=True)
    words = ("there is no folder", "audit.file", "no-token", "--restart needs a port")
    assert [each in line for each, line in zip(words, str(error.value).splitlines(), strict=True)] == [True] * 4
    with pytest.raises(CannotServe, match="CUDA"):
        check(configured(model, engine={"device": "cuda"}))
    folders = Config.model_validate({"model": {"folder": [model, tmp_path / "no"]}}).model
    config = configured(model, recording={"path": model}).model_copy(update={"model": folders})
    with pytest.raises(CannotServe, match=r"(?s)/no: .*\n.*/model is "):
        check(config)
    assert "compiled" not in said(capsys)


def test_streams_that_memory_cannot_hold_are_refused_and_such_as_it_may_not_hold_are_warned_of(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CannotServe, match=r"engine\.max_streams is 2,000,000,000"):
        check(configured(model, engine={"max_streams": 2_000_000_000}))
    check(configured(model, limits={"window_frames": 65_536}, engine={"max_streams": 2**20}))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert any(line["reason"].startswith("the limits allow 3.5 TiB, and ") for line in lines if "reason" in line)


def test_what_will_hurt_is_warned_of(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def assert_warned(config: Config, *words: str) -> None:
        found = [each.what for each in before_loading(config) if each.severity == "warning"]
        assert [word in what for word, what in zip(words, found, strict=True)] == [True] * len(words)

    monkeypatch.setattr(checks, "usable_cores", lambda: 2)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert_warned(configured(model))
    assert_warned(Config.model_validate({"model": {"folder": [model, model]}}), "3 processes")
    monkeypatch.setattr(checks, "usable_cores", lambda: 1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    recording = {"path": tmp_path / "r.instep", "warn_free_bytes": 2**60}
    assert_warned(configured(model, recording=recording), "free", "one core", "needs 16,484", "NUMBA_DISABLE_JIT")


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "allowed"),
    [(1024, 4096, 1000, 1024), (1024, 4096, 9000, 4096), (1024, resource.RLIM_INFINITY, 9000, 9000)],
)
def test_the_soft_limit_of_open_files_is_raised_as_far_as_needed_and_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, allowed: int
) -> None:
    kept = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: kept[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: kept.append(limits))
    assert checks.allow_open_files(wanted) == allowed
    assert kept[-1] == (max(soft, allowed), hard)


@pytest.mark.parametrize(
    ("hard", "with_keys", "most"),
    [
        (resource.RLIM_INFINITY, True, 9000),
        (20_000, True, 9000),
        (10_000, False, 9000),
        (10_000, True, 10_000 - 100 - 4048),
        (4096, True, 2048),
        (9000, False, 8900),
    ],
)
def test_descriptors_are_kept_back_from_connections(
    monkeypatch: pytest.MonkeyPatch, hard: int, with_keys: bool, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    files = {"key_file": "a", "peers_file": "b"} if with_keys else {}
    assert checks.max_connections(settings(limits={"max_connections": 9000}, transport=files)) == most
