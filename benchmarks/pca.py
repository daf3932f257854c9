"""clipray's PCA against scikit-learn's `PCA(svd_solver="covariance_eigh")`, side by side on the same vectors.

    python benchmarks/pca.py [--rows 100000 500000] [--columns 512 768] [--components 100] [--repetitions 5]

Both have the same threads: scikit-learn as threads of BLAS; clipray as that many shards side by side, each in a thread
with a BLAS of one thread, as its tasks have on a cluster. Of each figure the median of the repetitions and the range.
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import numpy as np
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from clipray.analysis.moments import Moments, combine, empty, moments
from clipray.analysis.pca import Projection, fit

BLOCK_ROWS = 16_384  # a row group of our tables


def make_vectors(rows: int, columns: int, dtype: str, seed: int = 0) -> np.ndarray:
    """(rows, columns): 200 directions of falling size, noise and a mean, of unit length, as CLIP vectors are."""
    random = np.random.default_rng(seed)
    directions = (random.normal(size=(200, columns)) * np.geomspace(1, 0.05, 200)[:, None]).astype(np.float32)
    mean = (5 * random.normal(size=columns)).astype(np.float32)
    x = np.empty((rows, columns), dtype)
    for block in blocks(x):
        block_x = random.standard_normal((len(block), 200), np.float32) @ directions
        block_x += mean + np.float32(0.1) * random.standard_normal(block.shape, np.float32)
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
        return fit(reduce(combine, states, empty(x.shape[1])), n_components=components)


def clipray_transform(projection: Projection, x: np.ndarray, threads: int) -> list[np.ndarray]:
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(projection.transform, blocks(x)))


def run_clipray(x: np.ndarray, components: int, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of fit and of transform, variances, the transformed vectors."""
    start = time.perf_counter()
    projection = clipray_fit(x, components, threads)
    fitted = time.perf_counter()
    z = clipray_transform(projection, x, threads)
    return np.array([fitted - start, time.perf_counter() - fitted]), projection.variance, np.concatenate(z)


def run_sklearn(x: np.ndarray, components: int, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with threadpool_limits(threads, "blas"):
        start = time.perf_counter()
        pca = PCA(components, svd_solver="covariance_eigh").fit(x)
        fitted = time.perf_counter()
        z = pca.transform(x)
        return np.array([fitted - start, time.perf_counter() - fitted]), pca.explained_variance_, z


def side_by_side(x: np.ndarray, components: int, repetitions: int, threads: int) -> None:
    """Each repetition does both, by turns first, so that other load on the machine meets both."""
    sides = {"clipray": run_clipray, "sklearn": run_sklearn}
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for repetition in range(1 + repetitions):  # the first one warms up
        results = {}
        for name in sorted(sides, reverse=repetition % 2 == 1):
            results[name] = sides[name](x, components, threads)
            seconds[name] += [results[name][0]] if repetition else []
    (_, ours, z), (_, theirs, z_theirs) = results["clipray"], results["sklearn"]
    cosine = np.abs((z * z_theirs).sum(0) / np.linalg.norm(z, axis=0) / np.linalg.norm(z_theirs, axis=0)).min()
    print(f"{len(x):,} x {x.shape[1]} {x.dtype} -> {components}, {threads} threads:", end=" ")
    print(f"variances differ by {np.abs(ours / theirs - 1).max():.1e}, cosine of the components >= {cosine:.6f}")
    for stage, columns in {"fit": [0], "transform": [1], "both": [0, 1]}.items():
        ours_s, theirs_s = (np.array(seconds[name])[:, columns].sum(1) for name in sides)
        print(f"  {stage:9} clipray {spread(ours_s)} s, scikit-learn {spread(theirs_s)} s,", end=" ")
        print(f"ratio {spread(theirs_s / ours_s)}, of the best {theirs_s.min() / ours_s.min():.2f}")


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
