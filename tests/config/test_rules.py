"""Values that contradict each other, and those that merely look as if they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from instep.config import Config, LimitsConfig, TransportConfig, load_config
from tests.support.configurations import problems, written


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

    @pytest.mark.parametrize("durability", ["commit", "fsync"])
    def test_no_answer_is_durable_without_a_recording(self, durability: str, tmp_path: Path) -> None:
        (problem,) = problems(overrides={"recording.durability": durability})
        assert f"durability {durability} needs a recording" in problem.message
        load_config(overrides={"recording.durability": "memory"})
        load_config(overrides={"recording.durability": durability, "recording.file": str(tmp_path / "r")})
