"""A cluster on Ray: an actor on the head runs the directory, and one on each node with the resource `instep` an agent.

The actors are detached. Each runs a plain program, and starts it again when it has ended. Ray carries no frames and no
states, and is not asked which nodes are lost.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from tempfile import NamedTemporaryFile
from typing import Any, Final

from instep.config import Config
from instep_tools.problems import CommandProblem

RESOURCE: Final = "instep"
NAMESPACE: Final = "instep"
DIRECTORY: Final = "directory"
PORT: Final = 5750
"""The directory's."""
_LOOK_EVERY_S: Final = 1.0
_PAUSE_S: Final = 10.0
_CANNOT_START: Final = 2
"""The exit status of a program that would hardly start if it were tried again at once."""
_ANSWER_WITHIN_S: Final = 2.0
_END_WITHIN_S: Final = 60.0
_PROGRAM: Final = """
import signal, sys
from instep.__main__ import main
from instep.interrupts import end_with_parent
end_with_parent(int(sys.argv.pop(1)), signal.SIGKILL)
main()
"""


class ProgramActor:
    """Runs `instep cluster` with these arguments until `stop`.

    Args:
        name: of the program, in sentences.
        folder: is made if it is not there.
        arguments: of the command.
        config: the text of a configuration.
    """

    def __init__(self, name: str, folder: str, arguments: Sequence[str], config: str) -> None:
        with suppress(OSError):  # the program says what is wrong with it
            os.makedirs(folder, exist_ok=True)
        self._file = NamedTemporaryFile("w", prefix="instep-", suffix=".yaml")  # noqa: SIM115 - as long as the actor
        self._file.write(config)
        self._file.flush()
        self._name, self._arguments = name, ["cluster", *arguments, "--config", self._file.name]
        self._problem = ""
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def problem(self) -> str:
        """How the program ended last; empty if it has not."""
        return self._problem

    def stop(self) -> None:
        """End the program in order, and return when it has ended."""
        self._stops.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._keep_running()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # Ray starts the actor again

    def _keep_running(self) -> None:
        count = 0
        while not self._stops.is_set():
            with subprocess.Popen([sys.executable, "-c", _PROGRAM, str(os.getpid()), *self._arguments]) as process:
                while process.poll() is None and not self._stops.is_set():
                    self._look()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_EVERY_S)
                process.terminate()
            count += 1
            self._problem = (
                f"{self._name} has ended {count} times, last with status {process.returncode}: see its log at Ray"
            )
            self._stops.wait(_PAUSE_S if process.returncode == _CANNOT_START else _LOOK_EVERY_S)

    def _look(self) -> None:
        """Called about once a second."""


class DirectoryActor(ProgramActor):
    """Runs the directory, and has an agent run on each node, those that join later among them."""

    def __init__(self, arguments: Sequence[str], config: str) -> None:
        from ray.util import get_node_ip_address

        self._config = Config.model_validate_json(config)
        assert self._config.recording.file is not None
        self._recordings = self._config.recording.file
        self._address = f"{get_node_ip_address()}:{PORT}"
        self._agents: dict[str, Any] = {}
        folder = str(self._recordings / "directory.store")
        arguments = ["directory", "--store", folder, "--endpoint", f"tcp://{self._address}", *arguments]
        super().__init__("the directory", folder, arguments, config)

    def address(self) -> str:
        """Host and port of the directory."""
        return self._address

    def _look(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            number, name, host = node["NodeID"], node["NodeName"], node["NodeManagerAddress"]
            if number in self._agents or not node["Alive"] or RESOURCE not in node["Resources"]:
                continue
            folder = str(self._recordings / name)
            arguments = ["agent", "--name", name, "--directory", self._address]
            arguments += ["--endpoint", f"tcp://{host}:{self._config.transport.endpoint.rpartition(':')[2]}"]
            arguments += ["--record", folder]
            options = _options(
                f"agent-{number}",
                resources={RESOURCE: 1},
                num_gpus=int(self._config.engine.device.startswith("cuda")),
                scheduling_strategy=NodeAffinitySchedulingStrategy(number, soft=False),
                get_if_exists=True,  # when another process was this actor before
            )
            actor = ray.remote(ProgramActor).options(**options)
            self._agents[number] = actor.remote(
                f"the agent of {name}", folder, arguments, self._config.model_dump_json()
            )


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
    if config.recording.file is None or not config.model.folders:
        raise CommandProblem("a cluster needs a model and --record FOLDER")
    arguments = [f"--shards={shards}", f"--copies={copies}", "--adopt", adopt]
    with _connected() as ray:
        options = _options(DIRECTORY, resources={"node:__internal_head__": 0.001})
        try:
            actor = ray.remote(DirectoryActor).options(**options).remote(arguments, config.model_dump_json())
            return str(ray.get(actor.address.remote()))
        except ValueError:
            raise CommandProblem("a cluster is up: end it first, with instep cluster down --on ray") from None
        except ray.exceptions.RayError as error:  # as where the head has no instep
            raise CommandProblem(f"Ray cannot start the directory: {error}") from None


def down() -> None:
    """End the agents in order, then the directory.

    Raises:
        CommandProblem: there is no Ray.
    """
    with _connected() as ray:
        while actors := _actors(ray):  # a node may have joined meanwhile
            directory = [actors.pop(name) for name in [*actors] if name == DIRECTORY]
            for each in filter(None, (list(actors.values()), directory)):
                ray.wait([actor.stop.remote() for actor in each], num_returns=len(each), timeout=_END_WITHIN_S)
                for actor in each:
                    ray.kill(actor)


def find_directory() -> tuple[str, list[str]]:
    """The host and port of the directory, and a sentence for each program that has ended.

    Raises:
        CommandProblem: there is no Ray, or no directory.
    """
    with _connected() as ray:
        actors = _actors(ray)
        if DIRECTORY not in actors:
            raise CommandProblem("no cluster is up: begin one with instep cluster up --on ray")
        address = actors[DIRECTORY].address.remote()
        asked = [address, *(each.problem.remote() for each in actors.values())]
        answers, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_WITHIN_S)  # lost nodes do not answer
        found = {}
        for each in answers:
            with suppress(ray.exceptions.RayError):
                found[each] = ray.get(each)
        if address not in found:
            raise CommandProblem("Ray has not started the directory yet, or starts it again: try again")
        return found.pop(address), sorted(filter(None, found.values()))


def _options(name: str, **own: Any) -> dict[str, Any]:
    lasting = {"namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    return {"name": name, **lasting, **own}


def _actors(ray: Any) -> dict[str, Any]:
    found = {}
    for name in ray.util.list_named_actors():
        with suppress(ValueError):  # it has ended meanwhile
            found[name] = ray.get_actor(name)
    return found


@contextmanager
def _connected() -> Iterator[Any]:
    try:
        import ray

        ray.init("auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except ModuleNotFoundError:
        raise CommandProblem('Ray is not installed: pip install "instep[cluster]"') from None
    except ConnectionError:
        sentence = "no Ray runs on this machine: begin with ray start, or set RAY_ADDRESS"
        raise CommandProblem(sentence) from None
    try:
        yield ray
    finally:
        ray.shutdown()
