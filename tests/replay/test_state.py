"""`instep recordings state`: the state before any frame is that of the definition over the frames before it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from instep.core.typing import F32
from instep.models.folder import load_model
from instep.models.network import PortableNetwork
from instep.program import app
from instep.recording.reader import RecordingReader
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.recorded_state import NoSuchMoment, NotExact, Past
from instep_client import StreamSnapshot
from tests.support.forger import Forger
from tests.support.models import whole
from tests.support.recordings import Recorded, make_gru, record_gru, served_step
from tests.support.scribe import Scribe
from tests.support.written import cut_out

FIRST, END = 10, 27
"""Frames of the stream `a`."""
EVERY_CHECKPOINT = Retention(keep_bytes=1)
"""Each is far enough from the one before to be kept; nothing is trimmed here."""


class Story:
    """A recording of streams that are reset, written to, closed and opened again, and the truth about one of them."""

    def __init__(self, folder: Path) -> None:
        self.recorded: Recorded = record_gru(folder, make_gru(3, 8, layers=2), [1])
        self.model = load_model(self.recorded.folder)
        network = PortableNetwork(self.model)
        self.path = folder / "story.instep"
        writer = RecordingWriter.create(
            self.path, self.recorded.header, Retention(keep_bytes=1)
        )  # every checkpoint stays
        scribe = self.scribe = Scribe(writer, served_step(network))
        self.opened, self.written = scribe.random_state(), scribe.random_state()
        scribe.open(1, self.opened, first_seq=FIRST, name="a")
        scribe.open(2, name="twice")
        for _ in range(4):
            scribe.step([1, 2])
        scribe.checkpoint(scribe.step([1]))  # a is before frame 15
        scribe.step([1, 2])
        scribe.close(2)
        scribe.reset(1, self.written)  # a is before frame 16
        for _ in range(4):
            scribe.step([1])
        scribe.reset(1)  # a is before frame 20, twice
        scribe.reset(1, self.opened)
        self.middle = scribe.step([1])
        scribe.checkpoint(self.middle)
        scribe.open(3, name="twice")
        for _ in range(3):
            scribe.step([1, 3])
        scribe.checkpoint(scribe.step([1, 3]))  # a is before frame 25
        scribe.step([1, 3])
        scribe.step([1], "unanswered")
        scribe.open(4, self.written, name="idle")
        writer.commit()
        writer.close()
        self.parts: Sequence[tuple[int, F32]] = ((FIRST, self.opened), (16, self.written), (20, self.opened))

    def truth(self, seq: int) -> F32:
        """The state of `a` before a frame, by the definition."""
        first, state = [part for part in self.parts if part[0] <= seq][-1]
        if seq == first:
            return state
        x = np.stack([self.scribe.x[1][at] for at in range(first, seq)])
        return whole(self.model, x, state)[1]


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


@contextmanager
def past_of(path: Path, model_folder: Path, word: str) -> Iterator[Past]:
    with RecordingReader(path) as reader:
        yield Past(reader, load_model(model_folder), word)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["recordings", "state", *map(str, arguments)])


def bits(state: Any) -> bytes:
    return np.asarray(state, np.float32).tobytes()


def test_every_state_across_checkpoints_and_resets_is_that_of_the_definition(story: Story) -> None:
    with past_of(story.path, story.recorded.folder, "a") as past:
        for seq in range(FIRST, END + 1):
            assert past.before(seq).state.tobytes() == bits(story.truth(seq)), seq
        origins = {
            seq: (past.before(seq).origin, past.before(seq).origin_seq) for seq in (FIRST, 14, 15, 16, 19, 20, 22)
        }
        assert origins == {
            FIRST: ("opening", FIRST),
            14: ("opening", FIRST),
            15: ("checkpoint", 15),
            16: ("reset", 16),
            19: ("reset", 16),
            20: ("reset", 20),
            22: ("checkpoint", 21),
        }
        end = past.before()
        assert (end.seq, end.replayed, end.compared) == (END, 2, 1), "the last one has no recorded outputs"


def test_what_the_command_says_and_saves(story: Story, tmp_path: Path) -> None:
    file = tmp_path / "then.safetensors"
    result = run(story.path, "a", "--seq", "18", "--output", file, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["stream"], values["number"], values["seq"], values["model"]) == ("a", 1, 18, "model")
    assert (values["origin"], values["origin_seq"], values["replayed_frames"], values["compared_frames"]) == (
        "reset",
        16,
        2,
        2,
    )
    assert bits(values["state"]["h"]) == bits(story.truth(18))
    assert load_file(file)["state.h"].tobytes() == bits(story.truth(18))
    taken = StreamSnapshot.load(file)
    assert (taken.name, taken.seq, taken.fingerprint) == ("a", 18, story.recorded.header.model_fingerprint)

    told = run(story.path, "1", "--seq", "18").stdout.splitlines()
    assert told[0].startswith("stream 1 ('a') before frame 18: h float32 [2, 8]")
    assert [line.split()[0] for line in told[1:4]] == ["row", "h[0]", "h[1]"]
    assert told[2].split()[4] == f"{story.truth(18)[0, 0]:.6g}"
    assert all(len(line) <= 80 for line in told)
    assert " ".join(told[4:]) == (
        "from the reset before frame 16, with 2 frames stepped again; their outputs equal the recorded ones, bit for "
        "bit"
    )
    assert run(story.path, "a", "--seq", "15").stdout.endswith("as recorded by the checkpoint before frame 15\n")
    idle = json.loads(run(story.path, "idle", "--json").stdout)
    assert (idle["seq"], bits(idle["state"]["h"])) == (0, bits(story.written))


def test_a_name_that_was_opened_twice_means_the_newest_that_has_the_frame(story: Story) -> None:
    with past_of(story.path, story.recorded.folder, "twice") as past:
        assert [past.before(seq).info.stream for seq in (0, 5)] == [3, 3]
        assert past.before(5).openings == 2
    assert (
        "stream 3 ('twice'), the newest of 2 of this name, before frame 2"
        in run(story.path, "twice", "--seq", "2").stdout
    )
    assert "stream 2 ('twice') before frame 2" in run(story.path, "2", "--seq", "2").stdout


def test_what_is_not_recorded_is_refused_with_what_is(story: Story, tmp_path: Path) -> None:
    cut = tmp_path / "cut.instep"
    cut_out(story.path, cut, story.middle + 1)
    (tmp_path / "there.safetensors").touch()
    for arguments, problem in (
        ((story.path, "b"), "the recording has no stream 'b'"),
        ((story.path, "twise"), "did you mean 'twice'?"),
        ((story.path, "a", "--seq", "28"), "its recorded frames end before frame 27; ask for a seq from 10 to 27"),
        ((story.path, "a", "--seq", "9"), "it was opened to begin with frame 10; ask for a seq from 10 to 27"),
        ((cut, "a", "--seq", "20"), "the history before frame 21 was deleted"),
        ((cut, "a", "--seq", "20"), "ask for a seq from 21 to 27"),
        ((tmp_path / "absent", "a"), "cannot read the recording"),
        ((story.path, "a", "--output", tmp_path / "there.safetensors"), "name another file with --output"),
        ((story.path, "a", "--folder", tmp_path), "the model cannot be loaded"),
    ):
        result = run(*arguments)
        assert (result.exit_code, problem in " ".join(result.stderr.split())) == (2, True), result.output
        refused = run(*arguments, "--json")
        assert (refused.exit_code, problem in json.loads(refused.stdout)["error"]) == (2, True)
    with past_of(cut, story.recorded.folder, "a") as past:
        assert (past.before(21).origin, past.before(25).state.tobytes()) == ("checkpoint", bits(story.truth(25)))
        with pytest.raises(NoSuchMoment):
            past.before(20)


def test_an_engine_without_a_promise_of_bits_gives_only_states_that_were_recorded(story: Story, tmp_path: Path) -> None:
    forger = Forger(story.path, tmp_path / "forged.instep")
    forger.change_header("arithmetic", json.dumps("torch on cuda:0"))
    with past_of(forger.path, story.recorded.folder, "a") as past:
        for seq in (FIRST, 15, 16, 20, 21):
            assert past.before(seq).state.tobytes() == bits(story.truth(seq))
        with pytest.raises(NotExact):
            past.before(18)


def test_outputs_that_do_not_come_out_again_are_no_ground_for_a_state(story: Story, tmp_path: Path) -> None:
    forger = Forger(story.path, tmp_path / "forged.instep")
    row = forger.rows("outputs")[1]
    forger.change("outputs", row["position"], y=bytes(len(row["y"])))
    with past_of(forger.path, story.recorded.folder, "a") as past:
        assert past.before(11).state.tobytes() == bits(story.truth(11))
        with pytest.raises(NotExact):
            past.before(12)
        assert past.before(17).state.tobytes() == bits(story.truth(17)), "it begins with a later state"


def test_a_stream_with_a_defect_has_no_end_unless_one_is_asked_for(story: Story, tmp_path: Path) -> None:
    forger = Forger(story.path, tmp_path / "forged.instep")
    batch, at = forger.find_frame(1, 25)
    seqs = forger.column(batch, "seqs")
    seqs[at] = 30
    forger.change_batch(batch, seqs=seqs)
    with past_of(forger.path, story.recorded.folder, "a") as past:
        for seq in (None, 26):
            with pytest.raises(NoSuchMoment):
                past.before(seq)
        assert past.before(25).state.tobytes() == bits(story.truth(25))
