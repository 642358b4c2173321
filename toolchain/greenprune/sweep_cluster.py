"""Ray: one of our own on this machine, or a cluster that is there already.

Ray reports usage statistics to its makers unless told not to; here it is always told not to. It
also listens on the network and runs what it is sent; ours listens on the loopback alone, and asks
for a token that only this process and its workers have.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from greenprune._version import __version__
from greenprune.cores import usable_cores
from greenprune.errors import MissingPackageError, RunError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 90.0
"""How long an address has to accept a connection, and a busy cluster to let us in."""
START_TRIES = 6
"""Ray gives its own daemons 30 s to start, which is little on a busy machine."""
STORE_BYTES = 100 << 20
"""Shared memory of our own Ray; what travels between tasks is text, and files go by the disk."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry, here and in the workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks that ask for no GPU may still use one
}
PRIVATE = {
    # named for the systems where it is the default: nodes are known by the loopback's address
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
}
PROBE = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.cluster_resources()
"""


@contextmanager
def joined(address: str | None, workers: int) -> Iterator[Any]:
    """Yield the module ``ray``, connected; disconnect, or stop our own Ray, in the end.

    Args:
        address: of a cluster; None: a Ray of our own, which listens on this machine alone.
        workers: tasks at once on a Ray of our own.

    Raises:
        MissingPackageError: Ray is not installed.
        RunError: the address does not answer, or Ray does not start.
    """
    own = {**PRIVATE, "RAY_AUTH_TOKEN": _token()} if address is None else {}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with _environment({**ENVIRONMENT, **own}):
        try:
            import ray
        except ImportError as error:
            raise MissingPackageError("ray", "sweep") from error
        if address is None:
            _start(ray, workers, quiet)
        else:
            _probe(address)
            ray.init(address=address, **quiet)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # Ray tells of dead workers on stdout
                yield ray
        except ConnectionError as error:
            raise RunError(
                f"the Ray cluster is gone: {last_line(error)}; the same command goes on where this "
                "one stopped"
            ) from error
        finally:
            ray.shutdown()


@functools.cache
def _token() -> str:
    """One for this process: Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set them, for Ray's processes too, and put back what was there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(ray: Any, workers: int, quiet: dict[str, Any]) -> None:
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(
                address="local",
                num_cpus=workers,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
            return
        except Exception as error:  # Ray's own are plain ones too
            with contextlib.suppress(Exception):
                ray.shutdown()
            if not left:
                raise RunError(
                    f"Ray did not start on this machine in {START_TRIES} tries: {last_line(error)}"
                    "; make room on the machine, or set RAY_TMPDIR to a folder with a short path, "
                    "and run the same command again"
                ) from error


def _probe(address: str) -> None:
    """Ask in a process of its own, which can be ended: Ray itself may wait, or abort."""
    if address == "local":
        raise RunError(
            "--address local: a Ray of this machine's own is what comes without --address"
        )
    place = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    try:
        if place:
            there = place[1].strip("[]"), int(place[2])
            socket.create_connection(there, CONNECT_SECONDS).close()
        done = subprocess.run(
            [sys.executable, "-c", PROBE, address],
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWER_SECONDS,
        )
    except OSError as error:
        raise _no_answer(address, last_line(error)) from None
    except subprocess.TimeoutExpired:
        raise _no_answer(address, f"nothing within {ANSWER_SECONDS:g} s") from None
    if done.returncode:
        raise _no_answer(address, last_line(done.stderr))


def _no_answer(address: str, got: str) -> RunError:
    return RunError(
        f"--address {address}: expected a Ray cluster that answers, got: {got}; start one with "
        "`ray start --head`, set RAY_AUTH_MODE=token where it wants one, or leave --address out"
    )


def last_line(told: object) -> str:
    """The last line of a message, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(told))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no reason given"


def check_nodes(ray: Any, folder: Path) -> None:
    """Every node must see the sweep's folder and have this version of greenprune.

    Raises:
        RunError: one does not.
    """
    for left in folder.glob(".token-*"):  # by a sweep that was killed
        left.unlink(missing_ok=True)
    token = folder / f".token-{uuid.uuid4().hex}"
    token.touch()
    try:
        for node in _nodes(ray):
            _check_node(ray, node, token)
    finally:
        token.unlink(missing_ok=True)


def only_on(node: str) -> Any:
    """A scheduling strategy: this node, by its id, and no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _check_node(ray: Any, node: dict[str, Any], token: Path) -> None:
    asked = ray.remote(num_cpus=0, scheduling_strategy=only_on(node["NodeID"]))(look).remote(
        str(token)
    )
    where = f"Ray node {node.get('NodeManagerAddress', node['NodeID'])}"
    try:
        sees, version = ray.get(asked, timeout=ANSWER_SECONDS)
    except Exception as error:  # of Ray's tree, or what the node raised
        raise RunError(
            f"{where}: expected one with greenprune {__version__} that runs tasks, got: "
            f"{last_line(error)}; install it there"
        ) from error
    if version != __version__:
        raise RunError(f"{where}: expected greenprune {__version__}, got {version}; install it")
    if not sees:
        raise RunError(
            f"{where} does not see {token.parent}: all nodes must share the folder of runs; choose "
            "one that they share with --runs"
        )


def look(token: str) -> tuple[bool, str]:
    """On a node: whether the file is there, and which greenprune."""
    return Path(token).is_file(), __version__


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def whole_node(ray: Any) -> float:
    """CPUs of the largest node: a task that asks for them has its node to itself, and on a cluster
    all measurements are made on nodes of one size."""
    found = [float(node["Resources"]["CPU"]) for node in _nodes(ray)]
    if not found:
        raise RunError("the Ray cluster has no node with a CPU; add one and run the sweep again")
    return max(found)


def threads_of_a_task() -> int:
    """In a worker: cores of this node for each of its CPUs in Ray."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    cpus = next(node["Resources"]["CPU"] for node in _nodes(ray) if node["NodeID"] == here)
    return max(1, int(usable_cores() // cpus))
