"""Folders on any fsspec URL: reads of whole files, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clipray.errors import ClipRayError, JobError, RunError, StorageError, one_line
from clipray.storage.uris import is_chain, is_local, parse

TEMPORARY = ".tmp-"
FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # a write that may succeed later; others are of the wrong place
LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure")  # whose errors are those of storage
MARKS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified", "updated")
"""What filesystems call an ETag or the time of the last change; the most reliable first."""
ATTEMPTS = 8  # at a request that S3 throttles or fails; waits double
CONNECTIONS = 32  # to S3 at once, as many as threads may read


def absolute(url: str) -> str:
    """`url` with a local path made absolute (relative to the working directory), `~` expanded, a scheme in small letters.

    A file URI becomes its path. Raises JobError: the URL is empty, as when a shell variable is not set.
    """
    if not url.strip():
        raise JobError(f"expected a path or a URL, found {url!r}; is a variable not set?")
    scheme, path = parse(url)
    if is_local(url):
        return os.path.abspath(os.path.expanduser(path))
    return url if is_chain(url) else f"{scheme}://{path}"


def as_url(path: str, source: str) -> str:
    """A path of the filesystem of `source` as a path or URL by itself."""
    return path if is_local(source) or "://" in path else f"{absolute(source).partition('://')[0]}://{path}"


def split(url: str) -> tuple[str, str]:
    """(folder, name) of a file's path or URL; `/` is the folder of a file in the root, `.` that of a bare name."""
    folder, slash, name = url.rpartition("/")
    return folder or slash or ".", name


def filesystem(url: str, attempts: int = ATTEMPTS) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `url` and the path in it; an unknown or uninstalled scheme is a JobError, and so are credentials
    in the URL, since URLs are logged. attempts: at each request, where its library leaves that to us."""
    if is_local(url):
        return fsspec.filesystem("file"), absolute(url)  # never read as a chain: `::` may be part of a name
    host = url.partition("://")[2].partition("/")[0]
    if "@" in host:
        kept = url.replace(host, f"…@{host.rpartition('@')[2]}", 1)
        raise JobError(f"{kept}: credentials do not belong in a URL; set them in the environment (AWS_PROFILE, …)")
    try:
        if is_chain(url):
            return fsspec.core.url_to_fs(url)
        outer, colons, rest = absolute(url).partition("::")
        fs, path = fsspec.core.url_to_fs(outer, **storage_options(url, attempts))
        return fs, path + colons + rest
    except (ImportError, ValueError) as error:
        raise JobError(f"{url}: this storage cannot be opened: {error}") from error


def refuse_irregular(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Raises OSError for a pipe, a device or a folder: opening a pipe would wait forever."""
    if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")


def file_versions(urls: Sequence[str]) -> list[tuple[str, int | None, str]]:
    """URL, size, and ETag or time of change of each file, as far as the storage has them."""
    versions = []
    for url in urls:
        fs, path = filesystem(url)
        info = fs.info(path)
        changed = (str(info[key]) for key in ("ETag", "mtime", "LastModified", "updated") if info.get(key))
        versions.append((url, info.get("size"), next(changed, "")))
    return versions


def versions_by_url(urls: Sequence[str]) -> dict[str, str]:
    """URL -> size and time of change or ETag of the file, as text; empty if only the size is known."""
    versions = {}
    for url in urls:
        fs, path = filesystem(url)
        with explained(url):
            versions[url] = local_version(path) if is_local(url) else listed_version(fs.info(path))
    return versions


def local_version(path: str) -> str:
    """Version of a local file; links are followed. Raises OSError; ValueError: no file can have that name."""
    info = os.stat(path)
    return f"{info.st_size} {info.st_mtime_ns}"


def listed_version(info: Mapping[str, Any]) -> str:
    """Version of a remote file, from its filesystem's info."""
    mark = next((info[key] for key in MARKS if info.get(key)), None)
    return "" if mark is None else f"{info.get('size')} {mark}"


def storage_options(url: str, attempts: int = ATTEMPTS) -> dict[str, Any]:
    """How often requests are repeated. The filesystems of Google and Azure repeat them by themselves.

    Botocore's mode `standard` has all threads of a process share 500 tokens, a bad minute's worth; `legacy` has no such
    quota, and repeats the same failures.
    """
    if parse(url)[0] not in ("s3", "s3a"):
        return {}
    settings: dict[str, Any] = {"max_pool_connections": CONNECTIONS}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        settings["retries"] = {"mode": "legacy", "total_max_attempts": attempts}
    return {"config_kwargs": settings}


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn errors of remote storage into one line. FileNotFoundError stays."""
    try:
        yield
    except (FileNotFoundError, ClipRayError):
        raise
    except Exception as error:
        ours = isinstance(error, OSError) or type(error).__module__.split(".")[0] in LIBRARIES
        of_arrow = type(error) is OSError and error.errno is None  # of a file that is there and not whole
        if is_local(url) or of_arrow or not ours:
            raise
        raise StorageError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if "Credentials" in name:
        return "no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
    return f"access denied: {one_line(error)}" if isinstance(error, PermissionError) else f"{name}: {one_line(error)}"


@dataclass(frozen=True)
class Folder:
    """A folder on any fsspec filesystem. Cheap to make, picklable, creates nothing until something is written."""

    url: str

    @cached_property
    def _where(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, path = filesystem(self.url)
        return fs, path.rstrip("/") or path[:1]

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._where[0]

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self._where[1].rstrip('/')}/{name}" if name else self._where[1]

    def sub(self, name: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{name}")

    def named(self, table: str) -> Folder:
        """A table of this run, `clusters`, or of another one, `runs/other/clusters`."""
        return Folder(absolute(table)) if "/" in table else self.sub(table)

    def _entries(self) -> list[dict[str, Any]]:
        """What is directly in the folder, as it is now."""
        try:
            with explained(self.url):
                return self.fs.ls(self.path(""), detail=True, refresh=True)
        except FileNotFoundError:
            return []

    def sizes(self) -> dict[str, int]:
        """Files directly in the folder: name -> size in bytes. Empty when the folder does not exist."""
        entries = self._entries()
        return {os.path.basename(e["name"]): int(e["size"] or 0) for e in entries if e["type"] == "file"}

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        entries = self._entries()
        return sorted(os.path.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory")

    def read(self, name: str) -> bytes | None:
        """The file's bytes, or None when it does not exist."""
        try:
            with explained(self.url):
                return self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file atomically, also if the process is killed in between."""
        if not self.local:
            try:
                with explained(self.url):
                    self.fs.pipe_file(self.path(name), data)  # one PUT: object stores publish it whole
            except FileNotFoundError as error:
                raise StorageError(f"{self.url}: no such bucket: make it first") from error
            return
        aside = self.path(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            os.makedirs(self.path(""), exist_ok=True)
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path(name))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(aside)  # frees space on a full disk
            error_class = RunError if error.errno in FAILING else StorageError
            raise error_class(f"{self.path(name)} could not be written: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError), explained(self.url):
            self.fs.rm_file(self.path(name))

    def leftovers(self) -> Iterator[str]:
        """Names of files that a killed writer left aside."""
        return (name for name in self.sizes() if name.startswith(TEMPORARY))
