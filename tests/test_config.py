from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from instep.config import (
    Config,
    ConfigError,
    EngineConfig,
    LimitsConfig,
    Problem,
    TransportConfig,
    explain_config,
    load_config,
    unknown_variables,
)
from instep.config.endpoint import is_loopback

CONFIGS = Path(__file__).parents[1] / "configs"


def problems(
    file: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides, environ)
    return caught.value.problems


def written(folder: Path, text: str | Mapping[str, Any]) -> Path:
    file = folder / "instep.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return file


class TestTheManual:
    text = (CONFIGS / "default.yaml").read_text(encoding="utf-8")

    def test_lists_every_key_with_the_default_of_the_code_and_nothing_else(self) -> None:
        manual = yaml.safe_load(self.text)
        code = Config().model_dump(mode="json")
        assert manual == code
        assert [(name, list(keys)) for name, keys in manual.items()] == [
            (name, list(keys)) for name, keys in code.items()
        ]
        for name, keys in code.items():  # 1 and 1.0 and true are equal to ==
            assert {key: type(value) for key, value in manual[name].items()} == {
                key: type(value) for key, value in keys.items()
            }

    def test_explains_every_key_in_the_lines_above_it(self) -> None:
        lines = self.text.splitlines()
        keys = [number for number, line in enumerate(lines) if re.match(r"  \w+:", line)]
        assert len(keys) == sum(len(section) for section in Config().model_dump().values())
        for number in keys:
            assert lines[number - 1].startswith("  # "), lines[number]

    def test_names_the_unit_where_the_key_has_one(self) -> None:
        lines = self.text.splitlines()
        units = {"_us": "Microseconds", "_s": "Seconds", "_bytes": "Bytes"}
        found = 0
        for number, line in enumerate(lines):
            match = re.match(r"  \w+?(_us|_s|_bytes):", line)
            if match:
                above = lines[:number]
                while above[-1].startswith("  #"):
                    comment = above.pop()
                assert comment.startswith(f"  # {units[match[1]]}"), line
                found += 1
        assert found == 17

    def test_loads_as_the_defaults(self) -> None:
        assert load_config(CONFIGS / "default.yaml") == Config() == load_config()


class TestShippedConfigs:
    @pytest.mark.parametrize(("name", "folder"), [("seed", "seed_model"), ("demo", "model")])
    def test_name_a_folder_that_is_there(self, name: str, folder: str) -> None:
        model = load_config(CONFIGS / f"{name}.yaml").model
        assert model.folder == CONFIGS.parent / "engine/instep/demo" / folder
        assert (model.folder / "model.yaml").is_file()


class TestPrecedence:
    def test_flag_over_environment_over_file_over_default(self, tmp_path: Path) -> None:
        file = written(tmp_path, {"limits": {"max_idle_s": 1, "unreachable_after_s": 1, "max_connections": 1}})
        environ = {"INSTEP_LIMITS__MAX_IDLE_S": "2", "INSTEP_LIMITS__UNREACHABLE_AFTER_S": "2"}
        config, sources = explain_config(file, {"limits.max_idle_s": "3"}, environ)
        limits = config.limits
        assert (limits.max_idle_s, limits.unreachable_after_s, limits.max_connections) == (3.0, 2.0, 1)
        assert sources["limits.max_idle_s"] == "flag"
        assert sources["limits.unreachable_after_s"] == "INSTEP_LIMITS__UNREACHABLE_AFTER_S"
        assert sources["limits.max_connections"] == f"file {file}"
        assert sources["limits.credit_frames"] == "default"
        assert len(sources) == sum(len(section) for section in config.model_dump().values())

    def test_null_in_a_stronger_place_takes_a_value_back(self, tmp_path: Path) -> None:
        file = written(tmp_path, {"recording": {"file": "a.instep"}, "model": {"folder": "a"}})
        config = load_config(file, {"recording.file": "null"}, {"INSTEP_MODEL__FOLDER": ""})
        assert (config.recording.file, config.model.folder) == (None, None)

    def test_the_environment_of_the_process_is_not_read_unless_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("INSTEP_ENGINE__THREADS", "7")
        assert load_config().engine.threads == 1

    def test_variables_of_others_and_without_a_double_underscore_are_left_alone(self) -> None:
        assert load_config(None, None, {"INSTEP_HOME": "x", "OTHER__KEY": "x", "XINSTEP_A__B": "x"}) == Config()


