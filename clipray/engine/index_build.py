"""Building a FAISS index on a cluster: a sample trains it, tasks fill parts of it, one actor puts them together.

Some rows are held out: of them the index is not trained, and they are added to it last, when its recall has been measured
with them. So what is measured is what new rows of the table will find.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipray import tables
from clipray.analysis import vector_index as vi
from clipray.analysis.normalize import l2_normalize
from clipray.analysis.recall import TOPS, Nearest, nearest_exactly
from clipray.engine.cluster import ClusterResources
from clipray.engine.health import answers_of
from clipray.engine.index_builder import QUERIES, Builder, IndexPart, IndexSpec, Probes
from clipray.engine.vector_actors import SEED
from clipray.inputs.key_index import hash_strings
from clipray.inputs.vector_column import VectorColumn, read_finite
from clipray.storage.memory import give_back
from clipray.storage.parquet import RowGroup, chunked

AHEAD = 2  # parts under way for each CPU
PART_ROWS = 65_536  # of the queries that a task reads
Write = Callable[[pa.Table, np.ndarray, int], Any]
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Keys (m,) uint64, row numbers (m,) int64 and vectors (m, d) float32."""


def build(
    order: IndexSpec, write: Write, cluster: ClusterResources, tick: Callable[[int], None]
) -> tuple[dict[str, Any], list[Any]]:
    """Build `order.name` in `order.folder`.

    Returns:
        Figures of the index, and what `write(ids, numbers, first row)` made of each new part's identities, in their order.

    Raises:
        SchemaError: vectors that are not finite. DataError: too few rows for the type. RunError: workers died.
    """
    width, new = order.source.n_features, [part for part in order.parts if part.new]
    rows = sum(part.rows for part in new)
    wanted = 0 if order.grown_from else vi.training_rows(vi.empty_index(order.index_type, width, order.metric), rows)
    threads = max(1, int(cluster.cpus / cluster.nodes))
    # In a process of its own, which ends with it: what training needs is not there when the lists are merged.
    train: Any = ray.remote(num_cpus=0, max_retries=3, max_calls=1, num_returns=3)(_trained)
    holder: Any = ray.remote(num_cpus=0)(Builder)
    sent = ray.put(order)  # once: it names every part
    builder = holder.remote(sent, threads)
    try:
        samples = _samples(sent, new, wanted + 2 * QUERIES)
        others = _samples(sent, _query_parts(order), 2 * QUERIES, of_queries=True)
        index, trained_on, probes = train.remote(sent, wanted, threads, len(samples), *samples, *others)
        del samples, others
        trained = builder.begin.remote(index, trained_on, probes)
        answers_of([trained])
        written = _fill(order.parts, builder, (sent, trained, probes), write, cluster, tick)
        (figures,) = answers_of([builder.finish.remote()])
        return figures, [shard for shard in written if shard is not None]
    finally:
        ray.kill(builder)


def _query_parts(order: IndexSpec) -> list[IndexPart]:
    row_groups = order.queries.row_groups if order.queries else ()
    return [IndexPart(group, group[0].first_row) for group in chunked(row_groups, PART_ROWS)]


def _samples(order: Any, parts: Sequence[IndexPart], wanted: int, *, of_queries: bool = False) -> list[Any]:
    """References to the `Sample` of each part: together about a fifth more than the `wanted` rows."""
    draw: Any = ray.remote(num_cpus=1, max_retries=3)(_drawn)
    share = min(1.0, 1.2 * wanted / max(1, sum(part.rows for part in parts)))
    return [draw.remote(order, part, share, of_queries) for part in parts]


def _fill(
    parts: Sequence[IndexPart], builder: Any, shared: tuple[Any, Any, Any], write: Write, cluster: ClusterResources,
    tick: Callable[[int], None],
) -> list[Any]:  # fmt: skip
    """What `write` made of each part, which the builder merges in order; a bounded number under way."""
    task: Any = ray.remote(num_cpus=1, max_retries=3, num_returns=3)(_filled)
    merging: deque[Any] = deque()
    written = []
    for n, part in enumerate(parts):
        filled, nearest, shard = task.remote(part, *shared, write)
        written.append(shard)
        merging.append(builder.merge.remote(filled, nearest, n))
        del filled, nearest
        if len(merging) >= max(2, AHEAD * cluster.cpus):
            answers_of([merging.popleft()])
            tick(sum(part.rows for part in parts[: n + 1 - len(merging)]))
    answers_of(list(merging))
    return answers_of(written)


