"""What of a manifest is on disk already: the books that make a run resumable.

The files themselves are the books. Taking stock reads the ids of every committed shard, removes what a kill left
torn, and rewrites shards that hold a row twice, a row that the manifest no longer has, or one whose source (`uri`,
`text`), content or kept columns have changed, so that afterwards every row on disk is a row of the manifest, once.

Regions lie in shards of the same name as those of their pictures. A picture counts as written only with all its
regions, and regions without their picture are removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.errors import DamagedError, SchemaError, StaleTableError
from clipray.inputs.content_versions import CONTENT_HASH, same_content
from clipray.inputs.row_index import RowIndex, places, row_keys
from clipray.storage.folder import Folder
from clipray.tables import (
    Shard,
    named_as_ours,
    noted_as_damaged,
    provenance_of,
    read_shard,
    shard_footer,
    shard_names,
    verify_shards,
    write_shard,
)
from clipray.tables.reasons import is_passing

REFUSED = "refused.parquet"  # the manifest's own rejects, written before work starts


@dataclass(frozen=True)
class RegionFolders:
    """The regions table of a step, and the boxes that were refused."""

    table: Folder
    rejects: Folder


@dataclass
class CommittedRows:
    """What is on disk.

    Attributes:
        taken: (n,) bool, for each accepted row of the scan: written or rejected.
        files, reject_files: the shards, all whole.
        region_files, refused_box_files: likewise. Empty where the step writes no regions.
        rejects: count by reason, the manifest's own included.
        repaired: what taking stock had to mend: files torn or damaged, rows doubled, gone, changed.
        verified: shards by path, every byte of which was verified or written in this run.
    """

    taken: np.ndarray
    files: list[Shard] = field(default_factory=list)
    reject_files: list[Shard] = field(default_factory=list)
    region_files: list[Shard] = field(default_factory=list)
    refused_box_files: list[Shard] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    verified: dict[str, Shard] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.files)

    @property
    def rejected(self) -> int:
        return sum(self.rejects.values())


def regions_of_another(regions: RegionFolders, fingerprint: str, name: str) -> str | None:
    """Path of a shard that is not of the pictures of the table `name`, made with these settings; None if all are."""
    for folder in (regions.table, regions.rejects):
        for shard in shard_names(folder):
            with contextlib.suppress(SchemaError, FileNotFoundError):  # torn, as a kill may leave it
                metadata = shard_footer(folder, shard)[2]
                if (metadata.get("fingerprint"), metadata.get("name", name)) != (fingerprint, name):
                    return folder.path(shard)
    return None


def check_committed(
    table: Folder,
    rejects: Folder,
    scan: RowIndex,
    keep: Sequence[str],
    fingerprint: str,
    *,
    regions: RegionFolders | None = None,
    repair: bool = True,
    verified: dict[str, Shard] | None = None,
) -> CommittedRows:
    """Count what is written and rejected; with `repair`, verify the shards, remove and rewrite what does not belong.

    Args:
        verified: shards by path that need not be verified again; those that are verified here are added.

    Raises:
        StaleTableError: the folder holds Parquet that was made with other settings, or by somebody else.
    """
    stock = CommittedRows(np.zeros(len(scan.keys), bool), verified={} if verified is None else verified)
    if repair:
        _drop_broken(table, rejects, regions, stock)
    for folder, is_table in ((table, True), (rejects, False)):
        for name in sorted(folder.leftovers()) if repair else ():
            folder.remove(name)
        sizes, damaged = folder.sizes(), noted_as_damaged(folder) or ()
        for name in shard_names(folder):
            if name in damaged:  # a run removes it first
                continue
            shard = _count_shard(
                folder,
                name,
                sizes[name],
                is_table,
                scan,
                keep,
                fingerprint,
                stock,
                regions if is_table else None,
                repair,
            )
            if shard is not None:
                (stock.files if is_table else stock.reject_files).append(shard)
    if regions is not None and repair:
        _match_regions(table, regions, stock)
    return stock


def _drop_broken(table: Folder, rejects: Folder, regions: RegionFolders | None, stock: CommittedRows) -> None:
    """Remove shards that are not what was written. Pictures whose refused boxes are lost are made again with them."""
    beside = (regions.table, regions.rejects) if regions else ()
    for folder in (table, rejects, *beside):
        sizes, known = folder.sizes(), stock.verified
        names = [name for name in shard_names(folder) if _bytes_of(known.get(folder.path(name))) != sizes[name]]
        whole, broken = verify_shards(folder, names)
        _refuse_foreign(folder, broken)
        known.update({folder.path(name): shard for name, shard in whole.items()})
        for name, error in broken.items():
            _note(stock, "damaged_files" if isinstance(error, DamagedError) else "torn_files", 1)
            folder.remove(name)
            if regions is not None and folder == regions.rejects:
                table.remove(name)


def _refuse_foreign(folder: Folder, broken: Iterable[str]) -> None:
    """Raises StaleTableError where a broken shard is not named as ours are: it is somebody else's."""
    for name in broken:
        if not named_as_ours(name):
            raise StaleTableError(
                f"{folder.path(name)} is no file of this table that clipray wrote, nor whole Parquet; move it away"
            )


def _bytes_of(shard: Shard | None) -> int | None:
    return None if shard is None else shard.bytes