class TestText:
    @pytest.mark.parametrize(
        ("path", "text", "value"),
        [
            ("engine.threads", "4", 4),
            ("limits.max_idle_s", "1e-3", 0.001),
            ("limits.max_idle_s", "5", 5.0),
            ("transport.allow_plaintext", "true", True),
            ("engine.exactness", "off", "off"),  # YAML would make False of it
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


class TestProblems:
    def test_are_all_reported_at_once_each_with_path_source_and_suggestion(self, tmp_path: Path) -> None:
        file = written(
            tmp_path,
            {
                "limts": {"max_idle_s": 1},
                "endpoint": "tcp://127.0.0.1:1",
                "log": "debug",
                "model": {"folder": 7},
                "transport": {"endpoint": "tcp://0.0.0.0:5757", "handshake_timeout": 3},
                "limits": {"max_pending_frames": 10, "max_idle_s": "soon", "max_connections": 1.5},
            },
        )
        found = problems(file, {"engine.device": "gpu"}, {"INSTEP_ENGINE__THREDS": "2"})
        where = f"file {file}"
        assert {(each.path, each.source) for each in found} == {
            ("limts", where),
            ("endpoint", where),
            ("log", where),
            ("model.folder", where),
            ("transport.endpoint", where),
            ("transport.handshake_timeout", where),
            ("limits.credit_frames", "default"),
            ("limits.max_idle_s", where),
            ("limits.max_connections", where),
            ("engine.device", "flag"),
            ("engine.threds", "INSTEP_ENGINE__THREDS"),
        }
        assert len(found) == 11
        assert all(each.message and each.suggestion for each in found)
        with pytest.raises(ConfigError) as caught:
            load_config(file, {"engine.device": "gpu"}, {"INSTEP_ENGINE__THREDS": "2"})
        assert str(caught.value).splitlines() == [str(each) for each in found]

    @pytest.mark.parametrize(
        ("path", "suggestion"),
        [
            ("limits.max_idel_s", "did you mean limits.max_idle_s?"),
            ("engine.max_idle_s", "did you mean limits.max_idle_s?"),
            ("threads", "did you mean engine.threads?"),
            ("xyzzy", "configs/default.yaml lists every key"),
        ],
    )
    def test_unknown_flags_say_what_was_meant(self, path: str, suggestion: str) -> None:
        (found,) = problems(None, {path: "1"})
        assert found == Problem(path, "flag", "there is no such key", suggestion)

    @pytest.mark.parametrize(
        ("document", "path", "suggestion"),
        [
            ({"limts": {}}, "limts", "did you mean limits?"),
            ({"endpoint": "x"}, "endpoint", "did you mean transport.endpoint?"),
            ({"limits": {"max_idle": 1}}, "limits.max_idle", "did you mean limits.max_idle_s?"),
        ],
    )
    def test_unknown_keys_in_files_say_what_was_meant(
        self, tmp_path: Path, document: dict[str, Any], path: str, suggestion: str
    ) -> None:
        (found,) = problems(written(tmp_path, document))
        assert (found.path, found.suggestion) == (path, suggestion)

    def test_unknown_variables_are_answered_with_a_variable(self) -> None:
        (found,) = problems(None, None, {"INSTEP_LIMITS__MAX_IDEL_S": "1"})
        assert (found.source, found.suggestion) == (
            "INSTEP_LIMITS__MAX_IDEL_S",
            "did you mean INSTEP_LIMITS__MAX_IDLE_S?",
        )

    @pytest.mark.parametrize(
        ("section", "key", "value"),
        [
            ("engine", "threads", "1"),
            ("engine", "threads", True),
            ("engine", "threads", 1.0),
            ("engine", "threads", 0),
            ("engine", "threads", None),
            ("engine", "max_batch_size", 4097),
            ("engine", "exactness", False),
            ("engine", "exactness", "exact"),
            ("engine", "device", "gpu"),
            ("engine", "device", "cuda:"),
            ("engine", "max_queue_delay_us", -1),
            ("transport", "allow_plaintext", "yes please"),
            ("transport", "allow_plaintext", 1),
            ("transport", "endpoint", "127.0.0.1:5757"),
            ("transport", "endpoint", "tcp://127.0.0.1"),
            ("transport", "endpoint", "tcp://127.0.0.1:0"),
            ("transport", "endpoint", "tcp://a..b:1"),
            ("transport", "endpoint", "tcp://127.0.0.1:65536"),
            ("transport", "endpoint", "udp://127.0.0.1:1"),
            ("transport", "endpoint", "ipc://"),
            ("transport", "endpoint", "ipc://" + "x" * 108),
            ("transport", "heartbeat_s", 0),
            ("transport", "send_high_water_mark", 0),  # ZeroMQ's word for no bound
            ("limits", "max_idle_s", float("nan")),
            ("limits", "max_idle_s", float("inf")),
            ("limits", "max_idle_s", "3600"),
            ("limits", "max_connections", 10**30),
            ("recording", "file", 5),
            ("recording", "file", ["a"]),
            ("log", "level", "warn"),
            ("model", "network", "gru"),
        ],
    )
    def test_wrong_values_in_files_are_named(self, tmp_path: Path, section: str, key: str, value: object) -> None:
        (found,) = problems(written(tmp_path, {section: {key: value}}))
        assert (found.path, found.source) == (f"{section}.{key}", f"file {tmp_path / 'instep.yaml'}")

    def test_a_wrong_value_is_quoted_and_the_default_told(self) -> None:
        (found,) = problems(None, {"limits.max_idle_s": "soon"})
        assert str(found) == "limits.max_idle_s (flag): it should be a valid number, not 'soon'; the default is 3600.0"

    @pytest.mark.parametrize(
        ("path", "value", "meant"),
        [
            ("engine.exactness", "prefered", "prefer"),
            ("log.level", "Warn", "warning"),
            ("engine.steps_in", "cores", ""),
        ],
    )
    def test_a_word_that_is_close_to_one_of_a_few_is_answered_with_that(
        self, path: str, value: str, meant: str
    ) -> None:
        (found,) = problems(None, {path: value})
        assert found.suggestion == (f"did you mean {meant}?" if meant else 'the default is "auto"')

    def test_long_values_are_cut(self) -> None:
        (found,) = problems(None, {"log.level": "x" * 1000})
        assert len(str(found)) < 250

    def test_a_wrong_value_is_a_problem_even_where_a_stronger_place_overrides_it(self, tmp_path: Path) -> None:
        (found,) = problems(written(tmp_path, {"engine": {"threads": 0}}), {"engine.threads": "2"})
        assert found.path == "engine.threads"

    def test_text_that_is_not_yaml(self) -> None:
        (found,) = problems(None, {"engine.threads": "[1"})
        assert (found.path, "not valid YAML" in found.message) == ("engine.threads", True)

    def test_text_with_a_key_twice(self) -> None:
        (found,) = problems(None, {"engine.threads": "{features: 3, features: 4}"})
        assert "the key 'features' stands twice" in found.message


class TestFiles:
    @pytest.mark.parametrize("text", ["", "# only a comment\n", "limits:\n", "---\n{}\n"])
    def test_that_say_nothing_mean_the_defaults(self, tmp_path: Path, text: str) -> None:
        assert load_config(written(tmp_path, text)) == Config()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- a\n- b\n", "it holds a list, not sections with keys"),
            ("limits\n", "it holds a str, not sections with keys"),
            ("limits: {max_idle_s: 1\n", "line 2"),
            ("limits:\n  max_idle_s: 1\n\tx: 2\n", "line 3"),
            ("log: !!python/object/apply:os.getcwd []\n", "python/object"),
            ("a: &x {b: 1}\nc: *x\n", "anchors and aliases"),
            ("limits: {<<: {max_idle_s: 1}}\n", "line 1"),
            ("5: {}\n", "the key 5 is not a word"),
            ("on: {}\n", "the key True is not a word"),
            ("limits: {max_idle_s: 2001-99-99}\n", "month"),
            ("---\n{}\n---\n{}\n", "line 3"),
            ("\x00", "special characters are not allowed"),
            (f"limits: {'[' * 3000}{']' * 3000}\n", "nested too deeply"),
            ("limits: {max_idle_s: !!bool soon}\n", "does not fit its tag"),
            ("limits: {max_idle_s: !!timestamp soon}\n", "does not fit its tag"),
            ("recording: {file: ~nobody-by-this-name/r.instep}\n", "no home directory"),
        ],
    )
    def test_that_are_not_sections_of_keys_are_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (found,) = problems(written(tmp_path, text))
        assert found.source == f"file {tmp_path / 'instep.yaml'}"
        assert message in found.message

    def test_with_a_key_twice_are_refused_with_both_lines_of_each(self, tmp_path: Path) -> None:
        text = "limits:\n  max_idle_s: 1\n  max_idle_s: 2\nlog: {}\nlog: {}\n"
        found = problems(written(tmp_path, text))
        assert {each.message for each in found} == {
            "the key 'max_idle_s' stands twice, in lines 2 and 3",
            "the key 'log' stands twice, in lines 4 and 5",
        }

    def test_that_cannot_be_read(self, tmp_path: Path) -> None:
        (missing,) = problems(tmp_path / "no.yaml")
        assert "No such file" in missing.message
        (folder,) = problems(tmp_path)
        assert "cannot be read" in folder.message
        (tmp_path / "latin.yaml").write_bytes(b"log: \xe9\xff\n")
        (latin,) = problems(tmp_path / "latin.yaml")
        assert latin.message == "it is not a text file"

    def test_dates_are_not_numbers(self, tmp_path: Path) -> None:
        (found,) = problems(written(tmp_path, "limits: {max_idle_s: 2001-01-01}\n"))
        assert found.path == "limits.max_idle_s"


