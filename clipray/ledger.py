"""What of a manifest is on disk already: the books that make a run resumable.

The files themselves are the books. Taking stock reads the ids of every committed shard, removes what a kill left
torn, and rewrites shards that hold a row twice, a row that the manifest no longer has, or one whose `uri` or kept
columns have changed, so that afterwards every row on disk is a row of the manifest, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.errors import SchemaError, StaleTableError
from clipray.scan import Scan, row_keys
from clipray.storage import Folder
from clipray.tables import Shard, read_shard, shard_names, shard_stamp, write_shard

REFUSED = "refused.parquet"  # the manifest's own rejects, written before work starts


@dataclass
class Stock:
    """What is on disk.

    Attributes:
        taken: (n,) bool, for each accepted row of the scan: written or rejected.
        files, reject_files: the shards, all whole.
        rejects: count by reason, the manifest's own included.
        repaired: what taking stock had to mend: torn files, rows doubled, gone, changed.
    """

    taken: np.ndarray
    files: list[Shard] = field(default_factory=list)
    reject_files: list[Shard] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.files)

    @property
    def rejected(self) -> int:
        return sum(self.rejects.values())


def take_stock(
    table: Folder, rejects: Folder, scan: Scan, keep: Sequence[str], fingerprint: str, *, mend: bool = True
) -> Stock:
    """Count what is written and rejected; with `mend`, remove and rewrite what does not belong.

    Raises:
        StaleTableError: the folder holds Parquet that was made with other settings, or by somebody else.
    """
    stock = Stock(np.zeros(len(scan.keys), bool))
    for folder, is_table in ((table, True), (rejects, False)):
        for name in sorted(folder.leftovers()) if mend else ():
            folder.remove(name)
        sizes = folder.sizes()
        for name in shard_names(folder):
            shard = _count_shard(folder, name, sizes[name], is_table, scan, keep, fingerprint, stock, mend)
            if shard is not None:
                (stock.files if is_table else stock.reject_files).append(shard)
    return stock


def _count_shard(
    folder: Folder,
    name: str,
    size: int,
    is_table: bool,
    scan: Scan,
    keep: Sequence[str],
    fingerprint: str,
    stock: Stock,
    mend: bool,
) -> Shard | None:
    try:
        rows, _, stamp = shard_stamp(folder, name)
        if stamp.get("fingerprint") != fingerprint:
            raise StaleTableError(
                f"{folder.path(name)} was not made by this job with these settings; move it away, or give the job another `output`"
            )
        ids = read_shard(folder, name, ["image_id", "uri", *(keep if is_table else ())])
    except (SchemaError, FileNotFoundError):
        _note(stock, "torn_files", 1)
        if mend:
            folder.remove(name)
        return None
    reasons = None if is_table else read_shard(folder, name, ["reason"])["reason"]
    good = np.ones(rows, bool) if name == REFUSED else _belongs(ids, is_table, scan, keep, stock)
    if reasons is not None:
        for item in pc.value_counts(reasons.filter(pa.array(good))).to_pylist():
            stock.rejects[item["values"]] = stock.rejects.get(item["values"], 0) + item["counts"]
    if good.all():
        return Shard(name, rows, size)
    if not mend:
        return Shard(name, int(good.sum()), size)
    return _rewrite(folder, name, good, stamp)


def _belongs(ids: pa.Table, is_table: bool, scan: Scan, keep: Sequence[str], stock: Stock) -> np.ndarray:
    """(rows,) bool: rows that are rows of the manifest, unchanged, and not counted before. Marks them as taken."""
    keys, uris, kept = row_keys(ids, scan.salt, keep if is_table else ())
    if not len(scan.keys):
        _note(stock, "rows_gone", len(keys))
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(scan.keys, keys), len(scan.keys) - 1)
    known = scan.keys[at] == keys
    same = known & (scan.uris[at] == uris) & ((scan.kept[at] == kept) if is_table else True)
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    good = same & first & ~stock.taken[at]
    stock.taken[at[good]] = True
    _note(stock, "rows_gone", int((~known).sum()))
    _note(stock, "rows_changed", int((known & ~same).sum()))
    _note(stock, "rows_doubled", int((same & ~good).sum()))
    return good


def _rewrite(folder: Folder, name: str, good: np.ndarray, stamp: dict[str, Any]) -> Shard | None:
    if not good.any():
        folder.remove(name)
        return None
    data = read_shard(folder, name).filter(pa.array(good))
    provenance = {key: value for key, value in stamp.items() if key not in ("table", "schema_version")}
    return write_shard(folder, name, stamp["table"], data, provenance)


def _note(stock: Stock, what: str, count: int) -> None:
    if count:
        stock.repaired[what] = stock.repaired.get(what, 0) + count
