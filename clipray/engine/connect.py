"""Connect to a Ray cluster, or start Ray on this machine for the time of a run.

A Ray that starts here needs a short path for its sockets, a token, and room on its disks.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Ray reads these when it is imported; without the first, every worker that was asked for no GPU prints a warning.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else its threads start a new Ray while an old one ends
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ core writes to our terminal

import ray

from clipray.engine.cluster import ClusterResources, Node
from clipray.engine.fork_server import MODELS, VECTORS, forking_python
from clipray.engine.ray_internals import nodes_to_come, quiet_raylet, without_driver_path, without_helpers
from clipray.errors import PlanError, one_line
from clipray.storage.environment import need_room

# Threads that wait for work sleep instead of spinning: decoding needs the cores that the network leaves idle.
# Torch takes large tensors in huge pages: half the page faults of a model that is loaded.
# Must be set before torch is imported, so it is part of the workers' environment.
WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0", "THP_MEM_ALLOC_ENABLE": "1",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip
ANSWER_S = 5.0  # in which a head takes a connection
CONNECT_S = 60.0  # in which Ray has found its node on this machine
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a socket, in any Unix
SESSION = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
ROOM_BYTES = 128 * 2**20  # for Ray's logs and what it spills; with less, its workers fail without a word
FULL_BYTES = 16 * 2**20  # of a disk that is full, as a cause
MANY = 64  # of a kind of node that may be added without end
_abandoned = threading.Event()


def local_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def connected(
    address: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    ahead: Sequence[str] = (*MODELS, *VECTORS),
) -> Iterator[ClusterResources]:
    """Ray for the time of the block: the running instance of this process, the cluster at `address` (or in
    RAY_ADDRESS), else a new one on this machine, which ends with the block.

    Args:
        say: takes one line for each thing a person should know.
        ahead: modules that workers of this machine have imported when they start; none: each imports what it uses.

    Raises:
        PlanError: no cluster answers at the address. RunError: this machine has no room for one.
    """
    _quiet_ray()
    if ray.is_initialized():
        yield cluster_now(local=False)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise PlanError(
            f"{address}: a Ray client cannot stream a table; run on a node of the cluster with `--address auto`, "
            "or `clipray submit JOB --address http://HEAD:8265`"
        )
    if "://" in address:
        raise PlanError(
            f"{address} is a job server: `clipray submit JOB --address {address}`; expected auto or HOST:PORT"
        )
    if address not in ("local", "auto"):
        _knock(address)
    local = address == "local"
    with contextlib.ExitStack() as until_the_end:
        if local:
            os.environ.update({**WORKER_ENV, **os.environ})  # inherited: workers that Ray has started ahead can be used
            with ready_for_ray(say), without_helpers(), _forked_workers(until_the_end, ahead):
                _join(address)
        else:
            _join(address)
        try:
            with quiet_raylet():
                yield cluster_now(local=local)
        finally:
            if not abandoned():
                ray.shutdown()


@contextlib.contextmanager
def _forked_workers(until: contextlib.ExitStack, ahead: Sequence[str]) -> Iterator[None]:
    """A Ray that starts within the block has its workers forked by a process that lives as long as `until`.

    Not if there is nothing to import `ahead`.
    """
    before = sys.executable
    if ahead:
        sys.executable = until.enter_context(forking_python(os.environ, ahead))
    try:
        yield
    finally:
        sys.executable = before


def _join(address: str) -> None:
    """Start Ray on this machine, or join a cluster. Raises PlanError."""
    options: dict[str, Any] = {"runtime_env": {"env_vars": WORKER_ENV}}
    if address == "local":  # one core must still hold an encoder and a decoding task at once
        options = {"num_cpus": max(2, local_cpus()), "include_dashboard": False}
    try:
        with _silent_stderr(), _own_sigterm(), _in_time(address), without_driver_path(options) as safe_options:
            ray.init(address, **safe_options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        if "AuthenticationError" in f"{type(error)} {error.__cause__}":  # as text: Ray words what its client raised
            raise PlanError(
                f"the cluster at {address!r} refuses us: set RAY_AUTH_MODE=token, and put its token into "
                "~/.ray/auth_token or RAY_AUTH_TOKEN (`ray get-auth-token` on its head shows it)"
            ) from error
        raise PlanError(f"no Ray cluster could be reached at {address!r}: {one_line(error)}") from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # of no class of its own
            raise
        raise PlanError(
            "Ray did not start within its 30 s: this machine is too busy; run again when it is less so"
        ) from error


def answers() -> bool:
    """Whether the Ray that this process joined is still there: a signal to our process group or service reaches it too."""
    with contextlib.suppress(ray.exceptions.RayError, OSError):
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S):
            return True
    return False


def abandon() -> None:
    """Leave Ray as it is, for good: shut down under a thread that still waits for it, it ends this process without a
    word. What it started here ends with this process.
    """
    _abandoned.set()
    atexit.unregister(ray.shutdown)


def abandoned() -> bool:
    """Whether Ray was left."""
    return _abandoned.is_set()


def _knock(address: str) -> None:
    """Raises PlanError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S):
            return
    except ValueError:
        raise PlanError(f"{address}: expected auto or HOST:PORT of a Ray head, such as 10.0.0.1:6379") from None
    except OSError as error:
        raise PlanError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