class TestContradictions:
    @pytest.mark.parametrize(
        ("document", "path", "words"),
        [
            ({"transport": {"endpoint": "tcp://*:5757"}}, "transport.endpoint", "no encryption"),
            ({"transport": {"endpoint": "tcp://10.0.0.1:5757"}}, "transport.endpoint", "other machines"),
            ({"transport": {"endpoint": "tcp://eth0:5757"}}, "transport.endpoint", "other machines"),
            ({"transport": {"endpoint": "tcp://[::]:5757"}}, "transport.endpoint", "other machines"),
            ({"recording": {"keep_bytes": 1000}}, "recording.keep_bytes", "nothing is recorded"),
            ({"recording": {"keep_s": 9.0}}, "recording.keep_s", "nothing is recorded"),
            ({"limits": {"credit_frames": 131_073}}, "limits.credit_frames", "131073 frames"),
            ({"limits": {"max_block_frames": 16_385}}, "limits.max_block_frames", "16384 in flight"),
            ({"limits": {"first_frame_s": 3600.5}}, "limits.first_frame_s", "max_idle_s = 3600 s"),
            ({"limits": {"first_frame_s": 3, "max_idle_s": 2.5}}, "limits.first_frame_s", "idle after"),
        ],
    )
    def test_are_refused(self, tmp_path: Path, document: dict[str, Any], path: str, words: str) -> None:
        (found,) = problems(written(tmp_path, document))
        assert found.path == path
        assert words in found.message

    @pytest.mark.parametrize(
        "document",
        [
            {"engine": {"max_streams": 4, "max_batch_size": 256}},
            {"limits": {"max_block_frames": 5, "credit_frames": 5, "max_pending_frames": 5}},
            {"limits": {"first_frame_s": 3600, "max_idle_s": 3600}},
            {"limits": {"first_frame_s": 1e6, "max_idle_s": 0}},
            {"limits": {"window_frames": 65_536, "max_block_frames": 5, "credit_frames": 5}},
            {"engine": {"max_streams": 4, "max_batch_size": 4}, "limits": {"max_parked_streams": 5, "park_s": 0}},
            {"transport": {"endpoint": "tcp://*:5757", "allow_plaintext": True}},
            {"transport": {"allow_plaintext": True}},
        ],
    )
    def test_what_merely_looks_odd_is_accepted(self, tmp_path: Path, document: dict[str, Any]) -> None:
        dumped = load_config(written(tmp_path, document)).model_dump()
        for section, keys in document.items():
            assert dumped[section] == dumped[section] | keys

    def test_keys_that_are_wrong_by_themselves_are_not_also_said_to_contradict(self, tmp_path: Path) -> None:
        file = written(tmp_path, {"limits": {"max_pending_frames": 10, "credit_frames": "x", "max_block_frames": 1}})
        assert [each.path for each in problems(file)] == ["limits.credit_frames"]

    def test_cannot_be_made_in_python_either(self) -> None:
        with pytest.raises(ValidationError, match="no encryption"):
            Config(transport=TransportConfig(endpoint="tcp://0.0.0.0:1"))
        with pytest.raises(ValidationError, match="in flight"):
            Config(limits=LimitsConfig(max_pending_frames=1))


