"""The row index of tars: plain Parquet with a row for each image, made of the tars' headers, and kept beside the tables.

A file of it holds the rows of some tars. It is valid as long as these are what a listing shows: a tar that changed is
indexed again, together with the others in its file. New tars get new files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from clipray.errors import ManifestError
from clipray.inputs.parquet_files import read_footer
from clipray.inputs.tar_listing import Tar
from clipray.inputs.tar_samples import SampleRows, Wanted, read_samples
from clipray.storage.folder import Folder
from clipray.storage.parquet import write_parquet
from clipray.storage.uris import is_local

FOLDER = "_tars"  # of a run: no table can have that name
NOTE = b"clipray"  # in the metadata of a file: what it was made from
TARS, TARS_BYTES = 32, 8 * 2**30  # in a file of the index, at most
READERS = 8  # of tars on a server at once, and of footers


@dataclass(frozen=True)
class Group:
    """Tars whose rows go into one file of the index in `folder`."""

    tars: tuple[Tar, ...]
    wanted: Wanted
    folder: Folder


@dataclass(frozen=True)
class IndexFile:
    """A file of the index.

    Attributes:
        members: extension -> how many members of the tars have it.
    """

    url: str
    tars: tuple[Tar, ...]
    wanted: Wanted
    rows: int
    members: Counter[str] = field(default_factory=Counter)


def index_tars(
    tars: Sequence[Tar],
    wanted: Wanted,
    folder: Folder,
    index: Callable[[Sequence[Group]], Iterable[IndexFile]],
    *,
    tidy: bool,
) -> list[str]:
    """The URLs of the index's files, which hold the images of these tars, once each.

    Args:
        index: makes the files of groups, as `index_group` does; called only where some are missing.
        tidy: remove files that hold an earlier version of one of these tars.

    Raises:
        ManifestError: a tar cannot be read, there are no images, or no members for one of the columns.
    """
    before = _files(folder)
    files = _valid(before, tars, wanted)
    covered = {tar for file in files for tar in file.tars}
    groups = list(_groups([tar for tar in tars if tar not in covered], wanted, folder))
    if groups:
        files += index(groups)
    members = sum((file.members for file in files), Counter())
    listed = ", ".join(f".{name}" for name, _ in members.most_common(8)) or "no files at all"
    if not sum(file.rows for file in files):
        raise ManifestError(f"{tars[0].url}: no images in {_counted(tars)}, found: {listed}")
    for name in wanted.columns:
        if name not in members:
            raise ManifestError(f"{tars[0].url}: no member .{name} in {_counted(tars)}, found: {listed}")
    if tidy:
        _remove_outdated(before, tars, folder)
    return [file.url for file in sorted(files, key=lambda file: file.tars[0])]


def index_group(group: Group) -> IndexFile:
    """Read the headers of a group's tars, and write a file of the index. Raises as `read_samples`."""
    with ThreadPoolExecutor(1 if is_local(group.tars[0].url) else READERS) as pool:
        parts: list[SampleRows] = list(pool.map(lambda tar: read_samples(tar, group.wanted), group.tars))
    table = pa.concat_tables(part.table for part in parts)
    members = sum((part.members for part in parts), Counter[str]())
    note = {"tars": [asdict(tar) for tar in group.tars], "wanted": asdict(group.wanted), "members": members}
    text = json.dumps(note, sort_keys=True)
    url = f"{group.folder.url}/{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"
    write_parquet(table.replace_schema_metadata({NOTE: text}), url)
    return IndexFile(url, group.tars, group.wanted, len(table), members)


def _remove_outdated(files: Iterable[IndexFile], tars: Iterable[Tar], folder: Folder) -> None:
    now = {tar.url: tar.version for tar in tars}
    for file in files:
        if any(now.get(tar.url, tar.version) != tar.version for tar in file.tars):
            folder.remove(file.url.rpartition("/")[2])


def _files(folder: Folder) -> list[IndexFile]:
    """All files of the index that can be read, the largest first."""
    names = [name for name in folder.sizes() if name.endswith(".parquet")]
    with ThreadPoolExecutor(READERS) as pool:
        files = list(pool.map(_read_note, [f"{folder.url}/{name}" for name in names]))
    return sorted(filter(None, files), key=lambda file: (-len(file.tars), file.url))


def _read_note(url: str) -> IndexFile | None:
    try:
        file = read_footer(url)
        note = json.loads((file.schema.metadata or {})[NOTE])
        wanted = Wanted(note["wanted"]["image"], tuple(note["wanted"]["columns"]))
        return IndexFile(url, tuple(Tar(**tar) for tar in note["tars"]), wanted, file.rows, Counter(note["members"]))
    except (ManifestError, KeyError, TypeError, ValueError):  # of something else, or damaged
        return None


def _valid(files: Iterable[IndexFile], tars: Iterable[Tar], wanted: Wanted) -> list[IndexFile]:
    """Those that hold only tars that are listed now, each tar once."""
    left, valid = set(tars), list[IndexFile]()
    for file in files:
        if file.wanted == wanted and left.issuperset(file.tars):
            valid.append(file)
            left.difference_update(file.tars)
    return valid


def _groups(tars: Sequence[Tar], wanted: Wanted, folder: Folder) -> Iterator[Group]:
    """Neighbouring tars together; few enough that many tasks work on them."""
    most = max(1, min(TARS, len(tars) // READERS))
    group: list[Tar] = []
    for tar in tars:
        if group and (len(group) >= most or sum(one.size for one in group) + tar.size > TARS_BYTES):
            yield Group(tuple(group), wanted, folder)
            group = []
        group.append(tar)
    if group:
        yield Group(tuple(group), wanted, folder)


def _counted(tars: Sequence[Tar]) -> str:
    return "this tar" if len(tars) == 1 else f"these {len(tars)} tars"
