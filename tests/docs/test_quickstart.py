"""The quick start, typed from its first command to its last, the killed server included."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from instep_client import Client
from tests.docs.support.page import Page
from tests.docs.support.shell import SCRIPTS, TypedServer, commands, run

pytestmark = pytest.mark.heavy

PAGE = Page("quickstart.md")


def test_everything_it_tells_to_type_works(tmp_path: Path) -> None:
    typed = [words for _, block in PAGE.blocks("bash") for words in commands(block) if words[0] in ("python", "instep")]
    make_model, serve, verify, export = typed
    single, group, killed = (code for _, code in PAGE.blocks("python"))
    made = run(make_model, tmp_path)
    assert made.returncode == 0, made.stderr
    with TypedServer(serve, tmp_path) as server:
        produced = run(server.script(single, "single.py"), tmp_path)
        assert (produced.stdout, produced.stderr) == ("(64,) after 100 frames\n", "")
        produced = run(server.script(group, "group.py"), tmp_path)
        assert (produced.stdout, produced.stderr) == ("(256, 64)\n", "")
        program = [str(SCRIPTS / "python"), *server.script(killed, "killed.py")[1:]]
        running = subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        with Client(server.endpoint) as client:
            while not 50 <= (client.stats()["frames_total"] - 12_900) < 2000:  # the programs before it sent 12,900
                assert running.poll() is None
        kill = re.search(r"`(kill -9 .*?)`", PAGE.prose)
        assert kill is not None
        subprocess.run(kill[1], shell=True, cwd=tmp_path, check=True)
        server.process.communicate(timeout=60)
        assert server.process.wait() == -signal.SIGKILL
        server.start()
        said, _ = running.communicate(timeout=60)
        assert said == "2000 frames, each answered once\n"
        assert server.stop(signal.SIGINT) == 0
    verified = run(verify, tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "258 streams, 14,900 frames" in verified.stdout
    exported = run(export, tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert len((tmp_path / "first.csv").read_text().splitlines()) == 1 + 14_900