def _vectors(order: IndexSpec, source: VectorColumn, row_group: RowGroup) -> tuple[pa.Table, np.ndarray]:
    ids, x = read_finite(source, row_group)
    return ids, l2_normalize(x) if order.metric == "cosine" else np.ascontiguousarray(x, np.float32)


def _drawn(order: IndexSpec, part: IndexPart, share: float, of_queries: bool) -> Sample:
    """About `share` of the rows, chosen by the hash of their identities."""
    source = order.queries if of_queries and order.queries else order.source
    keys, rows, vectors, start = [], [], [], part.first_row
    for row_group in part.row_groups:
        ids, x = _vectors(order, source, row_group)
        key = hash_strings(ids[source.ids[-1]], SEED)
        key ^= np.uint64(order.random_state * 0x9E3779B97F4A7C15 % 2**64)
        chosen = np.flatnonzero(key <= np.uint64(min(share, 1 - 2**-53) * 2**64))
        keys.append(key[chosen])
        rows.append(start + chosen)
        start += row_group.rows
        vectors.append(x[chosen])
    return np.concatenate(keys), np.concatenate(rows), np.concatenate(vectors)


def _trained(
    order: IndexSpec, wanted: int, threads: int, n_samples: int, *samples: Sample
) -> tuple[np.ndarray, int, Probes]:
    """The empty index as bytes, how many rows it was trained on, and what recall is measured with.

    Args:
        samples: the first `n_samples` of the source, the others of `order.queries`.
    """
    import faiss
    import torch

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    count = order.n_held_out
    rows, x = _lowest(samples[:n_samples], wanted + count)
    index, sample = vi.empty_index(order.index_type, order.source.n_features, order.metric), x[count:]
    if wanted:
        sample = sample if len(sample) >= vi.least_rows(index) else x[:wanted]
        vi.train(index, sample, order.random_state)
    ascending = np.argsort(rows[:count])
    others = _lowest(samples[n_samples:], QUERIES)[1] if samples[n_samples:] else x[:0]
    probes = Probes(rows[ascending], x[ascending], others, order.source.n_samples)
    return faiss.serialize_index(index), len(sample) if wanted else 0, probes


def _filled(
    part: IndexPart, order: IndexSpec, trained: np.ndarray, probes: Probes, write: Write
) -> tuple[np.ndarray | None, Nearest, Any]:
    """The part of the index as bytes, or its vectors where parts cannot be merged; the rows nearest to the probes; and
    what `write` made of the identities. Rows that are held out are only written."""
    import faiss
    import torch

    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    read = [_vectors(order, order.source, row_group) for row_group in part.row_groups]
    x, rows = np.concatenate([vectors for _, vectors in read]), np.arange(part.first_row, part.first_row + part.rows)
    numbers, held_out = (_numbers(order, part), np.zeros(len(x), bool)) if part.numbers else probes.numbers(rows)
    shard = write(pa.concat_tables([ids for ids, _ in read]), numbers, part.first_row) if part.new else None
    if held_out.any():
        x, numbers = x[~held_out], numbers[~held_out]
    nearest = nearest_exactly(np.concatenate([probes.x, probes.others]), x, order.metric, numbers, max(TOPS))
    index = faiss.deserialize_index(trained)
    if not part.new or not len(x):
        return None, nearest, shard
    if not vi.mergeable(index):
        return x, nearest, shard
    vi.fill(index, x, int(numbers[0]))
    filled = faiss.serialize_index(index)
    del index, x, read
    give_back()
    return filled, nearest, shard


def _numbers(order: IndexSpec, part: IndexPart) -> np.ndarray:
    """Numbers (n,) int64 in the index of the rows of a part that is in it."""
    assert part.numbers is not None
    name, start = part.numbers
    return tables.read_shard(order.folder, name)["vector_id"].to_numpy()[start : start + part.rows]


def _lowest(samples: Sequence[Sample], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and vectors of the `count` rows with the lowest keys."""
    keys, rows, vectors = (np.concatenate(column) for column in zip(*samples, strict=True))
    best = np.lexsort((rows, keys))[:count]
    return rows[best], vectors[best]
