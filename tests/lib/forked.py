"""Ray's workers for the tests, forked from one process that has imported what they use.

A worker takes up to 6 s of a core to import Ray Data, torch and open_clip, and the tests start hundreds of workers.
`python forked.py serve DESCRIPTOR` imports once and forks them; `python forked.py ask SOCKET ARGUMENTS` stands in place
of the Python that Ray starts with `ARGUMENTS`. Ray keeps the environment that it was imported in, with the numbers of
the job and of the raylet, so each job on each node has a process that has imported Ray, forked from the one that has
imported all else.
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

LIBRARIES = (
    "pydantic.v1", "prometheus_client", "aiohttp", "click", "faiss", "open_clip", "sklearn.cluster", "torchvision.ops",
    "clipray.pipelines.attack", "clipray.pipelines.caption", "clipray.pipelines.class_texts",
    "clipray.pipelines.image_loader", "clipray.pipelines.point_cloud", "clipray.pipelines.region",
)  # fmt: skip
RAY = (
    "ray._private.workers.default_worker", "ray.data", "ray.dashboard.utils",
    "clipray.engine.index_builder", "clipray.engine.stream", "clipray.engine.vector_actors",
)  # fmt: skip
LONGEST = 1 << 18  # bytes of a request
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="  # for Ray's script that becomes the worker's


def ask(server: str, arguments: list[str]) -> None:
    """Hand the arguments of a worker to the server; any other process becomes the Python that was asked for.

    So does a worker whose runtime environment is more than variables and a working directory.
    """
    (context, *_) = [json.loads(a.removeprefix(CONTEXT)) for a in arguments if a.startswith(CONTEXT)] or [{}]
    folder, prefix = os.getcwd(), context.get("command_prefix") or []
    if len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&"):
        folder, prefix = prefix[1], []
    if prefix or not any(argument.endswith("default_worker.py") for argument in arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
    arguments = [argument for argument in arguments if not argument.startswith((CONTEXT, LANGUAGE))]
    request = json.dumps([arguments, {**os.environ, **context.get("env_vars", {})}, folder]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server)
        socket.send_fds(connection, [request], [0, 1, 2])


def serve(listener: socket.socket) -> None:
    """Pass each request on to the process of its job and raylet, until the standard input is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    jobs: dict[tuple[str | None, ...], socket.socket] = {}
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        request, descriptors, *_ = socket.recv_fds(connection, LONGEST, 3)
        connection.close()
        environment = json.loads(request)[1]
        job = tuple(map(environment.get, ("RAY_JOB_ID", "RAY_RAYLET_PID")))
        if job not in jobs:
            import_with(environment, LIBRARIES)
            jobs[job], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork() == 0:
                for other in (listener, *jobs.values()):
                    other.close()
                serve_job(theirs)
            theirs.close()
        socket.send_fds(jobs[job], [request], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
    os._exit(0)  # at once: there is nothing to finalize


def serve_job(requests: socket.socket) -> None:
    """Fork a worker for each request, until no more can come."""
    while (received := socket.recv_fds(requests, LONGEST, 3))[0]:
        request, descriptors, *_ = received
        arguments, environment, folder = json.loads(request)
        import_with(environment, RAY)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            os.chdir(folder)
            for descriptor, place in zip(descriptors, (0, 1, 2), strict=True):
                os.dup2(descriptor, place)
            become_worker(arguments)
        for descriptor in descriptors:
            os.close(descriptor)
    os._exit(0)


def import_with(environment: dict[str, str], modules: tuple[str, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for module in modules:
        with contextlib.suppress(ImportError):  # a Ray that has no such module starts its workers more slowly
            importlib.import_module(module)
    gc.freeze()  # no worker copies the memory of these modules when it looks for garbage


def become_worker(arguments: list[str]) -> None:
    while not arguments[0].endswith("default_worker.py"):
        arguments.pop(0)
    sys.argv = arguments
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [path for path in named if path not in sys.path]
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(sys.argv[2], sys.argv[3:])
