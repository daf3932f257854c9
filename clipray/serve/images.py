"""Images of a run by id: where they lie, their bytes, and thumbnails. Clients never name a path."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of
from clipray.inputs.layout import Layout
from clipray.inputs.manifest import read_rows, resolve
from clipray.inputs.parquet_files import read_footer
from clipray.pipelines.image_fetch import fetch
from clipray.report.run_tables import RunTable, RunTables
from clipray.report.thumbnails import BATCH_ROWS, LIMITS, ImageSource, Thumbnails
from clipray.serve.responses import HttpError
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup
from clipray.tables.reasons import Rejected

SEED = seed_of("serve")
SIDES_PX = (160, 320, 640, 1600)
MOST_BYTES = {160: 24_000, 320: 60_000, 640: 200_000, 1600: 2_000_000}
KEPT_BYTES = 64 * 2**20  # of thumbnails
KEPT_SHARDS = 24  # whose columns stay in memory


@dataclass(frozen=True, eq=False)
class IdRows:
    """The rows of a table by an id, in 16 bytes a row.

    Attributes:
        index: of the ids. rows: (n,) int64 row in the table, in the order of `index`. starts: the first row of each shard.
    """

    table: RunTable
    key: str
    index: KeyIndex
    rows: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, table: RunTable, key: str) -> IdRows:
        """Read the ids of a table."""
        hashes = [hash_strings(rows[key], SEED) for rows in tables.iter_table(table.folder.url, [key])]
        index, order = KeyIndex.of(np.concatenate(hashes) if hashes else np.empty(0, np.uint64), SEED)
        starts = np.cumsum([0, *map(len, hashes)])[:-1]
        return cls(table, key, index, order, starts)

    def row(self, name: str, *columns: str) -> dict[str, object] | None:
        """These columns of the row of this id, or None."""
        position = int(self.index.positions(pa.array([name], pa.string()))[0])
        if position == ABSENT:
            return None
        row = int(self.rows[position])
        shard = int(np.searchsorted(self.starts, row, side="right") - 1)
        file = self.table.record.files[shard]
        shard_rows = _shard(self.table.folder.url, file["name"], file["bytes"], (self.key, *columns))
        (values,) = shard_rows.slice(row - int(self.starts[shard]), 1).to_pylist()
        return values if values[self.key] == name else None  # a hash alone may be another's


@functools.lru_cache(KEPT_SHARDS)
def _shard(url: str, name: str, _bytes: int, columns: tuple[str, ...]) -> pa.Table:
    return tables.read_shard(Folder(url), name, list(columns))


class InlineBytes:
    """Images that manifests hold as bytes, found by id in 16 bytes a row."""

    def __init__(self, urls: tuple[str, ...], layout: Layout) -> None:
        self._layout = layout
        self._groups: list[RowGroup] = []
        hashes = []
        for url in urls:
            file = read_footer(url)
            if not {"image_id", "bytes"} <= set(layout.view(file).schema.names):
                continue
            for row_group in file.row_groups:
                self._groups.append(row_group)
                ids = [read.table["image_id"] for read in read_rows(row_group, ["image_id"], 65_536, layout)]
                hashes.append(np.concatenate([hash_strings(part, SEED) for part in ids]))
        self._starts = np.cumsum([0, *map(len, hashes)])[:-1]
        self._index, self._rows = KeyIndex.of(np.concatenate(hashes) if hashes else np.empty(0, np.uint64), SEED)

    def get(self, name: str) -> bytes | None:
        """The bytes of the image of this id, or None."""
        position = int(self._index.positions(pa.array([name], pa.string()))[0])
        if position == ABSENT:
            return None
        row = int(self._rows[position])
        number = int(np.searchsorted(self._starts, row, side="right") - 1)
        within = row - int(self._starts[number])
        for read in read_rows(self._groups[number], ["image_id", "bytes"], BATCH_ROWS, self._layout):
            if within < len(read.table):
                (values,) = read.table.slice(within, 1).to_pylist()
                return values["bytes"] if values["image_id"] == name else None
            within -= len(read.table)
        return None


class RunImages:
    """The images of a run, whose tables `tables` returns as they are now. Safe in several threads."""

    def __init__(self, run_name: str, tables: Callable[[], RunTables]) -> None:
        self._run_name, self._tables = run_name, tables
        self._lock = threading.Lock()
        self._ids: dict[tuple[str, str], IdRows] = {}
        self._inline: dict[tuple[str, ...], InlineBytes] = {}
        self._kept: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()

    def source(self, image_id: str, region_id: str = "") -> ImageSource | None:
        """Where an image lies, with the box of one of its regions; None where no table of the run knows it."""
        for table in self._tables().known("images"):
            row = self._rows(table, "image_id").row(image_id, "uri", "height", "width")
            if row is None:
                continue
            manifests = tuple(map(str, table.record.inputs.get("manifest") or ()))
            layout = Layout.of_facts(table.record.inputs.get("layout", {}))
            uri = resolve(row["uri"], manifests[0] if manifests else "")  # type: ignore[arg-type]
            source = ImageSource(image_id, uri, (row["width"], row["height"]), manifests, layout)  # type: ignore[arg-type]
            return replace(source, box=self._box(region_id)) if region_id else source
        return None

    def bytes_of(self, source: ImageSource) -> bytes:
        """The bytes of an image's file. Raises Rejected: it cannot be read; HttpError 404: no bytes are known."""
        if source.uri:
            return fetch(source.uri, LIMITS)
        with self._lock:
            if source.manifests not in self._inline:
                self._inline[source.manifests] = InlineBytes(source.manifests, source.layout)
        data = self._inline[source.manifests].get(source.image_id)
        if data is None:
            raise HttpError(404, f"image {source.image_id!r}: its manifest does not hold its bytes any more")
        return data

    def thumbnail(self, image_id: str, side_px: int, region_id: str = "") -> bytes:
        """WebP of at most `side_px`, one of SIDES_PX, with the box of a region drawn on it. Raises HttpError 404."""
        key = image_id, region_id, side_px
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        source = self.source(image_id, region_id)
        if source is None:
            raise HttpError(404, f"no image {image_id!r} in run {self._run_name}")
        try:
            data = Thumbnails(side_px, MOST_BYTES[side_px]).webp(self.bytes_of(source), source)
        except Rejected as rejected:
            raise HttpError(404, f"image {image_id!r} cannot be shown: {rejected.reason}") from rejected
        self._keep(key, data)
        return data

    def _keep(self, key: tuple[str, str, int], data: bytes) -> None:
        with self._lock:
            self._kept[key] = data
            while sum(map(len, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)

    def _box(self, region_id: str) -> tuple[float, ...] | None:
        for table in self._tables().known("regions"):
            row = self._rows(table, "region_id").row(region_id, "box_xyxy")
            if row is not None:
                return tuple(row["box_xyxy"])  # type: ignore[arg-type]
        return None

    def _rows(self, table: RunTable, key: str) -> IdRows:
        version = table.folder.url, table.record.finished_at
        with self._lock:
            if version not in self._ids:
                self._ids[version] = IdRows.of(table, key)
            return self._ids[version]
