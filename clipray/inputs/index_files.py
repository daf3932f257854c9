"""Checks that the files of an index are those that were built: FAISS itself trusts what it reads."""

from __future__ import annotations

import functools
import os

from clipray import tables
from clipray.storage.folder import Folder, explained
from clipray.storage.seals import file_hash


def hashes(record: tables.Record) -> dict[str, str]:
    """SHA-256 of each file of the index; empty if an earlier version built it."""
    return dict(record.provenance.get("sha256") or {})


def hash_of(folder: Folder, name: str) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with explained(folder.url), folder.fs.open(folder.path(name), "rb") as file:
        return file_hash(file)


def broken_files(folder: Folder, record: tables.Record) -> dict[str, str]:
    """File -> what is wrong with it: `missing`, `size`, or `content`."""
    sizes, broken = folder.sizes(), {}
    for name, size in record.provenance["sizes"].items():
        if name not in sizes:
            broken[name] = "missing"
        elif sizes[name] != size:
            broken[name] = "size"
        elif name in hashes(record) and hash_of(folder, name) != hashes(record)[name]:
            broken[name] = "content"
    return broken


def is_as_built(path: str, sha256: str) -> bool:
    """Whether a local file has this SHA-256. A process reads a file once, until it changes."""
    status = os.stat(path)
    return _hash_once(path, status.st_size, status.st_mtime_ns) == sha256


@functools.cache
def _hash_once(path: str, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return file_hash(file)
