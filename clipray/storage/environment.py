"""Errors of the machine in one line: full disks, missing rights, no memory, failing storage."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from clipray.errors import ClipRayError, RunError, StorageError, one_line
from clipray.storage.folder import LIBRARIES

KEPT = "what is written is kept, and the same command goes on from there"
HELP = {
    errno.ENOSPC: f"free some space and run again; {KEPT}",
    errno.EDQUOT: f"free some space or raise the quota and run again; {KEPT}",
    errno.EIO: f"the disk or the network behind it fails; {KEPT}",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
    errno.ENFILE: "this machine has too many files open",
    errno.EACCES: "expected the right to read or write there",
    errno.EPERM: "expected the right to read or write there",
    errno.EROFS: "expected a place that can be written",
    errno.ENOTDIR: "expected a folder where a file is",
    errno.EEXIST: "expected a folder, or nothing yet",
    errno.EISDIR: "expected a file where a folder is",
    errno.ENAMETOOLONG: "expected a shorter path",
}
OF_THE_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ELOOP,
    errno.EEXIST,
)  # fmt: skip


def environment_error(error: BaseException) -> ClipRayError | None:
    """The error as a `ClipRayError` if the machine or the storage caused it; None if the program may have."""
    if isinstance(error, ClipRayError):
        return error
    if isinstance(error, MemoryError):
        return RunError(f"out of memory: {one_line(error, 600) or 'this machine has no more'}; {KEPT}")
    if isinstance(error, OSError):
        return _of_the_system(error)
    if type(error).__module__.split(".")[0] in LIBRARIES:
        return StorageError(f"{type(error).__name__}: {one_line(error, 600)}")
    return None


def _of_the_system(error: OSError) -> ClipRayError:
    number = error.errno
    path = error.filename.decode(errors="backslashreplace") if isinstance(error.filename, bytes) else error.filename
    where = "" if path is None else f"{path}: "
    what = (error.strerror if number else None) or one_line(error, 600) or type(error).__name__
    advice = f"; {HELP[number]}" if number in HELP else ""
    theirs = number in OF_THE_PATH or isinstance(error, FileNotFoundError)
    return (StorageError if theirs else RunError)(f"{where}{what}{advice}")


@contextlib.contextmanager
def environment_errors() -> Iterator[None]:
    """Raises errors of the machine or the storage as `ClipRayError`. Also a decorator."""
    try:
        yield
    except (ClipRayError, BrokenPipeError):  # a closed pipe is no error of the work
        raise
    except Exception as error:
        known = environment_error(error)
        if known is None:
            raise
        raise known from error


def need_room(folder: str, what: str, room_bytes: int) -> None:
    """Raises RunError: the disk of `folder`, which need not exist yet, has less free space."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if free < room_bytes:
        raise RunError(
            f"{what} {folder}: {free // 2**20} MiB free, expected at least {room_bytes // 2**20}; free some space"
        )
