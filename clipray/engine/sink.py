"""Finished blocks -> shards, by size or time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from clipray.engine.health import LOOK_S, Health, unwrapped, waited
from clipray.inputs.committed_rows import RegionFolders
from clipray.job.row_spec import IMAGES, RowSpec
from clipray.pipelines.region_boxes import unfolded
from clipray.storage.folder import Folder
from clipray.tables import Shard, rejects_schema, write_shard

WRITES_AHEAD = 2
WRITERS = 16  # nodes that write at once
SHARD_BYTES = 256 * 2**20  # a writer holds a few of these


@dataclass(frozen=True)
class Target:
    """Where rows go. regions: where their regions go, with `region_schema`."""

    table: Folder
    rejects: Folder
    schema: pa.Schema
    rejects_schema: pa.Schema
    prefix: str
    rows_per_file: int
    flush_s: float
    regions: RegionFolders | None = None
    region_schema: pa.Schema | None = None
    spec: RowSpec = IMAGES


@dataclass
class Written:
    """What a pass has written so far. shards: by path, of all tables."""

    rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    files: int = 0
    shards: dict[str, Shard] = field(default_factory=dict)

    def add(self, other: Written) -> None:
        self.rows += other.rows
        self.files += other.files
        self.shards.update(other.shards)
        self.rejects.update(other.rejects)

    def write(self, folder: Folder, name: str, table: str, data: pa.Table, provenance: dict[str, Any]) -> None:
        self.shards[folder.path(name)] = write_shard(folder, name, table, data, provenance)


class Sink:
    """Collects finished blocks and writes them as shards: when `rows_per_file` are there, or `flush_s` have passed.

    The first block is written at once. On one machine threads of the driver write, from the shared object store; on a
    cluster only references pass through here, and tasks on all nodes do it. The files' names are fixed before,
    so that a write that is done again overwrites its own file.
    """

    def __init__(
        self, target: Target, written: Written, provenance: Callable[[], dict[str, Any]], *, local: bool, nodes: int
    ) -> None:
        self._target, self._written, self._provenance = target, written, provenance
        self._threads = ThreadPoolExecutor(1, "clipray-write") if local else None
        self._task: Any = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")(_write)
        self._ahead = WRITES_AHEAD * (1 if local else min(nodes, WRITERS))
        self._blocks: list[Any] = []
        self._rows = self._bytes = self._count = 0
        self._last, self._health = 0.0, Health()
        self._pending: list[Future[Written]] = []

    def add(self, ref: Any, rows: int, size_bytes: int) -> None:
        """Take a finished block; may start a write, and waits when too many are under way."""
        if rows:
            self._blocks.append(ref)
            self._rows, self._bytes = self._rows + rows, self._bytes + size_bytes
        full = self._rows >= self._target.rows_per_file or self._bytes >= SHARD_BYTES
        if self._rows and (full or time.monotonic() - self._last >= self._target.flush_s):
            self._start()
        self._collect(self._ahead)

    def flush(self, timeout_s: float | None = None) -> None:
        """Write what is there and wait until everything is on disk, or the time is up."""
        if self._rows:
            self._start()
        self._collect(0, timeout_s)

    def _start(self) -> None:
        name = f"{self._target.prefix}-{self._count:06d}.parquet"
        target, provenance, blocks = self._target, self._provenance(), self._blocks
        if self._threads:
            future = self._threads.submit(lambda: _write(target, provenance, name, *waited(blocks)))
        else:
            future = self._task.remote(target, provenance, name, *blocks).future()
        self._pending.append(future)
        self._blocks, self._rows, self._bytes, self._last = [], 0, 0, time.monotonic()
        self._count += 1

    def _collect(self, leave: int, timeout_s: float | None = None) -> None:
        while self._pending:
            late = len(self._pending) > leave
            patience = LOOK_S if timeout_s is None else timeout_s
            done, _ = wait(self._pending, timeout=patience if late else 0, return_when=FIRST_COMPLETED)
            if not done and late and timeout_s is None:
                self._health.look()
                continue
            if not done:
                return
            self._health.progressed()
            self._pending = [future for future in self._pending if future not in done]
            for future in done:
                try:
                    self._written.add(future.result())
                except ray.exceptions.ObjectLostError:  # with its node; the rows come again in the next pass
                    continue
                except ray.exceptions.RayError as error:
                    raise unwrapped(error) from error


def _write(target: Target, provenance: dict[str, Any], name: str, *blocks: pa.Table) -> Written:
    """Split finished blocks into rows and rejects and write a shard of each."""
    written, data = Written(), pa.concat_tables(blocks)
    rejected = data["reason"].is_valid()
    bad = data.filter(rejected).select(target.rejects_schema.names).cast(target.rejects_schema)
    good = data.filter(pc.invert(rejected)).select(target.schema.names)
    if bad.num_rows:
        written.write(target.rejects, name, "rejects", bad, provenance)
    if good.num_rows:
        if target.regions is not None:
            _write_regions(target, data.filter(pc.invert(rejected)), provenance, name, written)
        good = pa.table(good.columns, schema=target.schema)
        written.write(target.table, name, target.spec.table, good, provenance)
    written.rows, written.files = good.num_rows, 1 if good.num_rows else 0
    written.rejects = Counter(bad["reason"].to_pylist())
    return written


def _write_regions(target: Target, images: pa.Table, provenance: dict[str, Any], name: str, written: Written) -> None:
    """The regions of a shard's images, in a shard of the same name, written first: an image on disk is complete."""
    assert target.regions is not None
    assert target.region_schema is not None
    rows = unfolded(images, "regions").select(target.region_schema.names)
    regions = pa.table(rows.columns, schema=target.region_schema)
    boxes, schema = unfolded(images, "rejected_boxes"), rejects_schema(*target.spec.named)
    boxes = boxes.append_column("stage", pa.array(["pool"] * len(boxes), pa.string())).select(schema.names).cast(schema)
    folders = target.regions
    for folder, table, data in ((folders.table, "regions", regions), (folders.rejects, "rejects", boxes)):
        if data.num_rows:
            written.write(folder, name, table, data, provenance)
        else:
            folder.remove(name)
