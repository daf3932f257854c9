"""The files under a folder, the same on any storage. Some folders are skipped, and links to folders are followed once."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Callable, Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from clipray.errors import JobError, StorageError


def is_glob(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether `path` is a pattern; what exists under such a name is that file or folder itself.

    Raises:
        JobError: `**` is only a part of a name in it, which means nothing.
    """
    if not any(c in path for c in "*?[") or fs.exists(path):
        return False
    if any("**" in part and part != "**" for part in path.split("/")):
        raise JobError(
            f"{path}: `**` stands for any folders, and so for a whole name: expected `**/*.jpg` rather than `**.jpg`"
        )
    return True


def files_under(fs: fsspec.AbstractFileSystem, root: str, left_out: Callable[[str], bool]) -> list[str]:
    """Sorted paths of all files under `root`.

    Args:
        left_out: whether a folder of this name is not looked into; `root` itself always is.

    Raises:
        StorageError: a local folder cannot be listed.
    """
    root = root.rstrip("/") or "/"
    if isinstance(fs, LocalFileSystem):
        return sorted(_local_files(root, left_out))
    return [path for path in fs.find(root) if not any(map(left_out, folders_below(path, root)))]


def files_matching(fs: fsspec.AbstractFileSystem, pattern: str, left_out: Callable[[str], bool]) -> list[str]:
    """Sorted paths of all files that match a glob; `**` descends as `files_under` does."""
    if not isinstance(fs, LocalFileSystem):
        return sorted(path for path, info in fs.glob(pattern, detail=True).items() if info["type"] != "directory")
    if "**" not in pattern:
        return sorted(path for path in glob.glob(pattern, include_hidden=True) if not os.path.isdir(path))
    matches = re.compile(glob_translate(pattern)).match
    return [path for path in files_under(fs, fixed_part(pattern), left_out) if matches(path)]


def fixed_part(pattern: str) -> str:
    """The folder above all that a glob can match."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] or "/"


def folders_below(path: str, root: str) -> list[str]:
    """Names of the folders between `root` and the file at `path`."""
    return path.removeprefix(root).strip("/").split("/")[:-1]


def _local_files(root: str, left_out: Callable[[str], bool]) -> Iterator[str]:
    """Links come last, so that a file keeps its direct path if it has one, and loops end."""
    waiting, seen = deque([root]), set[str]()
    while waiting:
        for folder, folders, files in os.walk(waiting.popleft(), onerror=_refuse):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not left_out(name))
            paths = (os.path.join(folder, name) for name in folders)
            waiting.extend(path for path in paths if os.path.islink(path))
            yield from (os.path.join(folder, name) for name in files)


def _refuse(error: OSError) -> None:
    raise StorageError(f"{error.filename}: this folder cannot be listed: {error.strerror}") from error
