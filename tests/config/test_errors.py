"""Everything that is wrong with a configuration is told at once, with its place and a suggestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instep.config import ConfigError, Problem, load_config
from tests.support.configurations import problems, written


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
            ("max_batch_size", "did you mean engine.max_batch_size?"),
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
            ("engine", "max_batch_size", "1"),
            ("engine", "max_batch_size", True),
            ("engine", "max_batch_size", 1.0),
            ("engine", "max_batch_size", 0),
            ("engine", "max_batch_size", None),
            ("engine", "max_batch_size", 4097),
            ("recording", "durability", False),
            ("recording", "durability", "exact"),
            ("engine", "device", "gpu"),
            ("engine", "device", "cuda:"),
            ("engine", "device", "cuda:١"),
            ("engine", "device", "cuda:01"),
            ("engine", "max_queue_delay_us", -1),
            ("transport", "allow_plaintext", "yes please"),
            ("transport", "allow_plaintext", 1),
            ("transport", "endpoint", "127.0.0.1:5757"),
            ("transport", "endpoint", "tcp://127.0.0.1"),
            ("transport", "endpoint", "tcp://127.0.0.1:99999"),
            ("transport", "endpoint", "tcp://a..b:1"),
            ("transport", "endpoint", "tcp://127.0.0.1:65536"),
            ("transport", "endpoint", "udp://127.0.0.1:1"),
            ("transport", "endpoint", "ipc://"),
            ("transport", "endpoint", "ipc://" + "x" * 108),
            ("transport", "heartbeat_s", 0),
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

    def test_a_gpu_that_pytorch_cannot_count_to_is_refused(self) -> None:
        assert load_config(None, {"engine.device": "cuda:127"}, {}).engine.device == "cuda:127"
        for device in ("cuda:128", "cuda:256", "cuda:9999"):  # torch.device takes the second for cuda:0
            (found,) = problems(None, {"engine.device": device})
            assert found.path == "engine.device"
            assert f"'{device}' is no device: PyTorch supports cuda:0 to cuda:127" in found.message

    def test_a_wrong_value_is_quoted_and_the_default_told(self) -> None:
        (found,) = problems(None, {"limits.max_idle_s": "soon"})
        assert str(found) == "limits.max_idle_s (flag): it should be a valid number, not 'soon'; the default is 3600.0"

    @pytest.mark.parametrize(
        ("path", "value", "meant"),
        [
            ("recording.durability", "comit", "commit"),
            ("log.level", "Warn", "warning"),
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
        (found,) = problems(written(tmp_path, {"engine": {"max_batch_size": 0}}), {"engine.max_batch_size": "2"})
        assert found.path == "engine.max_batch_size"

    @pytest.mark.parametrize(
        ("text", "words"),
        [("[1", "not valid YAML"), ("{features: 3, features: 4}", "the key 'features' stands twice")],
    )
    def test_text_that_yaml_does_not_accept(self, text: str, words: str) -> None:
        (found,) = problems(None, {"engine.max_batch_size": text})
        assert (found.path, words in found.message) == ("engine.max_batch_size", True)
