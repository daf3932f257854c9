"""Step `deduplicate`: a vector column and its clusters -> the table `duplicates`, by semantic deduplication.

Only rows of one cluster are compared (SemDeDup, Abbas et al. 2023, arXiv 2303.09540). The vectors are sorted by cluster on disk,
aside; tasks compare blocks; the driver holds what is linked, and 16 bytes of each row while the vectors are sorted.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.analysis import duplicates as dd
from clipray.errors import SchemaError
from clipray.inputs.vector_column import open_vectors
from clipray.job import Deduplicate
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.shard_writer import map_row_groups
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.steps.vectors import sorted_by_cluster as sc
from clipray.steps.vectors.sorted_by_cluster import CLUSTER, DISTANCE, VECTOR, Bucket, batches
from clipray.storage.folder import Folder
from clipray.tables.digests import Digest, combined
from clipray.tables.metrics import Metric

ASIDE = "_by_cluster"


@dataclass(frozen=True)
class DeduplicateStep(VectorStep[Deduplicate]):
    """A `Step`; see `VectorStep`. clusters, record: the table of clusters."""

    table_type: ClassVar[str] = "duplicates"
    row_for_row: ClassVar[bool] = False

    clusters: Folder
    record: tables.Record

    @property
    def aside(self) -> Folder:
        return self.table.sub(ASIDE)

    @property
    def inputs_digest(self) -> Digest:
        return combined([self.source.digest, self.record.files])

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "clusters": self.record.fingerprint}

    @property
    def row_provenance(self) -> dict[str, Any]:
        clusters = {"name": self.settings.clusters, "fingerprint": self.record.fingerprint}
        return {**super().row_provenance, "clusters": clusters}

    @property
    def description(self) -> str:
        source = self.source
        mib = source.n_samples * source.n_features * 4 / 2**20
        return f"{source.n_samples} vectors of {source.name}, {mib:.1f} MiB of them aside while it runs"

    def make(self, run: RunContext) -> Outcome:
        """Sort by cluster, compare, choose. Raises SchemaError: rows in no cluster, or vectors that are not finite."""
        self.begin(keep=False)
        with self._put_aside(run) as buckets:
            chosen = self._chosen(run, buckets, self._linked(run, buckets))
        shards = [shard for shard, _, _ in chosen]
        rows, n_groups = sum(shard.rows for shard in shards), sum(n for _, n, _ in chosen)
        summary = {
            "duplicates": rows - n_groups,
            "duplicate_rate": round((rows - n_groups) / self.total, 6),
            "groups": n_groups,
            "largest_group": max(n for _, _, n in chosen),
        }
        metrics = [Metric(name, value, n=self.total) for name, value in summary.items()]
        return Outcome(shards, summary, metrics)

    @contextlib.contextmanager
    def _put_aside(self, run: RunContext) -> Iterator[list[Bucket]]:
        """The vectors by cluster, on disk while this lasts."""
        source, settings = self.source, self.settings
        clusters = sc.read_clusters(settings.clusters, self.clusters, source.ids[-1], 2 * settings.rows_per_block)
        rows, shared = max(sc.BATCH_ROWS, sc.FILE_BYTES // (4 * source.n_features)), (self.aside, clusters)
        try:
            files = map_row_groups(sc.write_sorted, source, rows, run, self.name, "sorting by cluster", shared)
            yield sc.buckets_of(dict(files), clusters)
        finally:
            for name in filter(tables.named_as_ours, self.aside.sizes()):
                self.aside.remove(name)
            if self.aside.local:
                with contextlib.suppress(OSError):  # of somebody else's files in it
                    os.rmdir(self.aside.path(""))

    def _linked(self, run: RunContext, buckets: list[Bucket]) -> list[dd.Links]:
        """Of each bucket what is linked."""
        rows = self.settings.rows_per_block
        items = [(self, b, start) for b in buckets for start in (range(0, b.rows, rows) if b.single else [0])]
        item_rows = [min(rows, b.rows - start) if b.single else b.rows for _, b, start in items]
        parts = Ticker(run, self.name, self.total, "comparing").map_tasks(_compare, items, rows=item_rows)
        by_bucket = itertools.groupby(zip(items, parts, strict=True), key=lambda pair: pair[0][1].number)
        return [dd.merged(links for _, links in of_bucket) for _, of_bucket in by_bucket]

    def _chosen(
        self, run: RunContext, buckets: list[Bucket], links_of: list[dd.Links]
    ) -> list[tuple[tables.Shard, int, int]]:
        """Shards, each with its groups and the rows of its largest one."""
        items, first = [], 0
        for bucket, links in zip(buckets, links_of, strict=True):
            if len(links.rows) or bucket is buckets[0]:  # a table has at least one file
                labels = dd.groups(links)
                items.append((self, bucket, links.rows, labels, links.nearest, first))
                first += int(labels.max(initial=-1)) + 1
        return list(Ticker(run, self.name, self.total, "choosing what to keep").map_tasks(_choose, items))


def _compare(item: tuple[DeduplicateStep, Bucket, int]) -> dd.Links:
    """What is linked in a bucket of small clusters; of a large cluster, the rows from `start` on with those that follow."""
    step, bucket, start = item
    threshold, rows = step.settings.similarity, step.settings.rows_per_block
    if not bucket.single:
        return _within_clusters(step, bucket, threshold)
    stop = start + rows
    block = itertools.takewhile(lambda batch: batch[0] < stop, batches(step.aside, bucket, [VECTOR], start))
    queries = np.concatenate([tables.matrix(part[VECTOR])[: stop - first] for first, part in block])
    following = batches(step.aside, bucket, [VECTOR], start)
    return dd.merged(
        dd.between(queries, start, tables.matrix(part[VECTOR]), first, threshold) for first, part in following
    )


def _within_clusters(step: DeduplicateStep, bucket: Bucket, threshold: float) -> dd.Links:
    data = pa.concat_tables(part for _, part in batches(step.aside, bucket, [CLUSTER, VECTOR]))
    cluster, x = data[CLUSTER].to_numpy(), tables.matrix(data[VECTOR])
    order = np.argsort(cluster, kind="stable")
    linked = []
    for rows in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
        links = dd.within(x[rows], threshold)
        linked.append(dd.Links(rows[links.i], rows[links.j], rows[links.rows], links.nearest))
    return dd.merged(linked)


def _choose(
    item: tuple[DeduplicateStep, Bucket, np.ndarray, np.ndarray, np.ndarray, int],
) -> tuple[tables.Shard, int, int]:
    """Write the linked rows (n,) of a bucket, whose groups are `labels` (n,), numbered from `first_group` on."""
    step, bucket, rows, labels, nearest, first_group = item
    key, ids = step.source.ids[-1], list(step.source.ids)
    data = pa.concat_tables(part for _, part in _batches_of(step, bucket, [*ids, CLUSTER, DISTANCE], rows))
    sign = {"farthest": -1, "nearest": 1, "first": 0}[step.settings.keep]
    best = np.lexsort((pc.rank(data[key]).to_numpy(), sign * data[DISTANCE].to_numpy()))
    keepers = dd.keepers(labels, best) if len(rows) else rows
    columns = [
        *(data[name] for name in ids), pa.array(first_group + labels), data[CLUSTER], data[key].take(pa.array(keepers[labels])),
        pa.array(np.isin(np.arange(len(rows)), keepers)), pa.array(_to_keepers(step, bucket, rows, labels, keepers)), pa.array(nearest),
    ]  # fmt: skip
    order = pa.array(np.lexsort((np.arange(len(rows)), labels)))
    table = pa.table(columns, schema=step.schema).take(order)
    shard = step.write(table, f"part-{bucket.number:06d}.parquet")
    return shard, len(keepers), int(np.bincount(labels).max(initial=0))


def _to_keepers(
    step: DeduplicateStep, bucket: Bucket, rows: np.ndarray, labels: np.ndarray, keepers: np.ndarray
) -> np.ndarray:
    """(n,) float32 cosine of each row to its group's keeper. Holds the keepers' vectors."""
    kept, similarity = np.zeros((len(keepers), step.source.n_features), np.float32), np.zeros(len(rows), np.float32)
    order = np.argsort(keepers)
    for places, part in _batches_of(step, bucket, [VECTOR], rows[keepers[order]]):
        kept[order[places]] = tables.matrix(part[VECTOR])
    for places, part in _batches_of(step, bucket, [VECTOR], rows):
        similarity[places] = np.einsum("nd,nd->n", tables.matrix(part[VECTOR]), kept[labels[places]])
    return similarity


def _batches_of(
    step: DeduplicateStep, bucket: Bucket, columns: Sequence[str], rows: np.ndarray
) -> Iterator[tuple[slice, pa.Table]]:
    """Some rows of a bucket, (n,) ascending, a few thousand at a time: their places among the n, and their data."""
    for first, part in batches(step.aside, bucket, columns):
        places = slice(*np.searchsorted(rows, [first, first + len(part)]))
        yield places, part.take(pa.array(rows[places] - first))


def open_step(settings: Deduplicate, context: StepContext) -> DeduplicateStep:
    """Open the input and the clusters. Raises as `open_vectors`; SchemaError: no table of clusters of such rows."""
    source = open_vectors(settings.input, context.output)
    folder = context.output.named(settings.clusters)
    record = tables.finished(folder, f"clusters {settings.clusters}")
    if record.table != "clusters":
        raise SchemaError(f"clusters {settings.clusters}: expected a table of clusters, found one of {record.table}")
    if source.ids[-1] not in record.columns:
        raise SchemaError(
            f"clusters {settings.clusters}: no column {source.ids[-1]!r}, by which rows of {source.name} are known; "
            f"there are: {', '.join(record.columns)}"
        )
    return DeduplicateStep(settings, context.output, source, folder, record)
