"""From a file, the environment and flags to one configuration, and what is said of one that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from instep.config import Config, ConfigError, explain_config, load_config, unknown_variables


def written(folder: Path, text: str | Mapping[str, Any]) -> Path:
    file = folder / "instep.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return file


def problems(file: Path | None = None, flags: Mapping[str, str] | None = None) -> list[str]:
    """The place of each problem, without its sentence."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, flags)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return [problem.partition(": ")[0] for problem in caught.value.problems]


def test_flag_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, {"limits": {"max_idle_s": 1, "park_s": 1, "max_connections": 1}})
    monkeypatch.setenv("INSTEP_LIMITS__MAX_IDLE_S", "2")
    monkeypatch.setenv("INSTEP_LIMITS__PARK_S", "2")
    config, sources = explain_config(file, {"limits.max_idle_s": "3"})
    limits = config.limits
    assert (limits.max_idle_s, limits.park_s, limits.max_connections) == (3.0, 2.0, 1)
    assert sources["limits.max_idle_s"] == "flag"
    assert sources["limits.park_s"] == "INSTEP_LIMITS__PARK_S"
    assert sources["limits.max_connections"] == f"file {file}"
    assert sources["limits.credit_frames"] == "default"
    assert len(sources) == sum(len(section) for section in config.model_dump().values())


