"""Vectors held by Ray actors, as K-means wants them: `analysis.kmeans.Vectors` over a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipray.analysis.kmeans import Assigned, combine
from clipray.analysis.sampling import choose
from clipray.engine.connect import Cluster
from clipray.engine.plan import CORES_PER_CPU_ACTOR
from clipray.errors import ClipRayError, RunError, SchemaError
from clipray.scan import hash_strings
from clipray.vectors import Piece, Vectors, groups, read_piece, unit

Write = Callable[[pa.Table, np.ndarray, np.ndarray, int], Any]
TREE_BYTES = 64 * 2**20  # states larger than this meet in pairs, on the workers
SALT = "clipray-vectors0"  # of the keys by which samples are drawn


@dataclass(frozen=True)
class Holding:
    """How vectors are held.

    Attributes:
        normalize: L2-normalise them first. half: in float16. precision: of the product, `auto`, `bf16` or `fp32`.
    """

    normalize: bool = False
    half: bool = False
    precision: str = "auto"


class _Holder:
    """An actor: some pieces of the column in memory."""

    def __init__(self, source: Vectors, pieces: Sequence[Piece], holding: Holding, device: str, threads: int) -> None:
        import torch

        from clipray.analysis.assignment import Shard

        torch.set_num_threads(threads)
        self._source, self._pieces, self._ids = source, pieces, list[pa.Table]()
        kind = np.float16 if holding.half else np.float32
        x = np.empty((sum(piece.rows for piece in pieces), source.n_features), kind)
        start = 0
        for piece in pieces:
            ids, values = read_piece(source, piece)
            x[start : start + len(ids)] = unit(values) if holding.normalize else values
            self._ids.append(ids)
            start += len(ids)
        keys = [hash_strings(ids[source.ids[-1]], SALT) for ids in self._ids]
        try:
            self._shard = Shard(x, np.concatenate(keys), precision=holding.precision, device=device)  # type: ignore[arg-type]
        except SchemaError as error:
            bad = np.flatnonzero(~np.isfinite(x).all(axis=1))[:5].tolist()
            names = pa.concat_tables(self._ids)[source.ids[-1]].take(pa.array(bad, pa.int64())).to_pylist()
            which = f", {source.ids[-1]}: {', '.join(map(repr, names))}; mend or drop these rows" if names else ""
            raise SchemaError(f"{source.name}: {error}{which}") from error

    def precision(self) -> str:
        return self._shard.precision

    def assign(self, centroids: np.ndarray) -> Assigned:
        return self._shard.assign(centroids)

    def draw(self, n: int, random_state: int, centroids: np.ndarray | None) -> Any:
        return self._shard.draw(n, random_state, centroids)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self._shard.rows(rows)

    def finish(self, centroids: np.ndarray, write: Write, rows_per_file: int) -> list[Any]:
        """`write(ids, labels, squared distances, first row)` for neighbouring pieces of a file; distances are exact."""
        labels, distances = self._shard.nearest(centroids)
        made, start, piece = [], 0, 0
        for group in groups(self._pieces, rows_per_file):
            ids = pa.concat_tables(self._ids[piece : piece + len(group)])
            rows = slice(start, start + len(ids))
            made.append(write(ids, labels[rows], distances[rows], group[0].first_row))
            start, piece = start + len(ids), piece + len(group)
        return made


class HeldVectors:
    """`analysis.kmeans.Vectors` of a cluster: each method asks all actors and combines what they say."""

    def __init__(self, source: Vectors, actors: list[Any]) -> None:
        self.n_samples, self.n_features = source.n_samples, source.n_features
        self._actors = actors
        self._combine: Any = ray.remote(num_cpus=0)(_combined)

    def assign(self, centroids: np.ndarray) -> Assigned:
        sent = ray.put(centroids)
        states = [actor.assign.remote(sent) for actor in self._actors]
        if 8 * centroids.size > TREE_BYTES:
            while len(states) > 2:
                states = [
                    self._combine.remote(*states[n : n + 2]) if n + 1 < len(states) else states[n]
                    for n in range(0, len(states), 2)
                ]
        return combine(_get(states))

    def sample(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> np.ndarray:
        sent = ray.put(centroids)
        draws = _get([actor.draw.remote(n, random_state, sent) for actor in self._actors])
        rows, order = choose(draws, n)
        return np.concatenate(_get([a.rows.remote(r) for a, r in zip(self._actors, rows, strict=True)]))[order]

    def precision(self) -> str:
        """Of the product, where it is the coarsest."""
        return min(_get([actor.precision.remote() for actor in self._actors]))

    def finish(self, centroids: np.ndarray, write: Write, rows_per_file: int) -> list[Any]:
        """What `write` made of the rows of each file, in their order. See `_Holder.finish`."""
        sent = ray.put(centroids)
        parts = _get([actor.finish.remote(sent, write, rows_per_file) for actor in self._actors])
        return [made for part in parts for made in part]


def _combined(*states: Assigned) -> Assigned:
    return combine(states)


def _get(refs: list[Any]) -> list[Any]:
    """Results of actors; their own errors come as they are, those of Ray as `RunError`."""
    try:
        return list(ray.get(refs))
    except ray.exceptions.RayTaskError as error:
        cause: Any = error.cause
        if isinstance(cause, ClipRayError):
            raise cause from error
        raise RunError(f"a worker failed: {' '.join(str(cause or error).split())[-600:]}") from error
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        while getattr(cause, "cause", None) is not None:
            cause = cause.cause
        if isinstance(cause, ClipRayError):
            raise cause from error
        raise RunError(f"workers failed and the run could not go on: {' '.join(str(error).split())[-600:]}") from error


@contextmanager
def held(source: Vectors, cluster: Cluster, holding: Holding, actors: int | str) -> Iterator[HeldVectors]:
    """The column in the memory of actors: one per GPU, or one per 8 CPUs of each node; they end with the block."""
    on_gpu = cluster.gpus >= 1
    fit = (
        int(cluster.gpus)
        if on_gpu
        else cluster.nodes * max(1, round(cluster.cpus / cluster.nodes / CORES_PER_CPU_ACTOR))
    )
    count = min(fit if actors == "auto" else int(actors), len(source.pieces))
    threads = max(1, int(cluster.cpus / max(count, cluster.nodes)))
    kind: Any = ray.remote(
        num_cpus=min(0.5, cluster.cpus / 2 / count), num_gpus=1 if on_gpu else 0, max_restarts=3, max_task_retries=3,
        scheduling_strategy="SPREAD",
    )(_Holder)  # fmt: skip
    workers = [
        kind.remote(source, pieces, holding, "cuda" if on_gpu else "cpu", threads)
        for pieces in _shares(source.pieces, count)
    ]
    try:
        yield HeldVectors(source, workers)
    finally:
        for worker in workers:
            ray.kill(worker)


def _shares(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """Neighbouring pieces in `count` parts of about as many rows, none empty."""
    total = sum(piece.rows for piece in pieces)
    parts: list[list[Piece]] = [[] for _ in range(count)]
    for n, piece in enumerate(pieces):
        wanted = min(count - 1, piece.first_row * count // max(1, total))
        parts[max(wanted, count - (len(pieces) - n))].append(piece)
    return [part for part in parts if part]
