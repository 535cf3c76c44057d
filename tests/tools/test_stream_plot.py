"""Pictures, made by the commands: read back as pixels, and as the text of an SVG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import BadFile, Exit
from instep_tools.replay import ReplayJob, replay
from instep_tools.sequences import RecordedSequences
from instep_tools.stream_plot import check_plot_path, plot_streams
from tests.support.fake_server import FakeServer
from tests.tools.helpers import JumpingClock, RememberingTerminal, save_table


def many(streams: int, features: int, outputs: int) -> RecordedSequences:
    frames = np.linspace(-1, 1, streams * 10 * features, dtype=np.float32).reshape(-1, features)
    return RecordedSequences(
        tuple(f"mic-{number}" for number in range(streams)),
        np.full(streams, 10),
        frames,
        outputs=np.tile(frames[:, :1], outputs),
    )


def test_lines_for_few_numbers_and_heat_maps_for_many(tmp_path: Path) -> None:
    said = plot_streams(many(11, 12, 2), tmp_path / "p.svg", "a $title", ["speech", "$noise 音"])
    assert said == f"drew the first 8 of 11 streams in {tmp_path / 'p.svg'}"
    svg = (tmp_path / "p.svg").read_text()
    assert all(
        f"<!-- {text} -->" in svg for text in ("a $title", "mic-0", "mic-7", "inputs (12)", "speech", "$noise 音")
    )
    assert "<!-- mic-8 -->" not in svg
    assert svg.count("<image") == 8 + 1  # a heat map for each stream, and the bar of their colors
    plot_streams(many(2, 2, 9), tmp_path / "p.png", "", [f"y{number}" for number in range(9)])
    picture = imread(tmp_path / "p.png")
    assert picture.shape[1] == 1320
    reddish, bluish = (picture[..., a] - picture[..., b] > 0.3 for a, b in ((0, 2), (2, 0)))
    assert reddish.any()  # 1 is red and -1 blue in a heat map
    assert bluish.any()
    named = [*"abcdefghi"]
    plot_streams(many(2, 2, 9), tmp_path / "named.svg", "", named)
    svg = (tmp_path / "named.svg").read_text()
    assert all(svg.count(f"<!-- {name} -->") == 2 for name in named)
    plot_streams(many(1, 1, 7), tmp_path / "p.pdf", "", [f"y{number}" for number in range(7)])
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")


def test_names_that_could_not_be_written(tmp_path: Path) -> None:
    for name, why in (("p.jpg", "must end in .png, .svg, .pdf"), ("no/p.png", "cannot be written: there is no folder")):
        with pytest.raises(BadFile) as failure:
            check_plot_path(tmp_path / name)
        assert why in str(failure.value)


async def test_replay_draws_what_it_got(tmp_path: Path) -> None:
    save_table(tmp_path / "in.npz", many(3, 3, 1))
    terminal = RememberingTerminal()
    with FakeServer() as server:
        what = ReplayJob(Target(server.endpoint), tmp_path / "in.npz", plot=tmp_path / "p.svg")
        assert await replay(what, terminal, Stop(), JumpingClock()) == Exit.OK
    assert terminal.said.strip().endswith(f"; drew 3 streams in {tmp_path / 'p.svg'}")
    svg = (tmp_path / "p.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("in.npz, answered by halving", "mic-2", "x2", "y1"))
