"""From a file, the environment and flags to one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from instep.config import Config, explain_config, load_config, unknown_variables
from tests.support.configurations import problems, written


class TestPrecedence:
    def test_flag_over_environment_over_file_over_default(self, tmp_path: Path) -> None:
        file = written(tmp_path, {"limits": {"max_idle_s": 1, "park_s": 1, "max_connections": 1}})
        environ = {"INSTEP_LIMITS__MAX_IDLE_S": "2", "INSTEP_LIMITS__PARK_S": "2"}
        config, sources = explain_config(file, {"limits.max_idle_s": "3"}, environ)
        limits = config.limits
        assert (limits.max_idle_s, limits.park_s, limits.max_connections) == (3.0, 2.0, 1)
        assert sources["limits.max_idle_s"] == "flag"
        assert sources["limits.park_s"] == "INSTEP_LIMITS__PARK_S"
        assert sources["limits.max_connections"] == f"file {file}"
        assert sources["limits.credit_frames"] == "default"
        assert len(sources) == sum(len(section) for section in config.model_dump().values())

    def test_null_in_a_stronger_place_takes_a_value_back(self, tmp_path: Path) -> None:
        file = written(tmp_path, {"recording": {"file": "a.instep"}, "model": {"folder": "a"}})
        config = load_config(file, {"recording.file": "null"}, {"INSTEP_MODEL__FOLDER": ""})
        assert (config.recording.file, config.model.folder) == (None, None)

    def test_the_environment_of_the_process_is_not_read_unless_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INSTEP_ENGINE__MAX_BATCH_SIZE", "7")
        assert load_config().engine.max_batch_size == 512

    def test_variables_of_others_and_without_a_double_underscore_are_left_alone(self) -> None:
        assert load_config(None, None, {"INSTEP_HOME": "x", "OTHER__KEY": "x", "XINSTEP_A__B": "x"}) == Config()


class TestText:
    @pytest.mark.parametrize(
        ("path", "text", "value"),
        [
            ("engine.max_batch_size", "4", 4),
            ("limits.max_idle_s", "1e-3", 0.001),
            ("limits.max_idle_s", "5", 5.0),
            ("transport.allow_plaintext", "true", True),
            ("http.endpoint", "off", None),  # YAML would make False of it
            ("recording.file", "/123", Path("/123")),
            ("log.level", "debug", "debug"),
            ("engine.device", "cuda:1", "cuda:1"),
        ],
    )
    def test_becomes_the_type_of_the_key(self, path: str, text: str, value: object) -> None:
        section, key = path.split(".")
        variable = f"INSTEP_{section}__{key}".upper()
        for config in (load_config(None, {path: text}), load_config(None, None, {variable: text})):
            found = getattr(getattr(config, section), key)
            assert found == value
            assert isinstance(found, type(value))

    def test_words_may_be_in_capitals(self) -> None:
        assert load_config(overrides={"log.level": "DEBUG", "log.format": "Json"}).log.level == "debug"


class TestPaths:
    def test_in_a_file_are_relative_to_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        file = written(tmp_path / "sub", {"model": {"folder": "../m"}, "recording": {"file": "/abs/r"}})
        config = load_config(file)
        assert (config.model.folder, config.recording.file) == (tmp_path.resolve() / "m", Path("/abs/r"))

    def test_in_flags_and_environment_are_relative_to_the_current_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = load_config(None, {"model.folder": "m"}, {"INSTEP_RECORDING__FILE": "r"})
        assert (config.model.folder, config.recording.file) == (tmp_path.resolve() / "m", tmp_path.resolve() / "r")

    def test_may_begin_with_the_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/somebody")
        assert load_config(None, {"model.folder": "~/m"}).model.folder == Path("/home/somebody/m")

    def test_a_folder_of_recordings_must_exist(self, tmp_path: Path) -> None:
        folder = f"{tmp_path}/recordings/"
        (problem,) = problems(overrides={"recording.file": folder})
        assert str(problem).startswith(f"recording.file (flag): there is no folder {folder}; make it")
        (overlong,) = problems(overrides={"recording.file": f"{tmp_path}/{'r' * 300}/"})
        assert overlong.message.startswith("there is no folder")
        Path(folder).mkdir()
        assert load_config(overrides={"recording.file": folder}).recording.file == Path(folder)


class TestSeveralModels:
    def test_are_listed_or_named_in_a_file_in_flags_and_in_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        here = tmp_path.resolve()
        file = written(tmp_path, {"model": {"folder": {"a": "x", "b": "/y"}}})
        assert load_config(file).model.folders == [("a", here / "x"), ("b", Path("/y"))]
        listed = [(None, here / "x"), (None, here / "y")]
        assert load_config(file, {"model.folder": '["x", "y"]'}).model.folders == listed
        environ = {"INSTEP_MODEL__FOLDER": "{b: x, a: y}"}
        assert load_config(file, {}, environ).model.folders == [("b", here / "x"), ("a", here / "y")]
        assert load_config(file, {"model.folder": "x"}, environ).model.folders == listed[:1]
        assert load_config(file, {"model.folder": ""}).model.folders == []

    @pytest.mark.parametrize("folders", [[], {}, ["x", 5], {"a": None}])
    def test_that_are_no_folders_are_a_problem(self, tmp_path: Path, folders: object) -> None:
        (found,) = problems(written(tmp_path, {"model": {"folder": folders}}))
        assert found.path == "model.folder"
        assert "is neither a folder nor several, as [A, B] or {NAME: A, OTHER: B}" in found.message


class TestWhatIsNoSetting:
    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("INSTEP_MAX_STREAMS", "was ignored; did you mean INSTEP_ENGINE__MAX_STREAMS?"),
            ("INSTEP_LOG_LEVEL", "was ignored; did you mean INSTEP_LOG__LEVEL?"),
            ("INSTEP_COLOUR", "was ignored; instep config lists every setting"),
            ("INSTEP_MODEL", "is for clients; the server's is INSTEP_MODEL__FOLDER"),
            ("INSTEP_ENDPOINT", "is for clients; the server's is INSTEP_TRANSPORT__ENDPOINT"),
        ],
    )
    def test_is_told(self, name: str, sentence: str) -> None:
        environ = {name: "3", "PATH": "/bin", "INSTEP_ENGINE__MAX_STREAMS": "3"}
        (told,) = unknown_variables(environ, "tcp://127.0.0.1:5757")
        assert told.startswith(name)
        assert sentence in told

    def test_both_endpoints_may_be_set(self) -> None:
        assert unknown_variables({"INSTEP_ENDPOINT": "a", "INSTEP_TRANSPORT__ENDPOINT": "b"}, "b") == []

    @pytest.mark.parametrize("listens", ["tcp://*:5757", "tcp://0.0.0.0:5757", "tcp://127.0.0.1:5757"])
    @pytest.mark.parametrize("client", ["tcp://127.0.0.1:5757", "tcp://localhost:5757"])
    def test_clients_may_be_sent_to_this_server(self, listens: str, client: str) -> None:
        assert unknown_variables({"INSTEP_ENDPOINT": client}, listens) == []
        assert len(unknown_variables({"INSTEP_ENDPOINT": client.replace("5757", "5758")}, listens)) == 1
