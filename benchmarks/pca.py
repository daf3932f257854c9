"""clipray's PCA against scikit-learn's `PCA(svd_solver="covariance_eigh")`, side by side on the same vectors.

    python benchmarks/pca.py [--rows 100000 500000] [--columns 512 768] [--components 100] [--repetitions 5]

Both have the same threads: scikit-learn as threads of BLAS; clipray as that many shards side by side, each in a thread
with a BLAS of one thread, as its tasks have on a cluster. Of each figure the median of the repetitions and the range.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from clipray.analysis.moments import Moments, combine, empty, moments
from clipray.analysis.pca import Projection, fit

BLOCK_ROWS = 16_384  # a row group of our tables


def make_vectors(rows: int, columns: int, dtype: str, seed: int = 0) -> np.ndarray:
    """(rows, columns): 64 directions of falling size, noise and a mean, of unit length, as CLIP vectors are."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(64, columns)) * np.geomspace(1, 0.1, 64)[:, None]
    mean = 2 * random.normal(size=columns)
    x = np.empty((rows, columns), dtype)
    for block in blocks(x):
        block_x = random.standard_normal((len(block), 64), np.float32) @ directions.astype(np.float32)
        block_x += mean + 0.3 * random.standard_normal(block.shape, np.float32)
        block[:] = block_x / np.linalg.norm(block_x, axis=1, keepdims=True)
    return x


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[start : start + BLOCK_ROWS] for start in range(0, len(x), BLOCK_ROWS))


def shard_moments(shard: list[np.ndarray]) -> Moments:
    return reduce(combine, map(moments, shard))


def clipray_fit(x: np.ndarray, components: int, threads: int) -> Projection:
    parts = list(blocks(x))
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        states = pool.map(shard_moments, [part for i in range(threads) if (part := parts[i::threads])])
        state = reduce(combine, states, empty(x.shape[1]))
    return fit(state, n_components=components)


def clipray_transform(projection: Projection, x: np.ndarray, threads: int) -> np.ndarray:
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(projection.transform, blocks(x))))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def side_by_side(x: np.ndarray, components: int, repetitions: int, threads: int) -> None:
    """Each repetition does both, in turns first, so that another's load on the machine meets both."""
    seconds: dict[str, list[float]] = {name: [] for name in ("fit", "transform", "fit (sk)", "transform (sk)")}
    for repetition in range(1 + repetitions):
        for ours in (True, False) if repetition % 2 else (False, True):
            if ours:
                projection, fit_s = timed(lambda: clipray_fit(x, components, threads))
                z, transform_s = timed(lambda: clipray_transform(projection, x, threads))
            else:
                with threadpool_limits(threads, "blas"):
                    pca, fit_s = timed(lambda: PCA(components, svd_solver="covariance_eigh").fit(x))
                    z_sk, transform_s = timed(lambda: pca.transform(x))
            if repetition:  # the first one warms up
                seconds["fit" if ours else "fit (sk)"].append(fit_s)
                seconds["transform" if ours else "transform (sk)"].append(transform_s)
    off = np.abs(projection.variance / pca.explained_variance_ - 1).max()
    cosine = np.abs((z * z_sk).sum(0) / np.linalg.norm(z, axis=0) / np.linalg.norm(z_sk, axis=0)).min()
    print(f"{len(x):,} x {x.shape[1]} {x.dtype} -> {components}: variances differ by {off:.1e}, cosine {cosine:.6f}")
    for stage in ("fit", "transform", "both"):
        ours_s, theirs_s = (stage_seconds(seconds, stage, suffix) for suffix in ("", " (sk)"))
        print(f"  {stage:9} clipray {spread(ours_s)} s, scikit-learn {spread(theirs_s)} s; "
              f"scikit-learn / clipray {spread(theirs_s / ours_s)}")  # fmt: skip


def stage_seconds(seconds: dict[str, list[float]], stage: str, suffix: str) -> np.ndarray:
    names = ("fit", "transform") if stage == "both" else (stage,)
    return np.sum([seconds[name + suffix] for name in names], axis=0)


def spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 500_000])
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 768], help="one for each of --rows, or one")
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    options = parser.parse_args()
    columns = options.columns * len(options.rows) if len(options.columns) == 1 else options.columns
    if len(columns) != len(options.rows):
        parser.error(f"--rows has {len(options.rows)} values, --columns {len(columns)}")
    for n, d in zip(options.rows, columns):
        side_by_side(make_vectors(n, d, options.dtype), options.components, options.repetitions, options.threads)


if __name__ == "__main__":
    main()
