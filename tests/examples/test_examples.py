"""Networks of packages from PyPI, served to several clients at once, give what the packages' own code gives.

That the inputs are what the networks were trained on shows in what they find: speech where people have noted speech,
and beats as often as the drum is struck.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.__main__ import EXAMPLES, main
from examples.example import (
    LISTENERS,
    SPEECH_RATE,
    Example,
    NotInstalled,
    heard_through_a_server,
    shipped,
    sounds_of_listeners,
)
from instep.core.typing import F32, Bool
from instep.models.folder import load_model
from instep.recording.reader import RecordingReader
from instep.replay import verifier
from tests.support.threaded import ThreadedServer
from tests.support.verifying import ignore_progress

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples" / "README.md").read_text()
ROUNDING = 1e-4
"""Outputs are probabilities or gains, from 0 to 1. The verifier finds ours up to 3.3e-5 from the network in float64.
The package's float32 may be as far off on the other side, and half as much again is left for other processors."""
QUICK = ("nsnet2", "silero_vad")
FROM_S, TO_S = 6, 9
"""Part of the conversation: silence first, then two people."""


@pytest.fixture(autouse=True)
def served_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.example.ChildServer", ThreadedServer)
    torch.set_num_threads(1)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in EXAMPLES]
)
def test_a_network_of_a_package_is_served(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    try:
        sound = example.sound()
        example.make(tmp_path / name)
    except NotInstalled as missing:
        pytest.skip(str(missing))
    if name != "beatnet":
        sound = sound[FROM_S * SPEECH_RATE : TO_S * SPEECH_RATE]
    heard = heard_through_a_server(example, sound, tmp_path / name, tmp_path / "recording.instep")

    assert [len(each) for each in heard.received] == sorted({len(each) for each in heard.own}, reverse=True)
    assert heard.difference < ROUNDING
    assert makes_sense(name, heard.received[0], example.hop)

    with RecordingReader(tmp_path / "recording.instep") as reader:
        report = verifier.verify(reader, load_model(tmp_path / name), [], ignore_progress)
    assert report.verified, report.as_json()
    assert (report.verdict, heard.exactness) == ("exact", "exact")
    assert [len(report.streams), sum(stream.frames for stream in report.streams)] == [
        LISTENERS,
        sum(map(len, heard.received)),
    ]
    assert report.reference == ("independent" if name == "nsnet2" else "same graph")


@pytest.mark.heavy
def test_the_page_shows_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.findall(r"^\| `(\w+)` \| `", PAGE, re.MULTILINE) == list(EXAMPLES)
    example = EXAMPLES["silero_vad"]
    try:
        sound = example.sound()
        shipped("silero-vad", "")
    except NotInstalled as missing:
        pytest.skip(str(missing))
    command = re.search(r"^python -m (examples silero_vad)$", PAGE, re.MULTILINE)
    shown = re.search(r"^```text\n(examples-out.*?)…\n(.*?)```$", PAGE, re.MULTILINE | re.DOTALL)
    assert command is not None
    assert shown is not None
    monkeypatch.setattr("sys.argv", command[1].split())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    second = sound[FROM_S * SPEECH_RATE : (FROM_S + 1) * SPEECH_RATE]  # the test above has more
    monkeypatch.setitem(EXAMPLES, "silero_vad", replace(example, sound=lambda: second))
    status = main()
    out, err = capsys.readouterr()
    assert status == 0, out + err
    difference = r"(?<=outputs: ).*"  # from onnxruntime, which differs by processor
    said = re.sub(difference, "", out)
    said = said.replace(f" {frames_of(example, second)} frames", f" {frames_of(example, sound):,} frames")
    assert said.startswith(re.sub(difference, "", shown[1]))
    assert said.endswith(shown[2])


def test_a_missing_package_is_named() -> None:
    with pytest.raises(NotInstalled, match=r"^no-such is not installed; examples/README\.md says how to install"):
        shipped("no-such", "file")


def frames_of(example: Example, sound: F32) -> int:
    """How many frames all listeners send."""
    return sum(len(example.frames(heard)) for heard in sounds_of_listeners(example, sound))


def is_speech(times_s: F32) -> Bool:
    """Whether somebody talks in `speech()` at each of these times, as its authors have noted."""
    notes = shipped("pyannote.audio", "pyannote/audio/sample/sample.rttm").read_text().splitlines()
    spans = [(float(start), float(length)) for _, _, _, start, length, *_ in map(str.split, notes)]
    talking: Bool = np.any([(start <= times_s) & (times_s < start + length) for start, length in spans], axis=0)
    return talking


def makes_sense(name: str, outputs: F32, hop: int) -> bool:
    """Whether the outputs for the first listener, who heard all of the sound, are those of a trained network."""
    if name == "beatnet":
        beat = 1 - outputs[:, 2]
        struck = [at for at in range(1, len(beat) - 1) if beat[at] > 0.3 and beat[at] == beat[at - 1 : at + 2].max()]
        return set(np.diff(struck)) == {25} and len(struck) > 15  # 120 a minute, and 50 frames a second
    times_s = FROM_S + (np.arange(len(outputs)) + 0.5) * hop / SPEECH_RATE
    speech = is_speech(times_s.astype(np.float32))
    if name == "nsnet2":
        return float(outputs[speech].mean()) > 2 * float(outputs[~speech].mean())
    return float(((outputs[:, 0] > 0.5) == speech).mean()) > 0.85
