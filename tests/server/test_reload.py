"""SIGHUP: the configuration is read again, or the server ends in order because its terminal is gone."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from instep.config import Config, ConfigError, load_config
from instep.models.folder import write_model
from instep.server.log import Threshold
from instep.server.serve import CHANGEABLE, MODELS, Kept, reload
from instep_client.protocol.wire import Code
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import log_into, running
from tests.support.served import serving

pytestmark = pytest.mark.heavy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", SMALL)
    return tmp_path / "model"


def with_keys(config: Config, **keys: Any) -> Config:
    """Another configuration: `section__key=value`."""
    sections = config.model_dump()
    for path, value in keys.items():
        section, key = path.split("__")
        sections[section][key] = value
    return Config.model_validate(sections)


async def test_what_can_change_does_and_what_cannot_is_named() -> None:
    told: list[dict[str, Any]] = []
    limits = {"max_idle_s": 0.0, "park_s": 100.0}
    async with running(SMALL, limits=limits) as server, RawClient(server.endpoint) as client:
        await client.hello()
        opened = await client.open("s")
        threshold = Threshold("error")
        wanted = with_keys(server.config, limits__max_idle_s=0.1, limits__window_frames=8, log__level="warning")
        await reload(server, lambda: wanted, threshold, log_into(told), Kept())
        reloaded, restart = told
        assert reloaded["event"] == "reloaded"
        assert reloaded["changed"] == ["limits.max_idle_s: 0.0 → 0.1", "log.level: info → warning"]
        assert (restart["event"], restart["level"]) == ("restart needed", "warning")
        assert restart["keys"] == ["limits.window_frames"]
        assert "limits.window_frames" in server.outdated
        assert threshold.level == "warning"
        assert server.config == with_keys(wanted, limits__window_frames=32)
        evicted = await client.receive()  # it is idle for longer than the new limit
        assert evicted.header[3] == Code.IDLE
        assert evicted.handles().tolist() == opened.handles().tolist()
        async with RawClient(server.endpoint) as later:
            welcome = await later.hello()
            assert 0.1 in welcome.header
        told.clear()
        models = with_keys(server.config, model__folder=Path("other"), limits__park_s=9.0)
        await reload(server, lambda: models, threshold, log_into(told), Kept())
        (line,) = told
        assert line["changed"] == ["limits.park_s: 100.0 → 9.0"]
        assert line["under_way"] == ["model.folder: None → other"], "no such folder: this will never be in force"


async def test_a_broken_configuration_changes_nothing_and_every_problem_is_told(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    file = tmp_path / "c.yaml"
    file.write_text("limits: {max_idle_s: soon, max_idel_s: 3}\n")
    async with running(SMALL) as server:
        before, threshold = server.config, Threshold("error")
        await reload(server, lambda: load_config(file), threshold, log_into(told), Kept())
        with pytest.raises(ZeroDivisionError):
            await reload(server, lambda: with_keys(before, limits__park_s=1 / 0), threshold, log_into(told), Kept())
        assert server.config is before
        assert "limits.max_idel_s" in server.outdated
        assert threshold.level == "error"
    with pytest.raises(ConfigError) as wrong:
        load_config(file)
    assert [(line["level"], line["event"], line["reason"]) for line in told] == [
        ("error", "not reloaded", str(problem)) for problem in wrong.value.problems
    ]
    assert len(told) == 2


def test_the_manual_marks_the_keys_that_can_change() -> None:
    marked, section, before = [], "", ""
    for line in (Path(__file__).parents[2] / "configs" / "default.yaml").read_text().splitlines():
        if found := re.match(r"(\w+):", line):
            section = found[1]
        elif (found := re.match(r"  (\w+):", line)) and before.endswith(" (*)"):
            marked.append(f"{section}.{found[1]}")
        before = line
    assert tuple(marked) == (*MODELS, *CHANGEABLE)


def test_a_hangup_reloads_the_file_also_when_it_comes_before_the_server_is_ready(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("limits: {park_s: 7}\n")
    with serving(model, "--config", str(file), "--set", "limits.max_idle_s=8", start_new_session=True) as served:
        served.until("loading")
        file.write_text("limits: {park_s: 9, max_idle_s: 9}\nengine: {max_batch_size: 2}\n")
        served.process.send_signal(signal.SIGHUP)
        assert served.until("reloaded")["changed"] == ["limits.park_s: 7.0 → 9.0"]
        assert served.until("restart needed")["keys"] == ["engine.max_batch_size"]
        file.write_text("limits: [\n")
        served.process.send_signal(signal.SIGHUP)
        assert "not a configuration in YAML" in served.until("not reloaded")["reason"]
        served.process.terminate()
        assert [line["event"] for line in served.end()] == ["stopping", "stopped"]
        assert served.process.returncode == 0
