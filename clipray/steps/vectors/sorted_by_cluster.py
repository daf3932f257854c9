"""A vector column sorted by cluster, aside on disk: so that a task can read the rows of a cluster and no others.

Neighbouring small clusters share a bucket; a large one has one of its own. Each file holds the rows of some row groups, a row
group for each bucket, within it by cluster. Vectors are there in unit length.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipray import tables
from clipray.analysis.normalize import l2_normalize
from clipray.errors import SchemaError, listed
from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of
from clipray.inputs.vector_column import VectorColumn, read_finite
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup, open_parquet_on

SEED = seed_of("clusters")
FILE_BYTES = 2**27  # of vectors, about; a task holds them a few times
BATCH_ROWS = 8_192
CLUSTER, DISTANCE, VECTOR = "cluster_id", "distance", "<vector>"


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each row is in, by a hash of its identity: 16 bytes a row.

    Attributes:
        index: of the n rows' ids. cluster: (n,) int32, in the order of `index`. distance: (n,) float32, to the centroid.
        buckets: (k,) int64, of each cluster; no cluster's is below that of one before it.
    """

    name: str
    index: KeyIndex
    cluster: np.ndarray
    distance: np.ndarray
    buckets: np.ndarray


@dataclass(frozen=True)
class Bucket:
    """The rows of some clusters. parts: file, row group, rows; single: whether it is of one cluster."""

    number: int
    parts: tuple[tuple[str, int, int], ...]
    single: bool

    @property
    def rows(self) -> int:
        return sum(rows for _, _, rows in self.parts)


def read_clusters(name: str, folder: Folder, key: str, bucket_rows: int) -> Clusters:
    """Read a table of clusters. key: its column that names a row.

    Raises:
        SchemaError: an identity stands there twice.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for part in tables.iter_table(folder.url, [key, CLUSTER, DISTANCE]):
        columns.append((hash_strings(part[key], SEED), part[CLUSTER].to_numpy(), part[DISTANCE].to_numpy()))
    keys, cluster, distance = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    index, order = KeyIndex.of(keys, SEED)
    if index.repeats:
        raise SchemaError(f"clusters {name}: a value of {key!r} stands in two rows; each row should be in one cluster")
    return Clusters(name, index, cluster[order], distance[order], _buckets(np.bincount(cluster), bucket_rows))


def _buckets(sizes: np.ndarray, rows: int) -> np.ndarray:
    """(k,) int64: neighbouring clusters together, up to about `rows` rows."""
    numbers, number, filled = np.zeros(len(sizes), np.int64), 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if filled and filled + size > rows:
            number, filled = number + 1, 0
        numbers[cluster], filled = number, filled + size
    return numbers


def write_sorted(
    item: tuple[VectorColumn, list[RowGroup]], shared: tuple[Folder, Clusters]
) -> tuple[str, list[tuple[int, int]]]:
    """Write rows, sorted by cluster, as one file of the folder. Returns its name, and bucket and rows of each row group.

    Raises:
        SchemaError: a row is in no cluster, with its identity.
    """
    (source, group), (folder, clusters) = item, shared
    parts = [_sorted_row_group(source, row_group, clusters) for row_group in group]
    data = pa.concat_tables(parts)
    cluster = data[CLUSTER].to_numpy()
    order = np.argsort(cluster, kind="stable")
    buckets = clusters.buckets[cluster[order]]
    sink, groups = io.BytesIO(), []
    with pq.ParquetWriter(sink, data.schema, compression="none", use_dictionary=False) as writer:
        for bucket, first, rows in zip(*np.unique(buckets, return_index=True, return_counts=True), strict=True):
            writer.write_table(data.take(pa.array(order[first : first + rows])), row_group_size=int(rows))
            groups.append((int(bucket), int(rows)))
    folder.write(name := f"part-{group[0].first_row:012d}.parquet", sink.getvalue())
    return name, groups


def _sorted_row_group(source: VectorColumn, row_group: RowGroup, clusters: Clusters) -> pa.Table:
    ids, x = read_finite(source, row_group)
    names = ids[source.ids[-1]]
    at = clusters.index.positions(names)
    lost = np.flatnonzero(at == ABSENT)
    if len(lost):
        named = listed(names.take(pa.array(lost)).to_pylist())
        raise SchemaError(
            f"{source.name}: rows that are not in {clusters.name}, {source.ids[-1]}: {named}; cluster this very table"
        )
    vectors = tables.vector_array(l2_normalize(x), tables.vector_type(source.n_features))
    columns = [pa.array(clusters.cluster[at]), pa.array(clusters.distance[at]), vectors]
    return pa.table([*ids.columns, *columns], [*ids.column_names, CLUSTER, DISTANCE, VECTOR])


def buckets_of(files: Mapping[str, Sequence[tuple[int, int]]], clusters: Clusters) -> list[Bucket]:
    """The buckets that have rows, in order; files: what `write_sorted` returned."""
    parts: dict[int, list[tuple[str, int, int]]] = {}
    for name, groups in files.items():
        for group, (bucket, rows) in enumerate(groups):
            parts.setdefault(bucket, []).append((name, group, rows))
    of_one = np.bincount(clusters.buckets) == 1
    return [Bucket(number, tuple(parts[number]), bool(of_one[number])) for number in sorted(parts)]


def batches(folder: Folder, bucket: Bucket, columns: Sequence[str], first: int = 0) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a bucket from `first` on, a few thousand at a time: (number of the first row, rows)."""
    at = 0
    for name, group, rows in bucket.parts:
        if at + rows <= first:
            at += rows
            continue
        with open_parquet_on(folder.fs, folder.path(name)) as parquet:
            for batch in parquet.iter_batches(BATCH_ROWS, [group], columns):
                if (skip := max(first - at, 0)) < batch.num_rows:
                    yield at + skip, pa.Table.from_batches([batch.slice(skip)])
                at += batch.num_rows
