"""`python -m examples NAME`: make the model folder of an example, serve it, compare outputs, verify."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from examples import simple_gru
from examples.beatnet import BEATNET
from examples.example import LISTENERS, Example, NotInstalled, heard_through_a_server
from examples.flashvad import FLASHVAD
from examples.nsnet2 import NSNET2
from examples.silero_vad import SILERO_VAD
from instep.demo.child_server import ChildFailed
from instep.recording.database import remove_database
from instep.replay.command import run as verify

EXAMPLES: Final = {"nsnet2": NSNET2, "silero_vad": SILERO_VAD, "flashvad": FLASHVAD, "beatnet": BEATNET}


def main() -> int:
    """Run the example that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples", description="Serve a network, and compare its outputs.")
    parser.add_argument("name", choices=["simple-gru", *EXAMPLES])
    parser.add_argument(
        "--output", type=Path, default=Path("examples-out"), help="where the model and the recording go"
    )
    given = parser.parse_args()
    console = Console(highlight=False)
    try:
        if given.name == "simple-gru":
            return simple_gru.main(given.output / given.name, console)
        return run(EXAMPLES[given.name], given.output / given.name, console)
    except (NotInstalled, ChildFailed) as error:
        console.print(str(error), style="bold red", markup=False)
        return 1


def run(example: Example, folder: Path, console: Console) -> int:
    """Make the folder, replacing an earlier one and its recording; the verifier's exit status."""
    torch.set_num_threads(1)
    recording = folder.with_suffix(".instep")
    sound = example.sound()
    model = example.make(folder)
    remove_database(recording)
    words = f"{folder}: {model.description.in_words()}"
    console.print(textwrap.fill(words, 80, break_long_words=False), markup=False, soft_wrap=True)
    heard = heard_through_a_server(example, sound, folder, recording)
    frames = sum(map(len, heard.received))
    console.print(f"{LISTENERS} listeners, {frames:,} frames one by one; {heard.exactness}")
    console.print(f"largest difference from the package's own outputs: {heard.difference:.1e}")
    return verify([recording], None, [], console)


if __name__ == "__main__":
    raise SystemExit(main())
