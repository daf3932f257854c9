"""Ray's workers for the tests, forked from one process that has imported what they use.

A worker takes up to 6 s of a core to import Ray Data, torch and open_clip, and the tests start hundreds of workers.
`python forked.py serve DESCRIPTOR` imports once and forks them; `python forked.py ask SOCKET ARGUMENTS` stands in place
of the Python that Ray starts with `ARGUMENTS`.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys

MODULES = (
    "ray._private.workers.default_worker", "ray.data", "ray.dashboard.utils", "pydantic.v1", "prometheus_client",
    "aiohttp", "click", "faiss", "open_clip", "sklearn.cluster", "torchvision.ops",
    "clipray.engine.index_builder", "clipray.engine.stream", "clipray.engine.vector_actors",
    "clipray.pipelines.attack", "clipray.pipelines.caption", "clipray.pipelines.class_texts",
    "clipray.pipelines.image_loader", "clipray.pipelines.point_cloud", "clipray.pipelines.region",
)  # fmt: skip
LONGEST = 1 << 18  # bytes of a request


def ask(server: str, arguments: list[str]) -> None:
    """Hand the arguments of a worker to the server; any other process becomes the Python that was asked for."""
    if not any(argument.endswith("default_worker.py") for argument in arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
    request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server)
        socket.send_fds(connection, [request], [0, 1, 2])


def serve(listener: socket.socket) -> None:
    """Fork a worker for each request, until the standard input is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        request, descriptors, *_ = socket.recv_fds(connection, LONGEST, 3)
        connection.close()
        arguments, environment, folder = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)  # Ray and torch read it when they are imported: with the first worker
        for module in MODULES:
            with contextlib.suppress(ImportError):  # a Ray that has no such module starts its workers more slowly
                importlib.import_module(module)
        gc.freeze()  # no worker copies the memory of these modules when it looks for garbage
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            os.chdir(folder)
            for descriptor, place in zip(descriptors, (0, 1, 2), strict=True):
                os.dup2(descriptor, place)
            become_worker(arguments)
        for descriptor in descriptors:
            os.close(descriptor)
    os._exit(0)  # at once: there is nothing to finalize


def become_worker(arguments: list[str]) -> None:
    while not arguments[0].endswith("default_worker.py"):
        arguments.pop(0)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(sys.argv[2], sys.argv[3:])
