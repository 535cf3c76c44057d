from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from instep.demo import MODEL_FOLDER, speakers
from instep.demo.child_server import ChildFailed
from instep.demo.producers import Heard, Producer, load_utterances, make_producers
from instep.demo.speakers import received_is_recorded
from instep.models.folder import load_model
from instep.recording.reader import RecordingReader
from instep.recording.table import OpenedRecording
from tests.support.served import WarmServer
from tests.support.warm import WarmProcess


@dataclass(frozen=True)
class Shown:
    status: int
    text: str
    out: Path

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The whole demo, four times as fast, in a folder that an earlier one has used."""
    out = tmp_path_factory.mktemp("demo") / "out"
    out.mkdir()
    for name in ("speakers.instep", "speakers.instep-wal", "speakers.instep-shm", "speakers.png", "mine"):
        (out / name).write_text("from before")
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speakers, "ChildServer", WarmServer)
        status = speakers.run(out, Console(file=file, width=80), speed=4.0)
    return Shown(status, file.getvalue(), out)


def test_it_ends_with_the_verifiers_line(demo: Shown) -> None:
    assert demo.lines[-1].startswith("verified: 370 streams, 5,687 frames, exact, 0 mismatches")
    assert demo.status == 0


def test_everything_comes_from_as_many_connections_as_recordings(demo: Shown) -> None:
    with RecordingReader(demo.out / "speakers.instep") as reader:
        assert len(reader.streams()) == 370
        assert {stream.reason for stream in reader.streams()} == {"closed"}


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_keeps_streaming_until_a_signal_and_verifies_everything(tmp_path: Path, number: signal.Signals) -> None:
    demo = WarmProcess(["demo", "--keep", "--output", str(tmp_path)], start_new_session=True)
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("in a terminal: "):
                break
        assert re.search(r" top -e tcp://127\.0\.0\.1:\d+$", line.strip())
        while frames_of(tmp_path / "speakers.instep") <= 5687 + 370:
            time.sleep(0.1)
        os.killpg(demo.pid, number)  # as Ctrl-C in a terminal does it, to the server too
        said = demo.communicate()[0].splitlines()
    finally:
        demo.kill()
    assert demo.returncode == 0
    verified = re.fullmatch(r"verified: ([\d,]+) streams, ([\d,]+) frames, .*, 0 mismatches", said[-1])
    assert verified is not None
    assert int(verified[2].replace(",", "")) > 5687 + 370


def frames_of(recording: Path) -> int:
    with RecordingReader(recording) as reader:
        return reader.totals()[1]


@torch.no_grad()
def test_the_accuracy_is_that_of_torch_over_whole_recordings(demo: Shown) -> None:
    weights = load_model(MODEL_FOLDER).weights
    gru, head = torch.nn.GRU(12, 64), torch.nn.Linear(64, 9)
    gru.load_state_dict({name.removeprefix("gru."): each for name, each in weights.items() if name.startswith("gru.")})
    head.load_state_dict({name.rpartition(".")[2]: each for name, each in weights.items() if name.startswith("after.")})
    utterances = load_utterances()
    decisions = [head(gru(torch.from_numpy(frames))[0]).argmax(1).tolist() for frames in utterances.frames]
    right = [
        sum(each[min(count, len(each)) - 1] == who for each, who in zip(decisions, utterances.speakers, strict=True))
        for count in (1, 2, 3, 5, 7, 10, 15, 29)
    ]
    assert ["correct", *map(str, right)] in [line.split() for line in demo.lines]


def test_what_it_leaves_is_named_and_replaces_an_earlier_demo(demo: Shown) -> None:
    recording, picture = demo.out / "speakers.instep", demo.out / "speakers.png"
    assert demo.lines.count(f"picture: {picture}") == 1
    assert sum(each.endswith(f"instep verify {recording}") for each in demo.lines) == 1
    assert {path.name for path in demo.out.iterdir()} == {"speakers.instep", "speakers.png", "mine"}
    height, width, _ = imread(picture).shape
    assert width > height > 800


def recorded(recording: Path) -> tuple[list[Producer], Heard]:
    """What the recording holds, as if it had just been streamed."""
    with OpenedRecording(recording) as opened:
        streams = list(opened.values())
    made = make_producers([stream.inputs for stream in streams])
    producers = [replace(producer, name=stream.name) for producer, stream in zip(made, streams, strict=True)]
    heard = Heard(producers, streams[0].outputs.shape[1])
    for row, stream in enumerate(streams):
        heard.add(row, stream.outputs, producers[row].due_s)
    return producers, heard


class TestReceivedIsRecorded:
    def test_one_bit(self, demo: Shown) -> None:
        recording = demo.out / "speakers.instep"
        producers, heard = recorded(recording)
        assert received_is_recorded(recording, producers, heard)
        heard.outputs[300].view(np.uint32)[-1, -1] ^= 1
        assert not received_is_recorded(recording, producers, heard)
        heard.outputs[300].view(np.uint32)[-1, -1] ^= 1
        producers[5].frames.view(np.uint32)[0, 0] ^= 1
        assert not received_is_recorded(recording, producers, heard)

    def test_a_stream_that_only_the_recording_has(self, demo: Shown) -> None:
        producers, heard = recorded(demo.out / "speakers.instep")
        del heard.outputs[-1]
        assert not received_is_recorded(demo.out / "speakers.instep", producers[:-1], heard)


class NoServer:
    def __init__(self, model: Path, arguments: Sequence[str] = (), *, administered: bool = False) -> None:
        pass

    def __enter__(self) -> NoServer:
        raise ChildFailed("the server did not start: for this reason")

    def __exit__(self, *error: object) -> None:
        pass


class TestFailures:
    def test_a_server_that_does_not_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(speakers, "ChildServer", NoServer)
        file = io.StringIO()
        assert speakers.run(tmp_path, Console(file=file)) == 1
        assert "for this reason" in file.getvalue()
