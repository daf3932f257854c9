"""Building a FAISS index on a cluster: a sample trains it, tasks fill parts of it, one actor puts them together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from clipray.analysis import vector_index as vi
from clipray.analysis.lengths import unit
from clipray.engine.nodes import Cluster
from clipray.engine.shards import SALT, answers
from clipray.scan import hash_strings
from clipray.storage import Folder
from clipray.vectors import Piece, Vectors, read_finite

AHEAD = 2  # parts under way for each CPU
QUERIES = 1_000  # held out to measure recall
Write = Callable[[pa.Table, int], Any]


@dataclass(frozen=True)
class Part:
    """Neighbouring row groups; their vectors have the ids `first_id`, `first_id` + 1, … `new`: not in the index yet."""

    pieces: list[Piece]
    first_id: int
    new: bool = True


@dataclass(frozen=True)
class Order:
    """What to build.

    Attributes:
        kind: factory string. parts: of all rows; tasks fill those that are new.
        grown_from: file of an index in the folder, to which the new parts are added.
        on_disk: lists are merged on disk, beside the index.
    """

    source: Vectors
    kind: str
    metric: str
    recall: float
    random_state: int
    parts: list[Part]
    folder: Folder
    name: str
    grown_from: str | None = None
    on_disk: bool = False


def build(
    order: Order, write: Write, cluster: Cluster, tick: Callable[[int], None]
) -> tuple[dict[str, Any], list[Any]]:
    """Build `order.name` in `order.folder`.

    Returns:
        Figures of the index, and what `write(ids, first id)` made of each new part's identities, in their order.

    Raises:
        SchemaError: vectors that are not finite. JobError: too few rows for the type. RunError: workers died.
    """
    rows, width = order.source.n_samples, order.source.n_features
    wanted = 0 if order.grown_from else vi.training_rows(vi.empty_index(order.kind, width, order.metric), rows)
    share = min(1.0, 1.2 * max(wanted, 2 * QUERIES) / rows)
    threads = max(1, int(cluster.cpus / cluster.nodes))
    draw: Any = ray.remote(num_cpus=1, max_retries=3)(_drawn)
    # In a process of its own, which ends with it: what training needs is not there when the lists are merged.
    train: Any = ray.remote(num_cpus=0, max_retries=3, max_calls=1, num_returns=3)(_trained)
    holder: Any = ray.remote(num_cpus=0)(_Builder)
    sent = ray.put(order)  # once: it names every part
    builder = holder.remote(sent, threads)
    try:
        samples = [draw.remote(sent, part, share) for part in order.parts]
        index, trained_on, queries = train.remote(sent, wanted, threads, *samples)
        del samples
        trained = builder.begin.remote(index, trained_on, queries)
        answers([trained])
        made = _fill(order.parts, builder, (sent, trained, queries), write, cluster, tick)
        (figures,) = answers([builder.finish.remote([truth for _, truth in made])])
        return figures, [written for written, _ in made if written is not None]
    finally:
        ray.kill(builder)


def _fill(
    parts: Sequence[Part], builder: Any, given: tuple[Any, Any, Any], write: Write, cluster: Cluster,
    tick: Callable[[int], None],
) -> list[Any]:  # fmt: skip
    """What `_filled` made of each part beside the index, whose parts the builder merges in order; a bounded number under way."""
    task: Any = ray.remote(num_cpus=1, max_retries=3, num_returns=2)(_filled)
    merging: deque[Any] = deque()
    results = []
    for n, part in enumerate(parts):
        filled, rest = task.remote(part, *given, write)
        results.append(rest)
        merging.append(builder.merge.remote(filled, n))
        del filled
        if len(merging) >= max(2, AHEAD * cluster.cpus):
            answers([merging.popleft()])
            tick(sum(map(_rows, parts[: n + 1 - len(merging)])))
    answers(list(merging))
    return answers(results)


def _rows(part: Part) -> int:
    return sum(piece.rows for piece in part.pieces)


def _vectors(order: Order, piece: Piece) -> tuple[pa.Table, np.ndarray]:
    ids, x = read_finite(order.source, piece)
    return ids, unit(x) if order.metric == "cosine" else np.ascontiguousarray(x, np.float32)


def _drawn(order: Order, part: Part, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (m,) uint64, ids (m,) and vectors (m, d) of about `share` of the rows, chosen by the hash of their identities."""
    keys, rows, vectors, start = [], [], [], part.first_id
    for piece in part.pieces:
        ids, x = _vectors(order, piece)
        key = hash_strings(ids[order.source.ids[-1]], SALT)
        key ^= np.uint64(order.random_state * 0x9E3779B97F4A7C15 % 2**64)
        chosen = np.flatnonzero(key <= np.uint64(min(share, 1 - 2**-53) * 2**64))
        keys.append(key[chosen])
        rows.append(start + chosen)
        start += piece.rows
        vectors.append(x[chosen])
    return np.concatenate(keys), np.concatenate(rows), np.concatenate(vectors)


def _trained(
    order: Order, wanted: int, threads: int, *samples: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, int, tuple[np.ndarray, np.ndarray]]:
    """The empty index as bytes, how many rows it was trained on, and vectors and numbers of rows that count as held out."""
    import faiss
    import torch

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    rows, x = _lowest(samples, max(wanted, QUERIES))
    index, sample = vi.empty_index(order.kind, order.source.n_features, order.metric), x[:wanted]
    if wanted:
        vi.train(index, sample, order.random_state)
    return faiss.serialize_index(index), len(sample), (x[:QUERIES], rows[:QUERIES])


