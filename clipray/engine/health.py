"""What a run says when Ray or its machine fails it: errors that came through Ray, and checks that Ray still works.

While no result arrives Ray itself would wait forever.
"""

from __future__ import annotations

import functools
import socket
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipray.analysis.errors import DataError
from clipray.engine.connect import abandon, answers, full_places
from clipray.errors import RunError, last_line
from clipray.storage.environment import environment_error

LOOK_S = 2.0  # between two looks
GONE_S = 30.0  # in which the cluster's head may come back; Ray itself ends this process after 60
IDLE_S = 60.0  # without a result, until workers are tried
PROBE_S = 180.0  # in which a worker of this machine starts, however busy it is
DEFECTS = (LookupError, TypeError, AttributeError, AssertionError, NameError)
GOES_ON = "everything written is kept, and `clipray run` goes on from there"
STARTS = 8  # of workers in a row, none of which came to its first row, beside one for each that is wanted


class Health:
    """Of the Ray that this process joined; `look` often while waiting, `progressed` when something came."""

    def __init__(self) -> None:
        self._looked = self._answered = self._progressed = time.monotonic()
        self._probe: Any = None

    def progressed(self) -> None:
        self._progressed, self._probe = time.monotonic(), None

    def look(self) -> None:
        """Raises RunError: Ray is gone, or starts no worker."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._look_at_ray()
        self._looked = time.monotonic()
        if self._looked - self._progressed > IDLE_S:
            self._look_at_workers()

    def _look_at_ray(self) -> None:
        if answers():
            self._answered = time.monotonic()
            if not _raylet_answers():
                _lost("Ray's process on this machine (the raylet) died: out of memory, or killed")
        elif time.monotonic() - self._answered > GONE_S:
            _lost("the head of the Ray cluster (GCS) does not answer any more: out of memory, or killed")

    def _look_at_workers(self) -> None:
        """Whether a worker starts at all: one that is at work, however long, says nothing."""
        if self._probe is None:
            here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_nothing)
            self._probe = (time.monotonic(), task.remote())
        began, ref = self._probe
        ready, _ = ray.wait([ref], timeout=0)
        if ready:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                raise RunError(f"workers of Ray die as they start{_likely()}") from error
            self.progressed()
        elif time.monotonic() - began > PROBE_S:
            raise RunError(f"no worker of Ray starts on this machine, in {PROBE_S:.0f} s{_likely()}")


def answers_of(refs: list[Any]) -> list[Any]:
    """Results of tasks and actors. Raises ClipRayError: what they raised; or RunError: workers or Ray itself died."""
    try:
        return waited(refs)
    except ray.exceptions.RayError as error:
        raise unwrapped(error) from error


def waited(refs: list[Any]) -> list[Any]:
    """As `ray.get`, which alone would wait without end for a Ray that died. Raises also RunError."""
    health = Health()
    while True:
        try:
            return list(ray.get(refs, timeout=LOOK_S))
        except ray.exceptions.GetTimeoutError:
            health.look()


def refuse_dying(starts: int, workers: int) -> None:
    """Raises RunError where workers have begun this often, and none has come to its first row."""
    if starts >= STARTS + workers:
        raise RunError(f"workers die as they start: {starts} in a row{_likely()}")


def _raylet_answers() -> bool:
    """Whether this machine's part of Ray is there. Ray itself notices ten seconds later, and may then end this process
    without a word."""
    try:
        with socket.create_connection(_raylet(ray.get_runtime_context().get_node_id()), LOOK_S):
            return True
    except ConnectionRefusedError:
        return False
    except OSError:  # too busy to answer
        return True


@functools.lru_cache(maxsize=1)
def _raylet(node_id: str) -> tuple[str, int]:
    """Where the node's raylet listens."""
    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _lost(what: str) -> None:
    abandon()
    raise RunError(f"{what}; {GOES_ON}")


def _likely() -> str:
    places = full_places()
    cause = f"{' and '.join(places)} is full" if places else "too little memory, or a package that cannot be imported"
    return f"; the likely cause: {cause} (Ray's log files say more); {GOES_ON}"


def _nothing() -> None: ...


def unwrapped(error: BaseException) -> Exception:
    """What to raise for an error that came through Ray.

    An error of ours as it was raised; what a machine did to a worker as one of ours; what numerics say of the data, and a
    defect in a worker, as it is; else a RunError.
    """
    cause = _cause(error)
    known = environment_error(cause) if not isinstance(cause, ray.exceptions.RayError) else None
    if known is not None:
        return known
    if isinstance(cause, (DataError, *DEFECTS)):
        return cause
    return RunError(f"{_told(cause)}; {GOES_ON}")


def _cause(error: BaseException) -> BaseException:
    """The innermost error: those of tasks are wrapped, those of Ray Data more than once."""
    while isinstance(inner := getattr(error, "cause", None), BaseException) and inner is not error:
        error = inner
    return error


def _told(error: BaseException) -> str:
    from ray.data.exceptions import ExecutionTimeoutError  # all of Ray Data, a quarter of a second in each process

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "a machine ran out of memory and Ray ended a worker: take fewer actors, a smaller batch, or more memory"
    if isinstance(error, ray.exceptions.OutOfDiskError):
        return "the disk of Ray's temporary folder is full: free some space, or set RAY_TMPDIR to a folder with more"
    if isinstance(error, (ray.exceptions.LocalRayletDiedError, ray.exceptions.NodeDiedError)):
        return "a node of the Ray cluster died"
    if isinstance(error, ExecutionTimeoutError):
        return "no row came through in half an hour: workers hang, or wait for nodes that never come"
    if isinstance(error, ray.exceptions.RayError):
        return f"workers failed: {last_line(error)}"
    return f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())[-600:]}"
