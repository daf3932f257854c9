"""The images of a folder or glob: which files are images, and which are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import fsspec

from clipray.errors import ManifestError
from clipray.storage.folder import explained, filesystem
from clipray.storage.folder_listing import files_matching, files_under, fixed_part, is_glob

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm",
    ".heic", ".heif", ".hif",
)  # fmt: skip
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")
"""Folders that file managers and NAS devices put next to images: thumbnails, metadata, deleted files."""
NAMED = 5  # suffixes that a message names


@dataclass(frozen=True)
class ImageListing:
    """What lies under a folder or glob.

    Attributes:
        root: the folder, or the fixed part of the glob. paths: of the images, sorted, as paths of the filesystem.
        others: the other files, sorted. Hidden ones are not among them.
    """

    root: str
    paths: tuple[str, ...]
    others: tuple[str, ...]


def left_out_sentence(paths: Iterable[str]) -> str:
    """A sentence such as `3 files left out: 2 .raw, 1 .txt`; "" if there are none."""
    left_out = Counter(os.path.splitext(path)[1].lower() for path in paths)
    count = left_out.total()
    if not count:
        return ""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{number} {suffix or 'without a suffix'}" for suffix, number in most[:NAMED])
    others = count - sum(number for _, number in most[:NAMED])
    return f"{count} file{'s' if count > 1 else ''} left out: {named}{f', {others} others' if others else ''}"


def list_images(source: str) -> ImageListing:
    """The images under a folder or glob, local or on any fsspec URL.

    Hidden files and folders and system folders are skipped, unless a glob names a hidden one.

    Raises:
        ManifestError: there are none.
    """
    fs, path = filesystem(source)
    with explained(source):
        root, files = _files_of(fs, path)
    images = [p for p in files if p.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise ManifestError(
            f"{source}: no images there: expected a folder or glob of files named {', '.join(IMAGE_SUFFIXES[:6])} …"
        )
    return ImageListing(root, tuple(images), tuple(sorted(set(files).difference(images))))


def _files_of(fs: fsspec.AbstractFileSystem, path: str) -> tuple[str, list[str]]:
    """(root, sorted paths of the files under it); no files if the path is not a folder."""
    if not is_glob(fs, path):
        root = path.rstrip("/") or "/"
        files = files_under(fs, root, is_hidden) if fs.isdir(path) else []
        return root, _shown(files, root)
    root = fixed_part(path)
    asks_for_hidden = any(part.startswith(".") for part in path.removeprefix(root).split("/"))
    matches = files_matching(fs, path, (lambda _: False) if asks_for_hidden else is_hidden)
    return root, matches if asks_for_hidden else _shown(matches, root)


def _shown(paths: Iterable[str], root: str) -> list[str]:
    return sorted(p for p in paths if not any(map(is_hidden, p.removeprefix(root).strip("/").split("/"))))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def utf8_name(name: str) -> str:
    r"""A file's name in UTF-8: bytes that are not are shown as `\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
