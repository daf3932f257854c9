"""Ray's workers on this machine, forked from a process that has imported what they use.

A worker takes some five seconds of a core to import torch, open_clip and Ray Data, and a run starts many. Here that is
done once, while Ray starts. `python fork_server.py serve FD MODULES` imports the modules and forks a worker for each
request; `python fork_server.py ask SOCKET ARGUMENTS` stands in place of the Python that Ray starts with `ARGUMENTS`. It
is a script that imports nothing of the package, because it must start at once.

Ray keeps the environment that it was imported in, with the numbers of the job and of the raylet. So each job on each node
has a process that has imported Ray, forked from the one that has imported all else.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

VECTORS = ("clipray.analysis.vector_partition", "faiss", "pydantic.v1", "prometheus_client", "aiohttp", "click")
"""What workers use that work on vectors, and what Ray uses in each; imported while Ray starts."""
MODELS = (
    "open_clip", "clipray.pipelines.image_loader", "clipray.pipelines.region", "clipray.pipelines.attack",
    "clipray.pipelines.point_cloud", "clipray.pipelines.text", "clipray.pipelines.caption", "clipray.pipelines.class_texts",
)  # fmt: skip
"""What workers use that encode. None of it may look for a GPU when it is imported: CUDA does not survive a fork."""
RAY = ("ray.data", "clipray.engine.stream", "clipray.engine.vector_actors", "clipray.engine.index_builder")
WORKER = "default_worker.py"  # the script that Ray's workers run
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="  # for Ray's script that becomes the worker's
NO_JOB = "ffffffff"  # of a worker that Ray starts ahead; it serves any job
REQUEST_BYTES = 1 << 18
IDS = 4_096  # that a worker may draw


@contextlib.contextmanager
def forking_python(environment: Mapping[str, str], ahead: Sequence[str]) -> Iterator[str]:
    """The path of a Python for Ray to start its workers with, for the time of the block.

    Where there is no server, or none any more, it is the Python of now. Forked workers live on after the block.

    Args:
        environment: of the process that imports the modules.
        ahead: what it imports at once; modules that are not there are left out.
    """
    if sys.platform != "linux":  # the frameworks of macOS do not bear a fork
        yield sys.executable
        return
    folder = tempfile.mkdtemp(prefix="clipray-")
    server, python = f"{folder}/server", f"{folder}/python"
    try:
        with open(python, "w") as file:
            words = [sys.executable, "-IS", __file__, "ask", server]
            file.write(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        os.chmod(python, 0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(server)
            listener.listen(socket.SOMAXCONN)
            number = listener.fileno()
            words = [sys.executable, "-P", __file__, "serve", str(number), *ahead]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[number], env=dict(environment))
        with process:  # should this process be killed, it ends with its standard input
            try:
                yield python
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ask(server: str, arguments: list[str]) -> None:
    """Hand the arguments of a worker to the server; any other process becomes the Python that was asked for.

    So does a worker whose runtime environment is more than variables and a working directory.
    """
    (context, *_) = [json.loads(a.removeprefix(CONTEXT)) for a in arguments if a.startswith(CONTEXT)] or [{}]
    folder, prefix = os.getcwd(), context.get("command_prefix") or []
    if len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&"):
        folder, prefix = prefix[1], []
    if not prefix and any(argument.endswith(WORKER) for argument in arguments):
        words = [argument for argument in arguments if not argument.startswith((CONTEXT, LANGUAGE))]
        request = json.dumps([words, {**os.environ, **context.get("env_vars", {})}, folder]).encode()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(server)
            socket.send_fds(connection, [request], [0, 1, 2])
            return
    os.execv(sys.executable, [sys.executable, *arguments])


def serve(listener: socket.socket, ahead: Sequence[str]) -> None:
    """Pass each request on to the process of its job and raylet, until the standard input is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the run ends its workers
    _import(ahead)
    jobs: dict[tuple[str | None, str | None], socket.socket] = {}
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        request, descriptors, *_ = socket.recv_fds(connection, REQUEST_BYTES, 3)
        connection.close()
        environment = json.loads(request)[1]
        raylet = environment.get("RAY_RAYLET_PID")
        job = (NO_JOB if (NO_JOB, raylet) in jobs else environment.get("RAY_JOB_ID"), raylet)
        if job not in jobs:
            jobs[job], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork() == 0:
                for other in (listener, *jobs.values()):
                    other.close()
                serve_job(theirs)
            theirs.close()
        socket.send_fds(jobs[job], [request], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
    shutil.rmtree(os.path.dirname(listener.getsockname()), ignore_errors=True)  # of a run that was killed
    os._exit(0)  # at once: there is nothing to finalize


def serve_job(requests: socket.socket) -> None:
    """Fork a worker for each request, until no more can come."""
    while (received := socket.recv_fds(requests, REQUEST_BYTES, 3))[0]:
        request, descriptors, *_ = received
        arguments, environment, folder = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        _import(RAY)
        if os.fork() == 0:
            requests.close()
            os.chdir(folder)
            become_worker(arguments, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        _draw_ids()
    os._exit(0)


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        with contextlib.suppress(ImportError):  # of an extra, or of another Ray: its workers start more slowly
            importlib.import_module(module)
    gc.freeze()  # no worker copies the memory of these modules when it looks for garbage


def _draw_ids() -> None:
    """Go on in the random numbers of which Ray makes its ids: the next worker must not draw those of the last one."""
    import ray

    for _ in range(IDS):
        ray.ObjectRef.from_random()


def become_worker(arguments: list[str], descriptors: Sequence[int]) -> None:
    """Run Ray's worker in this process, which was forked for it. Returns never."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    while not arguments[0].endswith(WORKER):
        arguments.pop(0)
    sys.argv = arguments
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [path for path in named if path not in sys.path]
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    else:
        ask(sys.argv[2], sys.argv[3:])
