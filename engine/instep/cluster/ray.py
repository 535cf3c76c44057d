"""A cluster on Ray: an actor on the head runs the directory, and one on each node with the resource `instep` an agent.

The actors are detached. Each runs a plain program and ends with it, and Ray starts it again. Ray carries no frames and
no states, and is not asked which nodes are lost.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from threading import Thread
from typing import Any, Final

from instep.config import Config
from instep_tools.problems import CommandProblem

RESOURCE: Final = "instep"
NAMESPACE: Final = "instep"
DIRECTORY: Final = "directory"
PORT: Final = 5750
"""The directory's."""
_HEAD: Final = "node:__internal_head__"
"""The resource that Ray gives to the head alone."""
_LOOK_EVERY_S: Final = 1.0
_PAUSE_S: Final = 10.0
_CANNOT_START: Final = 2
"""The exit status of a program that would hardly start if it were tried again at once."""
_END_WITHIN_S: Final = 60.0
_PROGRAM: Final = """
import signal, sys
from instep.__main__ import main
from instep.interrupts import end_with_parent
end_with_parent(int(sys.argv.pop(1)), signal.SIGKILL)
main()
"""


class ProgramActor:
    """Runs `instep cluster` until `stop`; if the program ends before, so does the actor.

    Args:
        folder: is made if it is not there.
        arguments: of the command.
        config: the text of a configuration.
    """

    def __init__(self, folder: str, arguments: Sequence[str], config: str) -> None:
        with suppress(OSError):  # the program says what is wrong with it
            os.makedirs(folder, exist_ok=True)
        with TemporaryFile("w") as file:  # without a name, so that nothing is left however the actor ends
            file.write(config)
            file.seek(0)
            given = ["cluster", *arguments, "--config", f"/dev/fd/{file.fileno()}"]
            command = [sys.executable, "-c", _PROGRAM, str(os.getpid()), *given]
            self._program = subprocess.Popen(command, pass_fds=[file.fileno()])
        self._stops = False
        Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """End the program in order, and return when it has ended."""
        self._stops = True
        self._program.terminate()
        self._program.wait()

    def _watch(self) -> None:
        try:
            while self._program.poll() is None:
                self._look()
                with suppress(subprocess.TimeoutExpired):
                    self._program.wait(_LOOK_EVERY_S)
            if self._program.returncode == _CANNOT_START:
                time.sleep(_PAUSE_S)
        except BaseException:
            traceback.print_exc()
        if not self._stops:
            os._exit(1)  # Ray starts the actor again

    def _look(self) -> None:
        """Called about once a second."""


class DirectoryActor(ProgramActor):
    """Runs the directory at an address, and has an agent run on each node, those that join later among them."""

    def __init__(self, address: str, arguments: Sequence[str], config: str) -> None:
        self._address, self._config = address, Config.model_validate_json(config)
        self._has_agent: set[str] = set()
        folder = f"{self._config.recording.path}/directory.store"
        arguments = ["directory", "--store", folder, "--endpoint", f"tcp://{address}", *arguments]
        super().__init__(folder, arguments, config)

    def _look(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            number, name, host = node["NodeID"], node["NodeName"], node["NodeManagerAddress"]
            if number in self._has_agent or not node["Alive"] or RESOURCE not in node["Resources"]:
                continue
            folder = f"{self._config.recording.path}/{name}"
            endpoint = f"tcp://{host}:{self._config.transport.endpoint.rpartition(':')[2]}"
            arguments = ["agent", "--name", name, "--directory", self._address, "--endpoint", endpoint]
            options = _options(
                f"agent-{number}",
                resources={RESOURCE: 1},
                num_gpus=int(self._config.engine.device.startswith("cuda")),
                scheduling_strategy=NodeAffinitySchedulingStrategy(number, soft=False),
                get_if_exists=True,  # when another process was this actor before
            )
            actor = ray.remote(ProgramActor).options(**options)
            actor.remote(folder, [*arguments, "--record", folder], self._config.model_dump_json())
            self._has_agent.add(number)


def up(config: Config, shards: int, copies: int, adopt: str) -> str:
    """Start the directory, which starts agents; return its host and port.

    Args:
        config: of servers and directory; its paths are those on the nodes.
        shards: see `Assignments`.
        copies: see `Assignments`.
        adopt: names of nodes, with commas.

    Raises:
        CommandProblem: something is missing, or a cluster is up.
    """
    if config.recording.path is None or not config.model.folders:
        raise CommandProblem("a cluster needs a model and --record FOLDER")
    arguments = [f"--shards={shards}", f"--copies={copies}", "--adopt", adopt]
    ray = _connect()
    address = _directory_address(ray)
    options = _options(DIRECTORY, resources={_HEAD: 0.001})
    try:
        actor = ray.remote(DirectoryActor).options(**options).remote(address, arguments, config.model_dump_json())
        ray.get(actor.__ray_ready__.remote())
    except ValueError:
        raise CommandProblem("a cluster is up: end it first, with instep cluster ray down") from None
    except ray.exceptions.RayError as error:  # as where the head has no instep
        raise CommandProblem(f"Ray cannot start the directory: {error}") from None
    return address


def down() -> None:
    """End the agents in order, then the directory.

    Raises:
        CommandProblem: there is no Ray.
    """
    ray = _connect()
    while names := ray.util.list_named_actors():
        actors = []
        for name in [name for name in names if name != DIRECTORY] or names:
            with suppress(ValueError):  # it has ended meanwhile
                actors.append(ray.get_actor(name))
        ray.wait([each.stop.remote() for each in actors], num_returns=len(actors), timeout=_END_WITHIN_S)
        for each in actors:
            ray.kill(each)


def find_directory() -> str:
    """The host and port of the directory.

    Raises:
        CommandProblem: there is no Ray, or no directory.
    """
    ray = _connect()
    if DIRECTORY not in ray.util.list_named_actors():
        raise CommandProblem("no cluster is up: begin one with instep cluster ray up")
    return _directory_address(ray)


def _directory_address(ray: Any) -> str:
    (host,) = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]}
    return f"{host}:{PORT}"


def _options(name: str, **own: Any) -> dict[str, Any]:
    return {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0, **own}


def _connect() -> Any:
    try:
        import ray

        ray.init("auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except ModuleNotFoundError:
        raise CommandProblem('Ray is not installed: pip install "instep[cluster]"') from None
    except ConnectionError:
        sentence = "no Ray runs on this machine: begin with ray start, or set RAY_ADDRESS"
        raise CommandProblem(sentence) from None
    return ray