def _filled(
    part: Part, order: Order, trained: np.ndarray, queries: tuple[np.ndarray, np.ndarray], write: Write
) -> tuple[np.ndarray | None, tuple[Any, tuple[np.ndarray, np.ndarray]]]:
    """The part of the index as bytes, or its vectors where parts cannot be merged; and what else is made of the rows."""
    import faiss
    import torch

    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    read = [_vectors(order, piece) for piece in part.pieces]
    x = np.concatenate([vectors for _, vectors in read])
    truth = vi.nearest_exactly(queries[0], x, order.metric, part.first_id, max(vi.TOPS) + 1)
    if not part.new:
        return None, (None, truth)
    written = write(pa.concat_tables([ids for ids, _ in read]), part.first_id)
    index = faiss.deserialize_index(trained)
    if not vi.mergeable(index):
        return x, (written, truth)
    vi.fill(index, x, part.first_id)
    filled = faiss.serialize_index(index)
    del index, x, read
    _give_back()
    return filled, (written, truth)


def _give_back() -> None:
    """Freed memory goes back to the system: allocators keep it, and a process that waits would hold it for nothing."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # there in glibc
        ctypes.CDLL(None).malloc_trim(0)


class _Builder:
    """An actor that holds the index."""

    def __init__(self, order: Order, threads: int) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._order, self._faiss = order, faiss
        self._aside = _aside(order.folder)
        self._parts: list[Path] = []
        self._sizes: Any = None
        self._index: Any = None
        self._trained_on = 0

    def begin(self, trained: np.ndarray, trained_on: int, queries: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The empty index that parts are filled in, as bytes: `trained`, or of the kind that is extended."""
        self._trained_on, self._queries = trained_on, queries
        if self._order.grown_from is None:
            self._index = self._faiss.deserialize_index(trained)
            return trained
        self._index = self._faiss.read_index(_local(self._order.folder, self._order.grown_from, self._aside))
        empty = self._faiss.clone_index(self._index)
        empty.reset()
        return self._faiss.serialize_index(empty)

    def merge(self, part: np.ndarray | None, number: int) -> None:
        """Parts come in the order of their rows."""
        if part is None:
            return
        if not vi.mergeable(self._index):
            vi.fill(self._index, part, self._index.ntotal)
        elif (sizes := vi.list_sizes(self._index)) is None:
            self._index.merge_from(self._faiss.deserialize_index(part), 0)
        else:
            self._sizes = (sizes if self._sizes is None else self._sizes) + vi.list_sizes(
                self._faiss.deserialize_index(part)
            )
            self._parts.append(self._aside / f"{number:06d}.faiss")
            self._parts[-1].write_bytes(part.data)

    def _merge_lists(self) -> None:
        """Of the parts, which wait on disk until it is known how long each list becomes: lists that grow take twice the room."""
        if self._order.on_disk:
            from faiss.contrib.ondisk import merge_ondisk

            merge_ondisk(self._index, list(map(str, self._parts)), str(self._aside / f"{self._order.name}.lists"))
            return
        vi.reserve(self._index, self._sizes)
        for part in self._parts:
            self._index.merge_from(self._faiss.read_index(str(part)), 0)
            part.unlink()

    def finish(self, truths: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Tune, write the file, and say what is in it."""
        order, queries = self._order, self._queries
        name = order.name
        if self._parts:
            self._merge_lists()
        figures: dict[str, Any] = {"type": order.kind, "vectors": int(self._index.ntotal)}
        best = vi.best_of(truths, order.metric, max(vi.TOPS) + 1)[1]
        if best.shape[1] > 1:
            truth = vi.without(best, queries[1], best.shape[1] - 1)
            tuned = vi.tune(self._index, queries[0], queries[1], truth, order.recall)
            figures |= {f"recall@{k}": round(share, 4) for k, share in tuned.recall.items()}
            figures |= {"parameter": tuned.parameter, "value": tuned.value, "query_ms": round(tuned.query_ms, 3)}
            figures["held_out"] = len(truth)
        if order.grown_from is None:
            figures["trained_on"] = self._trained_on
        path = self._aside / name
        self._faiss.write_index(self._index, str(path))
        files = [path, *self._aside.glob(f"{name}.lists")]
        figures["files"] = {file.name: file.stat().st_size for file in files}
        for file in files:
            _publish(file, order.folder)
        shutil.rmtree(self._aside)
        return figures


def _lowest(samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and vectors of the `count` rows with the lowest keys."""
    keys, rows, vectors = (np.concatenate(column) for column in zip(*samples, strict=True))
    best = np.lexsort((rows, keys))[:count]
    return rows[best], vectors[best]


def _local(folder: Folder, name: str, aside: Path) -> str:
    if folder.local:
        return folder.path(name)
    folder.fs.get_file(folder.path(name), str(aside / name))
    return str(aside / name)


def _aside(folder: Folder) -> Path:
    """An empty folder for files that are not finished: on a local disk within `folder`, where a killed build's is found again."""
    if not folder.local:
        return Path(tempfile.mkdtemp(prefix="clipray-index-"))
    aside = Path(folder.path("_building"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _publish(file: Path, folder: Folder) -> None:
    """Move a finished file into the folder, where it is seen whole or not at all."""
    if folder.local:
        os.replace(file, folder.path(file.name))
    else:
        folder.fs.put_file(str(file), folder.path(file.name))
