"""Which rows of a manifest are on disk already: what makes a run resumable.

The files themselves are the record. A check reads the ids of every committed shard and removes what a kill left torn.
It rewrites shards that hold a row twice, a row that the manifest no longer has, or one whose source (`uri`, `text`),
content or kept columns have changed. Afterwards every row on disk is a row of the manifest, once.

Regions lie in shards of the same name as those of their images. An image is done only with all its regions, and regions
without their image are removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.errors import DamagedError, SchemaError, StaleTableError
from clipray.inputs.content_versions import CONTENT_HASH, same_content
from clipray.inputs.key_index import ABSENT
from clipray.inputs.row_index import RowIndex, row_keys
from clipray.storage.folder import Folder
from clipray.tables import (
    Shard,
    named_as_ours,
    noted_as_damaged,
    provenance_of,
    read_shard,
    rejects_of,
    shard_footer,
    shard_names,
    verify_shards,
    write_shard,
)
from clipray.tables.reasons import is_passing

REFUSED = "refused.parquet"  # the manifest's own rejects, written before work starts


class RegionFolders(NamedTuple):
    """Where a step writes its regions, and the boxes that it rejects."""

    table: Folder
    rejects: Folder

    @classmethod
    def of(cls, output: Folder, name: str) -> RegionFolders:
        return cls(output.sub(name), rejects_of(output, name))


@dataclass
class CommittedRows:
    """What is on disk.

    Attributes:
        done: (n,) bool, for each accepted row of the manifest: written or rejected.
        files, reject_files: the shards, all whole.
        region_files, rejected_box_files: likewise. Empty where the step writes no regions.
        rejects: count by reason, the manifest's own included.
        repaired: how much the check had to repair: files torn or damaged, rows doubled, gone, changed.
        verified: shards by path, every byte of which was verified or written in this run.
    """

    done: np.ndarray
    files: list[Shard] = field(default_factory=list)
    reject_files: list[Shard] = field(default_factory=list)
    region_files: list[Shard] = field(default_factory=list)
    rejected_box_files: list[Shard] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    verified: dict[str, Shard] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.files)

    @property
    def rejected(self) -> int:
        return sum(self.rejects.values())

    def note(self, what: str, count: int) -> None:
        """Count a repair."""
        if count:
            self.repaired[what] = self.repaired.get(what, 0) + count


def regions_of_another(regions: RegionFolders, fingerprint: str, name: str) -> str | None:
    """Path of a shard of regions that another table's images or other settings made; None if there is none."""
    for folder in regions:
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
    committed = CommittedRows(np.zeros(len(scan.index), bool), verified={} if verified is None else verified)
    _Check(table, rejects, regions, scan, keep, fingerprint, repair, committed).run()
    return committed


