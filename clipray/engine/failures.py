"""Errors that come through Ray, unwrapped: the error that a task raised, or one line about the workers."""

from __future__ import annotations

import ray

from clipray.analysis.errors import DataError
from clipray.errors import RunError
from clipray.storage.environment import environment_error

DEFECTS = (LookupError, TypeError, AttributeError, AssertionError, NameError)
GOES_ON = "everything written is kept, and `clipray run` goes on from there"


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
        return f"workers failed: {_last_line(error)}"
    return f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())[-600:]}"


def _last_line(error: BaseException) -> str:
    """Where an actor's constructor raised, the text is a traceback: its last line says what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith(("Traceback", "File ")) for line in lines):
        lines = lines[-1:]
    return " ".join(lines)[:600] or type(error).__name__
