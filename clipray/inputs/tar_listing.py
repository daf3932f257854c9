"""Which tars a path, a glob, braces or a folder names, and the version of each."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clipray.errors import ManifestError
from clipray.inputs.image_listing import is_hidden, utf8_name
from clipray.storage.folder import absolute, as_url, explained, filesystem, listed_version, local_version
from clipray.storage.folder_listing import files_matching, files_under, fixed_part, is_glob

SUFFIX = ".tar"
COMPRESSED = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z",
)  # fmt: skip
LISTED = 4  # tars of a folder, above which a listing of it is sooner had than their sizes one by one
REQUESTS = 16  # at once
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, order=True)
class Tar:
    """A tar as a listing shows it.

    Attributes:
        name: the first part of its samples' ids: its path below the folder of the listing, without `.tar`.
        version: its size and its time of change, or ETag.
    """

    name: str
    url: str
    size: int
    version: str


def is_tars(source: str) -> bool:
    """Whether a path, a glob or braces name tars by their end, also compressed ones."""
    return source.lower().endswith((SUFFIX, *COMPRESSED))


def folder_has_tars(source: str) -> bool:
    """Whether it is a folder that tars are in, also compressed ones, which `list_tars` refuses."""
    fs, path = filesystem(source)
    return _is_folder(fs, path) and bool(_paths(fs, path)[1])


def list_tars(sources: str | Sequence[str]) -> list[Tar]:
    """The tars of a path, a glob, braces (`{00000..00099}.tar`), a folder with its subfolders, or a list of these.

    Raises:
        ManifestError: there are none, one is not there or compressed, or two would give their samples the same ids.
    """
    tars: dict[str, Tar] = {}  # by URL
    for source in [sources] if isinstance(sources, str) else sources:
        tars = {tar.url: tar for tar in _tars_of(absolute(source))} | tars
    urls: dict[str, str] = {}
    for tar in tars.values():
        if urls.setdefault(tar.name, tar.url) != tar.url:
            raise ManifestError(
                f"{urls[tar.name]} and {tar.url} would give their samples the same ids: name a folder or glob that holds both"
            )
    return sorted(tars.values())


def _tars_of(source: str) -> Iterator[Tar]:
    fs, path = filesystem(source)
    fs.invalidate_cache()  # listings of an earlier run in this process
    with explained(source):
        root, paths = _paths(fs, path)
        if not paths:
            raise ManifestError(
                f"{source}: no tars there: expected a .tar, a glob, braces such as {{000..099}}.tar, or a folder"
            )
        if compressed := [path for path in paths if path.lower().endswith(COMPRESSED)]:
            raise ManifestError(
                f"{as_url(compressed[0], source)}: a compressed tar, in which no image can be read alone: expected a plain .tar"
            )
        versions = _versions(fs, paths)
    if missing := [path for path in paths if path not in versions]:
        raise ManifestError(
            f"{as_url(missing[0], source)}: no such tar{f', and {len(missing) - 1} more are not there' if missing[1:] else ''}"
        )
    for path in paths:
        name = utf8_name(path.removeprefix(root.rstrip("/") + "/").removesuffix(SUFFIX))
        url = as_url(path, source) if utf8_name(path) == path else f"file://{quote(os.fsencode(path))}"
        yield Tar(name, url, *versions[path])


def _paths(fs: fsspec.AbstractFileSystem, path: str) -> tuple[str, list[str]]:
    """The folder below which names begin, and the paths of the tars."""
    if _BRACES.search(path) and not fs.exists(path):
        root = fixed_part(path.partition("{")[0] + "*")
        return root, [one for pattern in expand_braces(path) for one in _matching(fs, pattern)]
    if is_glob(fs, path):
        return fixed_part(path), _matching(fs, path)
    if _is_folder(fs, path):
        root = path.rstrip("/") or "/"
        return root, [one for one in files_under(fs, root, is_hidden) if is_tars(one) and not _has_hidden_name(one)]
    return posixpath.dirname(path), [path]


def _matching(fs: fsspec.AbstractFileSystem, pattern: str) -> list[str]:
    """The tars that match a glob, and what is no glob as it is."""
    if not is_glob(fs, pattern):
        return [pattern]
    return [one for one in files_matching(fs, pattern, is_hidden) if is_tars(one) and not _has_hidden_name(one)]


def _has_hidden_name(path: str) -> bool:
    return is_hidden(posixpath.basename(path))


def _is_folder(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Over http to look for a folder would be to read the file."""
    return not path.startswith(("http://", "https://")) and bool(fs.isdir(path))


def expand_braces(pattern: str) -> list[str]:
    """`{08..10}.tar` as 08.tar, 09.tar, 10.tar, and `{a,b}.tar` as a.tar, b.tar. Raises ManifestError: neither of both."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    numbers = _NUMBERS.fullmatch(braces[1])
    if numbers:
        first, last = map(int, numbers.groups())
        width = max(map(len, numbers.groups())) if any(n[0] == "0" for n in numbers.groups()) else 0
        names = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        names = braces[1].split(",")
    if len(names) < 2 and not numbers:
        raise ManifestError(f"{pattern}: expected braces such as {{00000..00099}} or {{train,test}}, found {braces[0]}")
    before, behind = pattern[: braces.start()], pattern[braces.end() :]
    return [one for name in names for one in expand_braces(f"{before}{name}{behind}")]


def _versions(fs: fsspec.AbstractFileSystem, paths: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Path -> size and version, of those that are there."""
    if isinstance(fs, LocalFileSystem):
        return {path: _local(path) for path in paths if os.path.exists(path)}
    folders = defaultdict(list)
    for path in paths:
        folders[path.rpartition("/")[0]].append(path)
    infos: dict[str, Mapping[str, Any] | None] = {}
    for folder, members in folders.items():
        if len(members) > LISTED and not folder.startswith(("http://", "https://")):
            listed = {posixpath.basename(info["name"]): info for info in fs.ls(folder, detail=True)}
            infos |= {path: listed.get(posixpath.basename(path)) for path in members}
        else:
            with ThreadPoolExecutor(REQUESTS) as pool:
                infos |= zip(members, pool.map(lambda path: _info(fs, path), members), strict=True)
    return {path: _remote(path, info) for path, info in infos.items() if info}


def _remote(path: str, info: Mapping[str, Any]) -> tuple[int, str]:
    size = info.get("size")
    if size is None:
        raise ManifestError(f"{path}: its server does not say how large it is, and so cannot send parts of it")
    return int(size), listed_version(info) or str(size)


def _local(path: str) -> tuple[int, str]:
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise ManifestError(f"{path}: not a regular file; expected a tar")
    return os.path.getsize(path), local_version(path)


def _info(fs: fsspec.AbstractFileSystem, path: str) -> Mapping[str, Any] | None:
    try:
        return fs.info(path)
    except FileNotFoundError:
        return None
