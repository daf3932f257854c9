"""Vectors held by Ray actors, or read by them again and again, as K-means wants them: `kmeans_data.Batches` over a cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from clipray.analysis.errors import DataError
from clipray.analysis.kmeans_data import Assigned, Draw, choose, combine, merged
from clipray.analysis.normalize import l2_normalize
from clipray.engine.cluster import ClusterResources
from clipray.engine.health import answers_of
from clipray.engine.plan import CORES_PER_CPU_ACTOR
from clipray.errors import RunError, SchemaError
from clipray.inputs.key_index import hash_strings, seed_of
from clipray.inputs.vector_column import VectorColumn, read_vectors
from clipray.storage.parquet import RowGroup, chunked

Write = Callable[[pa.Table, np.ndarray, np.ndarray, int], Any]
TREE_BYTES = 64 * 2**20  # states larger than this meet in pairs, on the workers
PART_ROWS = 65_536  # that are in memory at a time where vectors are not held, and as many more that are being read
SHARE = 0.8  # of the free memory that vectors may take
SEED = seed_of("vectors")  # of the keys by which samples are drawn


@dataclass(frozen=True)
class Holding:
    """How vectors are held.

    Attributes:
        normalize: L2-normalise them first.
        hold: see `settings.Cluster`.
        precision: of the product, `auto`, `bf16` or `fp32`.
        budget_bytes: that an actor on a CPU may take, 0 if not known; on a GPU it looks itself.
    """

    normalize: bool = False
    hold: Literal["auto", "float32", "float16", "none"] = "auto"
    precision: str = "auto"
    budget_bytes: float = 0.0


class VectorActor:
    """An actor: its share of the column, in memory or read anew, part by part, for each answer."""

    def __init__(
        self, source: VectorColumn, row_groups: Sequence[RowGroup], holding: Holding, device: str, threads: int
    ) -> None:
        self._source, self._row_groups, self._holding, self._device = source, list(row_groups), holding, device
        self._threads, self._precision, self._loaded = threads, "", False
        self._held: tuple[list[pa.Table], Any] | None = None

    def _load(self) -> None:
        """Before the first answer, not in the constructor: of an error there Ray hands on the text alone."""
        if self._loaded:
            return
        import torch

        torch.set_num_threads(self._threads)
        free = torch.cuda.mem_get_info()[0] if self._device == "cuda" else self._holding.budget_bytes
        self._held = self._part(self._read(self._row_groups)) if self._fits(free * SHARE) else None
        if self._held is None:
            self._part(self._read(chunked(self._row_groups, PART_ROWS)[0]))  # the precision, and the first bad rows
        self._loaded = True

    def facts(self) -> dict[str, Any]:
        self._load()
        return {"precision": self._precision, "held": self._held is not None}

    def assign(self, centroids: np.ndarray) -> Assigned:
        return combine(shard.assign(centroids) for _, shard in self._parts())

    def assign_row_groups(self, row_groups: Sequence[RowGroup], centroids: np.ndarray) -> Assigned:
        """As `assign`, of any row groups of the column, which are read anew."""
        self._load()
        return combine(self._part(self._read(part))[1].assign(centroids) for part in chunked(row_groups, PART_ROWS))

    def draw(self, n: int, random_state: int, centroids: np.ndarray | None) -> Draw:
        draws, start = [], 0
        for _, shard in self._parts():
            candidates = shard.draw(n, random_state, centroids)
            draws.append(Draw(candidates.priorities, candidates.keys, candidates.rows + start))
            start += shard.n_samples
        return merged(draws, n)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Vectors (m, d) float32 of the rows (m,) int64 of this share."""
        x = np.empty((len(rows), self._source.n_features), np.float32)
        start = 0
        for _, shard in self._parts() if len(rows) else ():
            in_shard = (rows >= start) & (rows < start + shard.n_samples)
            x[in_shard] = shard.rows(rows[in_shard] - start)
            start += shard.n_samples
        return x

    def finish(self, centroids: np.ndarray, write: Write, rows_per_file: int) -> list[Any]:
        """`write(ids, labels, squared distances, first row)` for neighbouring row groups of a file; distances are exact."""
        nearest, results = self._nearest(centroids), []
        for file in chunked(self._row_groups, rows_per_file):
            ids, labels, squares = zip(*itertools.islice(nearest, len(file)), strict=True)
            results.append(
                write(pa.concat_tables(ids), np.concatenate(labels), np.concatenate(squares), file[0].first_row)
            )
        return results

    def _nearest(self, centroids: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
        """Identities, labels and squared distances of each row group."""
        for tables, shard in self._parts():
            labels, squares = shard.nearest(centroids)
            edges = np.cumsum([len(ids) for ids in tables])[:-1]
            yield from zip(tables, np.split(labels, edges), np.split(squares, edges), strict=True)

    def _fits(self, budget_bytes: float) -> bool:
        hold, rows = self._holding.hold, sum(row_group.rows for row_group in self._row_groups)
        value_bytes = 2 if hold == "float16" else 6  # float32 and a copy in bf16
        needed = rows * (value_bytes * self._source.n_features + 12)
        if hold == "none" or not budget_bytes or needed <= budget_bytes:
            return hold != "none"
        if hold == "auto":
            return False
        raise RunError(
            f"{self._source.name}: {rows} vectors of {self._source.n_features} take {needed / 2**30:.1f} GiB as {hold} on "
            f"{self._device}, where {budget_bytes / 2**30:.1f} GiB are free for them; set `hold: auto` or `none` to read them "
            "again at each iteration, `mini_batch`, or take more nodes"
        )

    def _parts(self) -> Iterator[tuple[list[pa.Table], Any]]:
        """Identities of each row group and the `VectorPartition`, part by part; the next is read while one is at work."""
        self._load()
        if self._held is not None:
            yield self._held
            return
        with ThreadPoolExecutor(1) as ahead:
            parts = chunked(self._row_groups, PART_ROWS)
            coming = ahead.submit(self._read, parts[0])
            for following in [*parts[1:], None]:
                part = coming.result()
                if following:
                    coming = ahead.submit(self._read, following)
                yield self._part(part)

    def _read(self, row_groups: Sequence[RowGroup]) -> tuple[list[pa.Table], np.ndarray]:
        source, tables = self._source, list[pa.Table]()
        dtype = np.float16 if self._holding.hold == "float16" else np.float32
        x = np.empty((sum(row_group.rows for row_group in row_groups), source.n_features), dtype)
        start = 0
        for row_group in row_groups:
            ids, values = read_vectors(source, row_group)
            with np.errstate(over="ignore"):  # what becomes infinite is refused
                x[start : start + len(ids)] = l2_normalize(values) if self._holding.normalize else values
            tables.append(ids)
            start += len(ids)
        return tables, x

    def _part(self, read: tuple[list[pa.Table], np.ndarray]) -> tuple[list[pa.Table], Any]:
        from clipray.analysis.vector_partition import LONGEST, VectorPartition

        tables, x = read
        source, key = self._source, self._source.ids[-1]
        keys = [hash_strings(ids[key], SEED) for ids in tables]
        precision: Any = self._holding.precision
        try:
            shard = VectorPartition(x, np.concatenate(keys), precision=precision, device=self._device)
        except DataError as error:
            lengths = np.linalg.norm(x.astype(np.float64), axis=1)
            bad = np.flatnonzero(~(lengths <= LONGEST))[:5].tolist()
            names = pa.concat_tables(tables)[key].take(pa.array(bad, pa.int64())).to_pylist()
            which = f", {key}: {', '.join(map(repr, names))}; repair or drop these rows" if names else ""
            raise SchemaError(f"{source.name}: {error}{which}") from error
        self._precision = min(self._precision or shard.precision, shard.precision)
        return tables, shard


class VectorActorPool:
    """`Batches` of a cluster: each method asks all actors and combines what they say."""

    def __init__(self, source: VectorColumn, actors: list[Any]) -> None:
        self.n_samples, self.n_features = source.n_samples, source.n_features
        self._actors, self._row_groups = actors, source.row_groups
        self._combine: Any = ray.remote(num_cpus=0)(lambda *states: combine(states))

    def assign(self, centroids: np.ndarray) -> Assigned:
        sent = ray.put(centroids)
        return self._together([actor.assign.remote(sent) for actor in self._actors], centroids.size)

    def batches(self, rows: int, random_state: int) -> list[list[RowGroup]]:
        """Row groups in random order, put together until there are about `rows`."""
        order = np.random.default_rng(random_state).permutation(len(self._row_groups))
        return chunked([self._row_groups[n] for n in order], rows)

    def assign_batch(self, batch: list[RowGroup], centroids: np.ndarray) -> Assigned:
        sent, count = ray.put(centroids), min(len(batch), len(self._actors))
        states = [self._actors[n].assign_row_groups.remote(batch[n::count], sent) for n in range(count)]
        return self._together(states, centroids.size)

    def _together(self, states: list[Any], values: int) -> Assigned:
        """The combined state; large ones meet in pairs, on the workers."""
        while len(states) > 2 and 8 * values > TREE_BYTES:
            pairs = [states[n : n + 2] for n in range(0, len(states), 2)]
            states = [self._combine.remote(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return combine(answers_of(states))

    def sample(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> np.ndarray:
        sent = ray.put(centroids)
        draws = answers_of([actor.draw.remote(n, random_state, sent) for actor in self._actors])
        rows, order = choose(draws, n)
        parts = answers_of([actor.rows.remote(numbers) for actor, numbers in zip(self._actors, rows, strict=True)])
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[order]

    def facts(self) -> dict[str, Any]:
        """`precision` of the product where it is the coarsest; `held`: whether all vectors are in memory."""
        facts = answers_of([actor.facts.remote() for actor in self._actors])
        return {"precision": min(f["precision"] for f in facts), "held": all(f["held"] for f in facts)}

    def finish(self, centroids: np.ndarray, write: Write, rows_per_file: int) -> list[Any]:
        """What `write` made of the rows of each file, in their order. See `VectorActor.finish`."""
        sent = ray.put(centroids)
        parts = answers_of([actor.finish.remote(sent, write, rows_per_file) for actor in self._actors])
        return [result for part in parts for result in part]


@contextmanager
def held(
    source: VectorColumn, cluster: ClusterResources, holding: Holding, actors: int | str
) -> Iterator[VectorActorPool]:
    """The column in the memory of actors: one per GPU, or one per 8 CPUs of each node; they end with the block."""
    on_gpu = cluster.gpus >= 1
    each_node = max(1, round(cluster.cpus / cluster.nodes / CORES_PER_CPU_ACTOR))
    fit = int(cluster.gpus) if on_gpu else cluster.nodes * each_node
    count = min(fit if actors == "auto" else int(actors), len(source.row_groups))
    threads = max(1, int(cluster.cpus / max(count, cluster.nodes)))
    holding = replace(holding, budget_bytes=cluster.memory_bytes / count)
    actor_class: Any = ray.remote(
        num_cpus=min(0.5, max(1.0, cluster.cpus) / 2 / count), num_gpus=1 if on_gpu else 0, max_restarts=3, max_task_retries=3,
        scheduling_strategy="SPREAD",
    )(VectorActor)  # fmt: skip
    workers = [
        actor_class.remote(source, row_groups, holding, "cuda" if on_gpu else "cpu", threads)
        for row_groups in _shares(source.row_groups, count)
    ]
    try:
        yield VectorActorPool(source, workers)
    finally:
        for worker in workers:
            ray.kill(worker)


def _shares(row_groups: Sequence[RowGroup], count: int) -> list[list[RowGroup]]:
    """Neighbouring row groups in `count` parts of about as many rows, none empty."""
    total = sum(row_group.rows for row_group in row_groups)
    parts: list[list[RowGroup]] = [[] for _ in range(count)]
    for n, row_group in enumerate(row_groups):
        wanted = min(count - 1, row_group.first_row * count // max(1, total))
        parts[max(wanted, count - (len(row_groups) - n))].append(row_group)
    return [part for part in parts if part]