def take_back(rejects: Folder, fingerprint: str, verified: dict[str, Shard]) -> int:
    """Remove the rows whose reason may pass from a table's rejects, so that they are to be done again.

    A kill in between leaves some of them rejected, the others to do, and none lost. verified: as of `check_committed`, kept
    true. Returns how many there were.
    """
    count = 0
    for name in shard_names(rejects):
        with contextlib.suppress(SchemaError, FileNotFoundError):  # torn: taking stock removes it
            metadata = shard_footer(rejects, name)[2]
            reasons = read_shard(rejects, name, ["reason"])["reason"].to_pylist()
            lasting = np.array([not is_passing(reason) for reason in reasons], bool)
            if metadata.get("fingerprint") == fingerprint and not lasting.all():
                _rewrite(rejects, name, lasting, verified)
                count += int((~lasting).sum())
    return count


def _count_shard(
    folder: Folder,
    name: str,
    size: int,
    is_table: bool,
    scan: RowIndex,
    keep: Sequence[str],
    fingerprint: str,
    stock: CommittedRows,
    regions: RegionFolders | None,
    repair: bool,
) -> Shard | None:
    try:
        rows, _, metadata = shard_footer(folder, name)
        if metadata.get("fingerprint") != fingerprint:
            raise StaleTableError(
                f"{folder.path(name)} was not made by this job with these settings; move it away, or give the job another `output`"
            )
        counted = ["region_count"] if regions else []
        hashed = [CONTENT_HASH] if scan.contents else []
        ids = read_shard(folder, name, [*scan.kind.named, *hashed, *counted, *(keep if is_table else ())])
    except (SchemaError, FileNotFoundError):
        _note(stock, "torn_files", 1)
        if repair:
            folder.remove(name)
        return None
    reasons = None if is_table else read_shard(folder, name, ["reason"])["reason"]
    whole = _with_regions(ids, regions.table, name, stock) if regions else np.ones(rows, bool)
    good = np.ones(rows, bool) if name == REFUSED else _belongs(ids, is_table, scan, keep, stock, whole)
    if reasons is not None:
        for item in pc.value_counts(reasons.filter(pa.array(good))).to_pylist():
            stock.rejects[item["values"]] = stock.rejects.get(item["values"], 0) + item["counts"]
    if not repair:
        return Shard(name, int(good.sum()), size)
    return _kept(folder, name, good, stock)


def _with_regions(ids: pa.Table, regions: Folder, name: str, stock: CommittedRows) -> np.ndarray:
    """(rows,) bool: pictures of a shard whose regions are all there."""
    try:
        found = read_shard(regions, name, ["image_id"])["image_id"]
    except (SchemaError, FileNotFoundError):
        found = pa.chunked_array([[]], pa.string())
    counts = pc.value_counts(found)
    at = pc.index_in(ids["image_id"], value_set=counts.field("values").cast(pa.string()))
    there = pc.fill_null(counts.field("counts").take(at), 0).to_numpy()
    whole: np.ndarray = there == ids["region_count"].to_numpy()
    _note(stock, "rows_without_their_regions", int((~whole).sum()))
    return whole


def _match_regions(table: Folder, regions: RegionFolders, stock: CommittedRows) -> None:
    """Remove regions whose picture is not in the shard of the same name."""
    pictures = {shard.name for shard in stock.files}
    for folder, files in ((regions.table, stock.region_files), (regions.rejects, stock.refused_box_files)):
        for name in folder.leftovers():
            folder.remove(name)
        for name in shard_names(folder):
            shard = _match_shard(table, folder, name, stock) if name in pictures else None
            if shard is None:
                _note(stock, "region_files_removed", 1)
                folder.remove(name)
            else:
                files.append(shard)


def _match_shard(table: Folder, folder: Folder, name: str, stock: CommittedRows) -> Shard | None:
    ids = read_shard(folder, name, ["image_id"])["image_id"]
    good = pc.is_in(ids, value_set=read_shard(table, name, ["image_id"])["image_id"].combine_chunks()).to_numpy()
    return _kept(folder, name, good, stock)


def _belongs(
    ids: pa.Table, is_table: bool, scan: RowIndex, keep: Sequence[str], stock: CommittedRows, whole: np.ndarray
) -> np.ndarray:
    """(rows,) bool: whole rows that are rows of the manifest, unchanged, and not counted before. Marks them as taken."""
    keys, sources, kept = row_keys(ids, scan.salt, keep if is_table else (), scan.kind)
    if not len(scan.keys):
        _note(stock, "rows_gone", len(keys))
        return np.zeros(len(keys), bool)
    at, known = places(scan.keys, keys)
    expected = scan.sources[at]
    same = known & (
        same_content(ids[CONTENT_HASH], sources, expected, scan.salt) if scan.contents else expected == sources
    )
    if is_table:
        same &= scan.kept[at] == kept
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    good = same & first & whole & ~stock.taken[at]
    stock.taken[at[good]] = True
    _note(stock, "rows_gone", int((~known).sum()))
    _note(stock, "rows_changed", int((known & ~same).sum()))
    _note(stock, "rows_doubled", int((same & whole & ~good).sum()))
    return good


def _kept(folder: Folder, name: str, good: np.ndarray, stock: CommittedRows) -> Shard | None:
    """The shard with its good rows alone; None where it has none. good: (rows,) bool."""
    if good.all():
        return stock.verified[folder.path(name)]
    return _rewrite(folder, name, good, stock.verified)


def _rewrite(folder: Folder, name: str, good: np.ndarray, verified: dict[str, Shard]) -> Shard | None:
    verified.pop(folder.path(name), None)
    if not good.any():
        folder.remove(name)
        return None
    metadata = shard_footer(folder, name)[2]
    data = read_shard(folder, name).filter(pa.array(good))
    shard = write_shard(folder, name, metadata["table"], data, provenance_of(metadata))
    verified[folder.path(name)] = shard
    return shard


def _note(stock: CommittedRows, what: str, count: int) -> None:
    if count:
        stock.repaired[what] = stock.repaired.get(what, 0) + count