@pytest.mark.parametrize("text", ["", "# only a comment\n", "limits:\n", "---\n{}\n"])
def test_a_file_that_says_nothing_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(written(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("engine.max_batch_size", "4", 4),
        ("limits.max_idle_s", "1e-3", 0.001),
        ("transport.allow_plaintext", "true", True),
        ("http.endpoint", "off", None),
        ("recording.path", "/123", Path("/123")),
        ("log.level", "DEBUG", "debug"),
        ("engine.device", "cuda:127", "cuda:127"),
    ],
)
def test_text_becomes_the_type_of_its_key(path: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    section, key = path.split(".")
    by_flag = load_config(None, {path: text})
    monkeypatch.setenv(f"INSTEP_{section}__{key}".upper(), text)
    for config in (by_flag, load_config()):
        found = getattr(getattr(config, section), key)
        assert (found, type(found)) == (value, type(value))


def test_paths_in_a_file_are_relative_to_it_and_others_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("INSTEP_HTTP__TOKEN_FILE", "t")
    file = written(tmp_path / "sub", {"model": {"folder": "../m"}, "recording": {"path": "/abs/r"}})
    config, here = load_config(file, {"log.file": "~/l"}), tmp_path.resolve()
    assert (config.model.folder, config.recording.path) == (here / "m", Path("/abs/r"))
    assert (config.http.token_file, config.log.file) == (here / "t", Path("/home/somebody/l"))


def test_one_file_is_refused_where_several_recordings_would_be_needed() -> None:
    assert problems(None, {"verify.live": "true"}) == ["verify.live (flag)"]
    several = {"model.folder": "[a, b]", "model.on_reload": "move"}
    expected = ["model.on_reload (flag)", "recording.path (flag)"]
    assert problems(None, {"recording.path": "/r.instep", **several}) == expected
    for path in ("/r", "/r/", "/r.db", "/r.instep/new"):
        load_config(None, {"recording.path": path, **several})


def test_models_are_listed_or_named_in_a_file_in_flags_and_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path.resolve()
    file = written(tmp_path, {"model": {"folder": {"a": "x", "b": "/y"}}})
    assert load_config(file).model.folders == [("a", here / "x"), ("b", Path("/y"))]
    listed = [(None, here / "x"), (None, here / "y")]
    assert load_config(file, {"model.folder": '["x", "y"]'}).model.folders == listed
    monkeypatch.setenv("INSTEP_MODEL__FOLDER", "{b: x, a: y}")
    assert load_config(file).model.folders == [("b", here / "x"), ("a", here / "y")]
    assert load_config(file, {"model.folder": "x"}).model.folders == listed[:1]
    for folders in ([], {}, ["x", 5], {"a": None}, 7):
        file = written(tmp_path, {"model": {"folder": folders}})
        monkeypatch.delenv("INSTEP_MODEL__FOLDER", raising=False)
        assert problems(file) == [f"model.folder (file {file})"]


def test_all_problems_are_reported_at_once_each_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(
        tmp_path,
        {
            "limts": {"max_idle_s": 1},
            "endpoint": "tcp://127.0.0.1:1",
            "model": {"folder": 7},
            "transport": {"endpoint": "tcp://0.0.0.0:5757", "handshake_timeout": 3},
            "limits": {"max_idle_s": "soon", "max_connections": 1.5},
            "verify": 5,
        },
    )
    monkeypatch.setenv("INSTEP_ENGINE__THREDS", "2")
    monkeypatch.setenv("INSTEP_ENGIN__DEVICE", "cpu")
    assert sorted(problems(file, {"engine.device": "gpu", "recording.keep_s": "3"})) == sorted(
        [
            *(
                f"{path} (file {file})"
                for path in ("limts.max_idle_s", "endpoint", "model.folder", "transport.handshake_timeout")
            ),
            *(f"{path} (file {file})" for path in ("limits.max_idle_s", "limits.max_connections", "verify")),
            *("engine.threds (INSTEP_ENGINE__THREDS)", "engin.device (INSTEP_ENGIN__DEVICE)"),
            *("engine.device (flag)", "recording.keep_s (flag)"),
        ]
    )


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("limits.max_idel_s=1", "limits.max_idle_s"),
        ("engine.max_idle_s=1", "limits.max_idle_s"),
        ("limits.max_streams=1", "engine.max_streams"),
        ("recording.file=r", "recording.path"),
        ("xyzzy=1", "default.yaml"),
        ("limits.park_s=abc", "a number of seconds, not 'abc'"),
        ("recording.keep_bytes=3 GB", "a whole number of bytes, not '3 GB'"),
        ("verify.live=perhaps", "true or false"),
        ("engine.device=cuda:128", "cuda:127"),
    ],
)
def test_a_problem_names_the_key_that_was_meant_or_the_type_and_unit(setting: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant):
        load_config(None, dict([setting.split("=")]))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("engine", "max_batch_size", 0),
        ("engine", "max_batch_size", True),
        ("limits", "Park_s", 5),
        ("transport", "heartbeat_s", 0),
        ("limits", "max_idle_s", float("nan")),
        ("recording", "path", "a\0"),
        ("model", "folder", "[a, b"),
        ("model", "folder", {"a": "b\0"}),
        ("model", "on_reload", "replay:0"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, section: str, key: str, value: object) -> None:
    file = written(tmp_path, {section: {key: value}})
    assert problems(file) == [f"{section}.{key} (file {file})"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "- a\n",
            "limits\n",
            "limits: {max_idle_s: 1\n",
            "limits:\n\tx: 2\n",
            "log: !!python/object/apply:os.getcwd []\n",
        ),
        *("---\n{}\n---\n{}\n", "\x00", f"limits: {'[' * 3000}{']' * 3000}\n", "limits: {max_idle_s: !!bool soon}\n"),
    ],
)
def test_a_file_that_is_not_sections_of_keys_is_refused(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, text)
    assert problems(file) == [f"file {file}"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("recording: {path: r}\nlimits: {}\nrecording: {keep_s: 5}\n", "recording"),
        ("limits:\n  park_s: 5\n  park_s: 6\n", "park_s"),
        ("model: {folder: {a: x, 'a': y}}\n", "a"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"instep\.yaml: .*{key}"):
        load_config(written(tmp_path, text))


def test_a_durability_that_is_asked_for_needs_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, {"recording": {"durability": "commit"}})
    load_config(file)  # which repeats the default
    for durability in ("commit", "fsync"):
        assert problems(file, {"recording.durability": durability}) == ["recording.durability (flag)"]
    load_config(file, {"recording.durability": "memory"})
    monkeypatch.setenv("INSTEP_RECORDING__DURABILITY", "commit")
    assert problems(file) == ["recording.durability (INSTEP_RECORDING__DURABILITY)"]
    load_config(file, {"recording.path": "r"})


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"log: \xe9\xff\n")
    for file in (tmp_path / "no.yaml", tmp_path, latin):
        assert problems(file) == [f"file {file}"]


@pytest.mark.parametrize(
    ("name", "meant"), [("INSTEP_MAX_STREAMS", "INSTEP_ENGINE__MAX_STREAMS"), ("INSTEP_COLOUR", "lists every key")]
)
def test_a_variable_that_is_not_a_setting_is_told(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (name, "INSTEP_MODEL", "INSTEP_ENDPOINT"):
        monkeypatch.setenv(each, "3")
    monkeypatch.setenv("INSTEP_ENGINE__MAX_STREAMS", "3")
    (told,) = unknown_variables()
    assert told.startswith(f"{name} is not a setting, and was ignored; ")
    assert meant in told
    assert load_config().model.folder is None