@dataclass(frozen=True)
class _Check:
    """One check of a table's shards; see `check_committed`. What it finds is counted in `committed`."""

    table: Folder
    rejects: Folder
    regions: RegionFolders | None
    scan: RowIndex
    keep: Sequence[str]
    fingerprint: str
    repair: bool
    committed: CommittedRows

    def run(self) -> None:
        if self.repair:
            self._drop_broken()
        for folder, shards in ((self.table, self.committed.files), (self.rejects, self.committed.reject_files)):
            sizes, damaged = folder.sizes(), noted_as_damaged(folder) or ()
            counted = (
                self._count_shard(folder, name, sizes[name]) for name in shard_names(folder) if name not in damaged
            )
            shards += [shard for shard in counted if shard is not None]
        if self.regions is not None and self.repair:
            self._match_regions(self.regions)

    def _drop_broken(self) -> None:
        """Remove shards that are not what was written. Images whose rejected boxes are lost are made again with them."""
        known = self.committed.verified
        verified_bytes = {path: shard.bytes for path, shard in known.items()}
        for folder in (self.table, self.rejects, *(self.regions or ())):
            for name in folder.leftovers():
                folder.remove(name)
            sizes = folder.sizes()
            names = [name for name in shard_names(folder) if verified_bytes.get(folder.path(name)) != sizes[name]]
            whole, broken = verify_shards(folder, names)
            foreign = next((name for name in broken if not named_as_ours(name)), None)
            if foreign:
                raise StaleTableError(
                    f"{folder.path(foreign)} is no file of this table that clipray wrote, nor whole Parquet; move it away"
                )
            known.update({folder.path(name): shard for name, shard in whole.items()})
            for name, error in broken.items():
                self.committed.note("damaged_files" if isinstance(error, DamagedError) else "torn_files", 1)
                folder.remove(name)
                if self.regions is not None and folder == self.regions.rejects:
                    self.table.remove(name)

    def _count_shard(self, folder: Folder, name: str, size: int) -> Shard | None:
        """Mark a shard's rows as done. The shard with those rows alone; None where it has none."""
        is_table = folder == self.table
        try:
            rows, _, metadata = shard_footer(folder, name)
            if metadata.get("fingerprint") != self.fingerprint:
                raise StaleTableError(
                    f"{folder.path(name)} was not made by this job with these settings; move it away, or give the job another `output`"
                )
            data = read_shard(folder, name, self._columns(is_table))
        except (SchemaError, FileNotFoundError):
            self.committed.note("torn_files", 1)
            if self.repair:
                folder.remove(name)
            return None
        whole = self._has_its_regions(data, self.regions, name) if is_table and self.regions else np.ones(rows, bool)
        good = np.ones(rows, bool) if name == REFUSED else self._mark_done(data, whole, is_table)
        if not is_table:
            self._count_reasons(data["reason"].filter(pa.array(good)))
        if not self.repair:
            return Shard(name, int(good.sum()), size)
        return self._rewritten(folder, name, good)

    def _columns(self, is_table: bool) -> list[str]:
        """The columns that identify a shard's rows."""
        hashed = [CONTENT_HASH] if self.scan.contents else []
        others = [*(["region_count"] if self.regions else []), *self.keep] if is_table else ["reason"]
        return [*self.scan.spec.named, *hashed, *others]

    def _count_reasons(self, reasons: pa.ChunkedArray) -> None:
        counts = self.committed.rejects
        for item in pc.value_counts(reasons).to_pylist():
            counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]

    def _has_its_regions(self, images: pa.Table, regions: RegionFolders, name: str) -> np.ndarray:
        """(rows,) bool: images of a shard whose regions are all there."""
        try:
            owners = read_shard(regions.table, name, ["image_id"])["image_id"]
        except (SchemaError, FileNotFoundError):
            owners = pa.chunked_array([[]], pa.string())
        counts = pc.value_counts(owners)
        at = pc.index_in(images["image_id"], value_set=counts.field("values").cast(pa.string()))
        there = pc.fill_null(counts.field("counts").take(at), 0).to_numpy()
        whole: np.ndarray = there == images["region_count"].to_numpy()
        self.committed.note("rows_without_their_regions", int((~whole).sum()))
        return whole

    def _mark_done(self, data: pa.Table, whole: np.ndarray, is_table: bool) -> np.ndarray:
        """(rows,) bool: whole rows that are rows of the manifest, unchanged, and not counted before; they are done."""
        scan, done = self.scan, self.committed.done
        keys, sources, kept = row_keys(data, scan.index.seed, self.keep if is_table else (), scan.spec)
        if not len(scan.index):
            self.committed.note("rows_gone", len(keys))
            return np.zeros(len(keys), bool)
        at = scan.index.positions_of(keys)
        known, expected = at != ABSENT, scan.sources[at]
        same = expected == sources
        if scan.contents:
            same = same_content(data[CONTENT_HASH], sources, expected, scan.index.seed)
        if is_table:
            same = same & (scan.kept[at] == kept)
        same = same & known
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        good = same & first & whole & ~done[at]
        done[at[good]] = True
        self.committed.note("rows_gone", int((~known).sum()))
        self.committed.note("rows_changed", int((known & ~same).sum()))
        self.committed.note("rows_doubled", int((same & whole & ~good).sum()))
        return good

    def _match_regions(self, regions: RegionFolders) -> None:
        """Remove regions whose image is not in the shard of the same name."""
        of_images = {shard.name for shard in self.committed.files}
        for folder, shards in zip(
            regions, (self.committed.region_files, self.committed.rejected_box_files), strict=True
        ):
            for name in shard_names(folder):
                shard = self._match_shard(folder, name) if name in of_images else None
                if shard is None:
                    self.committed.note("region_files_removed", 1)
                    folder.remove(name)
                else:
                    shards.append(shard)

    def _match_shard(self, folder: Folder, name: str) -> Shard | None:
        owners, images = (read_shard(each, name, ["image_id"])["image_id"] for each in (folder, self.table))
        return self._rewritten(folder, name, pc.is_in(owners, value_set=images.combine_chunks()).to_numpy())

    def _rewritten(self, folder: Folder, name: str, good: np.ndarray) -> Shard | None:
        """The shard with its good rows, (rows,) bool, alone; None where it has none."""
        verified = self.committed.verified
        return verified[folder.path(name)] if good.all() else _rewrite(folder, name, good, verified)


def take_back(rejects: Folder, fingerprint: str, verified: dict[str, Shard]) -> int:
    """Remove the rows that were rejected for a temporary reason from a table's rejects, so that they are tried again.

    A kill in between loses no row: each is still rejected or to be done. verified: as of `check_committed`, kept
    true. Returns how many there were.
    """
    count = 0
    for name in shard_names(rejects):
        with contextlib.suppress(SchemaError, FileNotFoundError):  # torn: a check removes it
            metadata = shard_footer(rejects, name)[2]
            reasons = read_shard(rejects, name, ["reason"])["reason"].to_pylist()
            lasting = np.array([not is_passing(reason) for reason in reasons], bool)
            if metadata.get("fingerprint") == fingerprint and not lasting.all():
                _rewrite(rejects, name, lasting, verified)
                count += int((~lasting).sum())
    return count


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