class TestTheAdminServer:
    @pytest.mark.parametrize("endpoint", ["127.0.0.1:0", "localhost:5780", "[::1]:65535", "127.9.9.9:1"])
    def test_may_listen_at_any_port_of_this_machine(self, endpoint: str) -> None:
        assert load_config(overrides={"http.endpoint": endpoint}).http.endpoint == endpoint

    def test_may_listen_for_others_with_a_token(self, tmp_path: Path) -> None:
        for endpoint in ("0.0.0.0:1", "[::]:1", "gpu-7:1", "10.0.0.1:1"):
            (problem,) = problems(overrides={"http.endpoint": endpoint})
            assert problem.path == "http.endpoint"
            assert "http.token_file" in problem.suggestion
            config = load_config(overrides={"http.endpoint": endpoint, "http.token_file": str(tmp_path / "token")})
            assert config.http.endpoint == endpoint

    @pytest.mark.parametrize("text", ["off", "'off'", "null", "~", "no"])
    def test_can_be_off(self, tmp_path: Path, text: str) -> None:
        assert load_config(written(tmp_path, f"http: {{endpoint: {text}}}")).http.endpoint is None
        assert load_config(overrides={"http.endpoint": "off"}).http.endpoint is None
        assert load_config(None, None, {"INSTEP_HTTP__ENDPOINT": "off"}).http.endpoint is None

    @pytest.mark.parametrize(
        "wrong",
        ["5780", ":1", "127.0.0.1", "127.0.0.1:*", "127.0.0.1:65536", "http://a:1", "::1:1", "a..b:1", f"{64 * 'a'}:1"],
    )
    def test_has_endpoints_of_its_own(self, wrong: str) -> None:
        (problem,) = problems(overrides={"http.endpoint": wrong})
        assert f"{wrong!r} is not an endpoint: write 127.0.0.1:5780" in problem.message


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().engine.threads = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        EngineConfig.model_validate({"thread": 2})


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5757", True),
        ("tcp://127.0.0.1:*", True),
        ("tcp://127.255.3.4:1", True),
        ("tcp://localhost:1", True),
        ("tcp://LOCALHOST:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///run/instep.sock", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://128.0.0.1:1", False),
        ("tcp://localhost.example.org:1", False),
        ("tcp://127.0.0.1.example.org:1", False),
        ("tcp://[::]:1", False),
        ("tcp://[fe80::1]:1", False),
        ("tcp://lo:1", False),
    ],
)
def test_loopback(endpoint: str, expected: bool) -> None:
    assert TransportConfig(endpoint=endpoint).endpoint == endpoint
    assert is_loopback(endpoint) is expected


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

    @pytest.mark.parametrize("durability", ["commit", "fsync"])
    def test_no_answer_is_durable_without_a_recording(self, durability: str, tmp_path: Path) -> None:
        (problem,) = problems(overrides={"recording.durability": durability})
        assert f"durability {durability} needs a recording" in problem.message
        load_config(overrides={"recording.durability": "memory"})
        load_config(overrides={"recording.durability": durability, "recording.file": str(tmp_path / "r")})

    def test_a_folder_of_recordings_must_exist(self, tmp_path: Path) -> None:
        folder = f"{tmp_path}/recordings/"
        (problem,) = problems(overrides={"recording.file": folder})
        assert str(problem).startswith(f"recording.file (flag): there is no folder {folder}; make it")
        (overlong,) = problems(overrides={"recording.file": f"{tmp_path}/{'r' * 300}/"})
        assert overlong.message.startswith("there is no folder")
        Path(folder).mkdir()
        assert load_config(overrides={"recording.file": folder}).recording.file == Path(folder)

    def test_words_may_be_in_capitals(self) -> None:
        assert load_config(overrides={"log.level": "DEBUG", "log.format": "Json"}).log.level == "debug"