@contextlib.contextmanager
def _in_time(address: str) -> Iterator[None]:
    """Raises PlanError when it takes too long; Ray waits without end for a node of its cluster on this machine."""
    if address == "local" or threading.current_thread() is not threading.main_thread():
        yield
        return
    late = threading.Event()

    def stop() -> None:
        late.set()
        _thread.interrupt_main()

    timer = threading.Timer(CONNECT_S, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not late.is_set():
            raise
        raise PlanError(
            f"no node of the cluster at {address} was found on this machine in {CONNECT_S:.0f} s: run the job on one of "
            "its nodes, or `clipray submit JOB --address http://HEAD:8265`"
        ) from None
    finally:
        timer.cancel()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray replaces it with one that exits without a word."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's C++ core greets on file descriptor 2, past Python; its failures come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cluster_now(*, local: bool) -> ClusterResources:
    """The cluster that this process has joined, as it is now; `local`: Ray was started for it, on this machine."""
    members = tuple(_node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"])
    return ClusterResources(members, local, () if local else _to_come(members))


def _node(resources: Mapping[str, float], labels: Mapping[str, str]) -> Node:
    get = resources.get
    return Node(get("CPU", 0.0), get("GPU", 0.0), get("memory", 0.0), dict(labels))


def _to_come(members: Sequence[Node]) -> tuple[Node, ...]:
    """Nodes that the cluster's autoscaler, if it has one, may still add."""
    there = Counter(node.labels.get("ray.io/node-group") for node in members)
    return tuple(
        _node(group.resources, {"ray.io/node-group": group.name})
        for group in nodes_to_come()
        for _ in range(max(0, (group.max_count if group.max_count >= 0 else MANY) - there[group.name]))
    )


def _quiet_ray() -> None:
    """Ray's own progress bars and log lines give way to clipray's; its log files are kept where Ray keeps them."""
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data\.")
    logging.getLogger("ray").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def ready_for_ray(say: Callable[[str], None]) -> Iterator[None]:
    """A Ray that starts within the block finds a place for its files and a token.

    Raises:
        PlanError: the folder that RAY_TMPDIR names is too long a path. RunError: there is too little room in it.
    """
    before = os.environ.get("RAY_TMPDIR")
    folder = _short(temporary_folder(), say)
    need_room(folder, "Ray's temporary folder (RAY_TMPDIR, or TMPDIR)", ROOM_BYTES)
    if _token_is_lacking():
        # Of this process and its children alone; authentication stays on.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)


def temporary_folder() -> str:
    """Where a Ray that is started here keeps its sessions, but for their folder `ray`."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def full_places() -> list[str]:
    """Of the disks on which workers rest, those that are full now."""
    places = {"/dev/shm": "/dev/shm (shared memory)", temporary_folder(): f"{temporary_folder()} (temporary files)"}
    full = []
    for folder, name in places.items():
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free < FULL_BYTES:
                full.append(name)
    return full


def _short(folder: str, say: Callable[[str], None]) -> str:
    """`folder`, or /tmp where the sockets in it would have too long a path."""
    room = SOCKET_BYTES - len(SESSION)
    if len(os.fsencode(os.path.abspath(folder))) <= room:
        return folder
    if os.environ.get("RAY_TMPDIR") or not os.access("/tmp", os.W_OK):
        raise PlanError(f"{folder}: too long for the sockets of Ray; set RAY_TMPDIR to a path of at most {room} bytes")
    say("TMPDIR is too long a path for the sockets of Ray, which uses /tmp instead; RAY_TMPDIR sets another")
    return "/tmp"


def _token_is_lacking() -> bool:
    """Whether Ray would want to write a token where it cannot: in a container, a home may not be ours."""
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return False
    try:
        home = Path.home() / ".ray"
    except RuntimeError:  # nobody knows of one
        return True
    if (home / "auth_token").is_file():
        return not os.access(home / "auth_token", os.R_OK)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return True
    return not os.access(home, os.W_OK)
