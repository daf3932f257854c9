"""Step `deduplicate`: a vector column and its clusters -> the table `duplicates`, by semantic deduplication.

Only rows of one cluster are compared (SemDeDup, Abbas et al. 2023, arXiv 2303.09540). The vectors are sorted by cluster on disk,
aside; tasks compare blocks; the driver holds what is linked, and 16 bytes of each row while the vectors are sorted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis import duplicates as dd
from clipray.errors import SchemaError
from clipray.inputs.vector_column import open_vectors
from clipray.job import Deduplicate
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.shard_writer import map_row_groups
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.steps.vectors.sorted_by_cluster import (
    CLUSTER,
    DISTANCE,
    VECTOR,
    Bucket,
    batches,
    buckets_of,
    file_rows,
    read_clusters,
    sorted_names,
    write_sorted,
)  # fmt: skip
from clipray.storage.folder import Folder
from clipray.tables.digests import Digest, combined, files_digest, without_hashes
from clipray.tables.metrics import Metric

ASIDE = "_by_cluster"
FILE = "part-{:06d}.parquet"


@dataclass(frozen=True)
class DeduplicateStep(VectorStep[Deduplicate]):
    """A `Step`; see `VectorStep`. clusters, record: the table of clusters."""

    table_type: ClassVar[str] = "duplicates"

    clusters: Folder
    record: tables.Record

    @property
    def aside(self) -> Folder:
        return self.table.sub(ASIDE)

    @property
    def inputs_digest(self) -> Digest:
        before = [self.source.digest.before, without_hashes(self.record.files)]
        return combined([self.source.digest, files_digest(self.record.files)], before)

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
        """Sort by cluster, compare, choose.

        Raises:
            SchemaError: rows that are in no cluster, vectors that are not finite.
        """
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
        return Outcome(shards, summary, metrics, row_for_row=False)

    @contextlib.contextmanager
    def _put_aside(self, run: RunContext) -> Iterator[list[Bucket]]:
        """The vectors by cluster, on disk while this lasts."""
        source, settings = self.source, self.settings
        clusters = read_clusters(settings.clusters, self.clusters, source.ids[-1], 2 * settings.rows_per_block)
        rows, shared = file_rows(source.n_features), (self.aside, clusters)
        try:
            files = map_row_groups(write_sorted, source, rows, run, self.name, "sorting by cluster", shared)
            yield buckets_of(dict(files), clusters)
        finally:
            for name in filter(tables.named_as_ours, self.aside.sizes()):
                self.aside.remove(name)
            if self.aside.local:
                with contextlib.suppress(OSError):  # of somebody else's files in it
                    os.rmdir(self.aside.path(""))

    def _linked(self, run: RunContext, buckets: list[Bucket]) -> list[dd.Links]:
        """Of each bucket what is linked."""
        from clipray.engine.tasks import map_tasks

        items, rows = [], self.settings.rows_per_block
        for bucket in buckets:
            starts = range(0, bucket.rows, rows) if bucket.single else [0]
            items += [(self, bucket, start) for start in starts]
        done = np.cumsum([min(rows, b.rows - start) if b.single else b.rows for _, b, start in items])
        ticker, links = Ticker(run, self.name, self.total, "comparing"), {b.number: [] for b in buckets}  # type: ignore[var-annotated]
        parts = map_tasks(_compare, items, run.cluster().cpus, lambda n: ticker.at(int(done[n - 1]) if n else 0, 0))
        for (_, bucket, _), part in zip(items, parts, strict=True):
            links[bucket.number].append(part)
        return [dd.merged(links[bucket.number]) for bucket in buckets]

    def _chosen(
        self, run: RunContext, buckets: list[Bucket], links_of: list[dd.Links]
    ) -> list[tuple[tables.Shard, int, int]]:
        """Shards, each with its groups and the rows of its largest one."""
        from clipray.engine.tasks import map_tasks

        items, first = [], 0
        for bucket, links in zip(buckets, links_of, strict=True):
            if len(links.rows) or bucket is buckets[0]:  # a table has at least one file
                labels = dd.groups(links)
                items.append((self, bucket, links.rows, labels, links.nearest, first))
                first += int(labels.max(initial=-1)) + 1
        ticker = Ticker(run, self.name, self.total, "choosing what to keep")
        done = np.cumsum([len(item[2]) for item in items])
        return list(map_tasks(_choose, items, run.cluster().cpus, lambda n: ticker.at(0, int(done[n - 1]) if n else 0)))


def _compare(item: tuple[DeduplicateStep, Bucket, int]) -> dd.Links:
    """What is linked in a bucket of small clusters; of a large cluster, the rows from `start` on with those that follow."""
    step, bucket, start = item
    threshold, rows = step.settings.similarity, step.settings.rows_per_block
    if not bucket.single:
        return _within_clusters(step, bucket, threshold)
    first_rows: list[np.ndarray] = []
    for first, part in batches(step.aside, bucket, [VECTOR], start):
        first_rows.append(tables.matrix(part[VECTOR])[: max(0, start + rows - first)])
        if first + len(part) >= start + rows:
            break
    queries, parts = np.concatenate(first_rows), []
    for first, part in batches(step.aside, bucket, [VECTOR], start):
        parts.append(dd.between(queries, start, tables.matrix(part[VECTOR]), first, threshold))
    return dd.merged(parts)


def _within_clusters(step: DeduplicateStep, bucket: Bucket, threshold: float) -> dd.Links:
    parts = [
        (part[CLUSTER].to_numpy(), tables.matrix(part[VECTOR]))
        for _, part in batches(step.aside, bucket, [CLUSTER, VECTOR])
    ]
    cluster, x = (np.concatenate(columns) for columns in zip(*parts, strict=True))
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
    data = pa.concat_tables(
        part.take(pa.array(rows[here] - first))
        for first, part in batches(step.aside, bucket, [*ids, CLUSTER, DISTANCE])
        for here in [_here(rows, first, len(part))]
    )
    sign = {"farthest": -1, "nearest": 1, "first": 0}[step.settings.keep]
    best = np.lexsort((sorted_names(data, key), sign * data[DISTANCE].to_numpy()))
    keepers = dd.keepers(labels, best) if len(rows) else rows
    columns = [
        *(data[name] for name in ids), pa.array(first_group + labels), data[CLUSTER], data[key].take(pa.array(keepers[labels])),
        pa.array(np.isin(np.arange(len(rows)), keepers)), pa.array(_to_keepers(step, bucket, rows, labels, keepers)), pa.array(nearest),
    ]  # fmt: skip
    order = pa.array(np.lexsort((np.arange(len(rows)), labels)))
    table = pa.table(columns, schema=step.schema).take(order)
    shard = step.write(table, FILE.format(bucket.number))
    return shard, len(keepers), int(np.bincount(labels).max(initial=0))


def _to_keepers(
    step: DeduplicateStep, bucket: Bucket, rows: np.ndarray, labels: np.ndarray, keepers: np.ndarray
) -> np.ndarray:
    """(n,) float32 cosine of each row to its group's keeper. Holds the keepers' vectors."""
    kept, similarity = np.zeros((len(keepers), step.source.n_features), np.float32), np.zeros(len(rows), np.float32)
    wanted = np.sort(rows[keepers])
    for first, part in batches(step.aside, bucket, [VECTOR]):
        here = wanted[_here(wanted, first, len(part))]
        kept[labels[np.searchsorted(rows, here)]] = tables.matrix(part[VECTOR])[here - first]
    for first, part in batches(step.aside, bucket, [VECTOR]):
        mine = _here(rows, first, len(part))
        similarity[mine] = np.einsum("nd,nd->n", tables.matrix(part[VECTOR])[rows[mine] - first], kept[labels[mine]])
    return similarity


def _here(rows: np.ndarray, first: int, n: int) -> slice:
    """Which of the sorted rows are among the n from `first` on."""
    return slice(*np.searchsorted(rows, [first, first + n]))


def open_step(settings: Deduplicate, context: StepContext) -> DeduplicateStep:
    """Open the input and the clusters.

    Raises:
        JobError, SchemaError, ManifestError: one of them is not there, or is no table of clusters of such rows.
    """
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
