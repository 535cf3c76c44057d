"""The commands `instep cluster` that ask the directory; `instep.cli` has those that need a configuration."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any, Final

import typer

from instep_tools.command_line import CommandLine, KeyFile, ServerKey

DIRECTORY_ENDPOINT: Final = "127.0.0.1:5750"
_LOOK_S: Final = 0.5

app = CommandLine(help="Serve shards on several machines, each with a copy on another one.")

ShardNumber = Annotated[int, typer.Argument(metavar="SHARD", min=0, help="The number of the shard.")]
Node = Annotated[str, typer.Argument(metavar="NODE", help="The name of the node.")]
DirectoryAt = Annotated[
    str, typer.Option("--directory", envvar="INSTEP_DIRECTORY", metavar="HOST:PORT", help="Where the directory is.")
]
ray_app = CommandLine(help="Begin and end a cluster on Ray, at RAY_ADDRESS or on this machine.")
app.add_typer(ray_app, name="ray")


@app.callback()
def _set_keys(key_file: KeyFile = None, server_key: ServerKey = None) -> None:
    given = {"INSTEP_KEY_FILE": key_file, "INSTEP_SERVER_KEY": server_key}
    os.environ |= {name: value for name, value in given.items() if value}


@app.command(examples=["instep cluster status", "instep cluster status --directory 10.0.0.1:5750 --check"])
def status(
    directory: DirectoryAt = DIRECTORY_ENDPOINT,
    check: Annotated[bool, typer.Option("--check", help="End with 1 also while a shard has no copy.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show where every shard is served, where its copy is, and what is wrong.

    `--directory ray` finds the directory of `instep cluster ray up`. Exit status 0: every shard is served. 1: one is
    not. 2: the directory did not answer.
    """
    from instep_tools.terminal import Terminal

    found, terminal = _ask(directory, "status"), Terminal(json)
    if json:
        terminal.result(found)
    else:
        if found["problem"]:
            terminal.error(found["problem"])
        shards = [
            (str(each["shard"]), str(each["term"]), each["server"], each["copy"] or _joining(each), _shard_state(each))
            for each in found["shards"]
        ]
        terminal.table(("shard", "term", "server", "copy", ""), shards, slice(2))
        terminal.say("")
        nodes = [
            (
                each["node"],
                each["address"],
                str(each["servers"]),
                str(each["copies"]),
                _node_state(each),
            )
            for each in found["nodes"]
        ]
        terminal.table(("node", "address", "servers", "copies", ""), nodes, slice(2, 4))
    is_well = not any(shard["problem"] or (check and shard["alone_s"]) for shard in found["shards"])
    raise typer.Exit(int(not is_well))


def _joining(shard: dict[str, Any]) -> str:
    return f"({shard['joining']})" if shard["joining"] else ""


def _shard_state(shard: dict[str, Any]) -> str:
    target = f"moves to {shard['target']}" if shard["target"] else ""
    alone = f"without a copy for {shard['alone_s']:.0f} s" if shard["alone_s"] >= 1 else ""
    return shard["problem"] or "; ".join(filter(None, (shard["endpoint"], target, alone)))


def _node_state(node: dict[str, Any]) -> str:
    if node["refused"]:
        return f"refused: {node['refused']}"
    return ", ".join([*(["lost"] if not node["alive"] else []), *(["drained"] if node["drained"] else [])])


@app.command(examples=["instep cluster move 3 n2"])
def move(shard: ShardNumber, node: Node, directory: DirectoryAt = DIRECTORY_ENDPOINT) -> None:
    """Have another node serve a shard, without losing a frame: its streams wait for about half a second.

    Exit status 0: the move has begun, see `instep cluster status`. 2: it is not possible.
    """
    _ask(directory, "move", shard, node)
    typer.echo(f"shard {shard} moves to {node}: see instep cluster status")


@app.command(examples=["instep cluster drain n2", "instep cluster drain n2 --wait"])
def drain(
    node: Node,
    directory: DirectoryAt = DIRECTORY_ENDPOINT,
    wait: Annotated[bool, typer.Option("--wait", help="End only when the node may be stopped.")] = False,
) -> None:
    """Move all servers and copies away from a node, one after another, so that it can be stopped.

    Exit status 0: it has begun; with --wait, the node may be stopped. 2: there is no such node.
    """
    _ask(directory, "drain", node)
    typer.echo(f"{node} is being drained: see instep cluster status")
    if wait:
        said = ""
        while left := _left_on(node, _ask(directory, "status")):
            if left != said:
                typer.echo(said := left)
            time.sleep(_LOOK_S)
        typer.echo(f"{node} may be stopped")


def _left_on(node: str, found: dict[str, Any]) -> str:
    """The shards that cannot do without a node; a copy stays there while no other node can take it."""
    others = [each for each in found["nodes"] if each["alive"] and not each["drained"] and each["node"] != node]
    served = [str(each["shard"]) for each in found["shards"] if each["server"] == node]
    moving = [str(each["shard"]) for each in found["shards"] if node in (each["joining"], each["target"])]
    copied = [str(each["shard"]) for each in found["shards"] if each["copy"] == node and len(others) > 1]
    parts = {"served": served, "copied": copied, "on their way": moving}
    return "; ".join(f"shards still {what} there: {', '.join(shards)}" for what, shards in parts.items() if shards)


@app.command(examples=["instep cluster undrain n2"])
def undrain(node: Node, directory: DirectoryAt = DIRECTORY_ENDPOINT) -> None:
    """Use a node again after `instep cluster drain`.

    Exit status 0: done. 2: it is not drained.
    """
    _ask(directory, "undrain", node)


@app.command("accept-loss", examples=["instep cluster accept-loss 3 n2"])
def accept_loss(shard: ShardNumber, node: Node, directory: DirectoryAt = DIRECTORY_ENDPOINT) -> None:
    """Serve a shard whose server and copy are both lost from what a node has of it, which may be older or nothing.

    End the agents of the lost nodes first: a server that is only cut off would go on. Streams whose newest frames are
    lost get DATA_LOSS. Exit status 0: done. 2: it is not needed, or not possible.
    """
    _ask(directory, "accept_loss", shard, node)


@ray_app.command(examples=["instep cluster ray down"])
def down() -> None:
    """End what `instep cluster ray up` began: agents with their servers in order, then the directory.

    Recordings and the directory's store are kept. Exit status 0: nothing is left. 2: there is no Ray.
    """
    from instep.cluster.ray import down

    down()


def _ask(directory: str, verb: str, *arguments: Any) -> Any:
    from instep.cluster.talk import Caller, NoAnswer, Rejected
    from instep_client.key_files import read_client_keys
    from instep_tools.problems import CommandProblem

    if directory == "ray":
        from instep.cluster.ray import find_directory

        directory = find_directory()
    directory = directory.removeprefix("tcp://")
    keys = read_client_keys(None, None)
    caller = Caller(f"tcp://{directory}", keys)
    try:
        return caller.ask(verb, *arguments, within_s=3.0)
    except NoAnswer:
        helps = "--server-key is not its public key" if keys else "it has keys: give --key-file and --server-key"
        raise CommandProblem(f"the directory at {directory} does not answer, or {helps}") from None
    except Rejected as error:
        raise CommandProblem(str(error)) from None
    finally:
        caller.close()
