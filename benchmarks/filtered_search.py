"""Search among some rows of an index: recall and time for each share of the rows that a filter keeps.

    python benchmarks/filtered_search.py [--rows 1000000] [--columns 256] [--keep FOLDER]

Clustered random vectors of unit length, cosine. A filter keeps rows at random, or those farthest on one side of the space
while the queries lie on the other, where neither lists nor edges near a query lead to a row that is kept. Each query is
searched alone; the reference compares it with the vectors of all rows that are kept. PQ misses what its codes miss: so
its first line, of an unfiltered search, is the measure.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import faiss
import numpy as np
from index import clustered

from clipray.analysis import vector_index as vi
from clipray.analysis.filtered_search import search_among
from clipray.analysis.recall import nearest_exactly

TYPES = {"Flat": 0, "IVF4096,Flat": 16, "HNSW32": 64, "OPQ64_256,IVF4096,PQ64": 16}
"""With the `nprobe` or `efSearch` of an unfiltered search."""
SHARES = (0.5, 0.1, 0.01, 0.001, 0.00001)
TOP, QUERIES = 10, 50


def build(index_type: str, x: np.ndarray, keep: Path | None) -> faiss.Index:
    """Built, or as an earlier run kept it: lists memory-mapped, as `clipray search` opens them."""
    path = keep / f"{index_type}-{len(x)}x{x.shape[1]}.faiss" if keep else None
    if path and path.exists():
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if "IVF" in index_type else 0)
    index = vi.empty_index(index_type, x.shape[1], "cosine")
    wanted = vi.training_rows(index, len(x))
    if wanted:
        vi.train(index, x[:: max(1, len(x) // min(wanted, 131_072))].copy(), 0)
    for start in range(0, len(x), 65_536):
        vi.fill(index, x[start : start + 65_536], start)
    if path:
        faiss.write_index(index, str(path))
        return build(index_type, x, keep)
    return index


def masks(x: np.ndarray, share: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Filters by name, each with queries."""
    rng = np.random.default_rng(3)
    side = x @ rng.normal(size=x.shape[1]).astype(np.float32)
    order = np.argsort(side)
    few, far = np.zeros(len(x), bool), np.zeros(len(x), bool)
    few[rng.choice(len(x), max(1, int(share * len(x))), replace=False)] = True
    far[order[-max(1, int(share * len(x))) :]] = True
    noise = 0.03 * rng.standard_normal((QUERIES, x.shape[1]), np.float32)
    anywhere, opposite = x[rng.integers(len(x), size=QUERIES)] + noise, x[order[:QUERIES]] + noise
    return {"at random": (few, _unit(anywhere)), "far away": (far, _unit(opposite))}


def _unit(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def recall(numbers: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact answers (q, t) that are among `numbers` (q, t)."""
    return float(
        np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(numbers.tolist(), exact.tolist(), strict=True)])
    )


def measured(index: faiss.Index, queries: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (q, t); milliseconds and milliseconds of processor time (q, 2) of each query."""
    numbers, times = [], []
    for query in queries:
        start, cpu = time.perf_counter(), time.process_time()
        answer = index.search(query[None], TOP) if mask is None else search_among(index, query[None], TOP, mask)
        times.append((time.perf_counter() - start, time.process_time() - cpu))
        numbers.append(answer[1][0])
    return np.array(numbers), 1_000 * np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="Keep the indexes in this folder.")
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=TYPES)
    options = parser.parse_args()
    x = clustered(options.rows, options.columns)
    for index_type in options.types:
        index = build(index_type, x, options.keep)
        vi.without_prefetch(index)
        vi.set_effort(index, vi.effort_of(index), TYPES[index_type])
        everything = np.arange(len(x))
        for share in (1.0, *SHARES):
            for name, (mask, queries) in masks(x, share).items():
                rows = everything if share == 1 else np.flatnonzero(mask)
                exact = nearest_exactly(queries, x[rows], "cosine", rows, TOP).numbers
                numbers, times = measured(index, queries, None if share == 1 else mask)
                ms, cpu_ms = times.T
                print(
                    f"{index_type}, {share:.3%} {name}: recall@{TOP} {recall(numbers, exact):.3f}, median {np.median(ms):.1f} "
                    f"ms, of processor time {np.median(cpu_ms):.1f}, the slowest {ms.max():.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
