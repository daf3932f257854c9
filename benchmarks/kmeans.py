"""K-means side by side: clipray's iterations against `faiss.Kmeans` and scikit-learn's, from the same start.

    python benchmarks/kmeans.py [--rows 200000] [--columns 512] [--clusters 1000] [--iterations 10] [--repeats 3]
    python benchmarks/kmeans.py --published          # 1,000,000 x 256, k = 20,000, 25 iterations; hours for all three
    python benchmarks/kmeans.py --published --iterations 2 --without sklearn

The vectors are in memory and clustered, unit-length and in a cone, as CLIP's are. Start-up is not counted: clipray's copy
in bf16 is reported apart, and so is its exact pass at the end. faiss's own clock is taken for faiss; scikit-learn labels
once more after its last iteration, which is counted as one more. Runs take turns, as other work on the machine comes and
goes: compare the ratios of the fastest, and on a busy machine those of the processor's seconds with `--threads 1`.
"""

import argparse
import os
import time
from collections import defaultdict

import faiss
import numpy as np
import sklearn.cluster
import threadpoolctl
import torch
from torch.profiler import ProfilerActivity, profile

from clipray.analysis.kmeans import KMeans, kmeans
from clipray.analysis.vector_partition import VectorPartition

PARTS = {
    "product": ("aten::mm", "aten::addmm"),
    "minima": ("aten::min", "aten::amin", "aten::index_fill_", "aten::minimum"),
    "sums": ("aten::index_add_",),
}


def clip_like(n: int, d: int, clusters: int, seed: int = 0) -> np.ndarray:
    """(n, d) float32 of unit length: clusters of many sizes, variances that fall off, a mean of length 0.77."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1).float().pow(-0.5)
    scale /= scale.norm()
    turn = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    mean = torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    centers = torch.randn(clusters, d, generator=g) * scale
    members = torch.multinomial(torch.arange(1, clusters + 1).float().pow(-0.7), n, replacement=True, generator=g)
    x = torch.empty(n, d)
    for rows in torch.arange(n).split(2**14):
        noise = torch.randn(len(rows), d, generator=g) * scale
        x[rows] = torch.nn.functional.normalize(0.6 * (centers[members[rows]] + noise) @ turn.T + mean)
    return x.numpy()


def run_clipray(
    x: np.ndarray, start: np.ndarray, iterations: int, precision: str
) -> tuple[float, float, list[np.ndarray], VectorPartition]:
    """Seconds of an iteration, of the processor too, the last centroids but one and the last, the shard."""
    begin = time.perf_counter()
    shard = VectorPartition(x, np.arange(len(x)), precision=precision)
    built, busy = time.perf_counter(), time.process_time()
    ends, seen = [built], [start]

    def on_iteration(state: KMeans) -> None:
        ends.append(time.perf_counter())
        seen.append(state.centroids)

    kmeans(shard, len(start), start=start, tol=0, max_iter=iterations, on_iteration=on_iteration)
    busy = time.process_time() - busy
    each = ", ".join(f"{s:.2f}" for s in np.diff(ends))
    print(f"  clipray {shard.precision}: {built - begin:.2f} s for the shard, then iterations of {each} s")
    return (ends[-1] - built) / iterations, busy / iterations, seen[-2:], shard


def run_faiss(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[float, int, np.ndarray]:
    """Seconds of an iteration, assignments made, centroids."""
    k = len(start)
    kmeans = faiss.Kmeans(x.shape[1], k, niter=iterations, min_points_per_centroid=1, max_points_per_centroid=len(x))
    kmeans.train(x, init_centroids=start)
    return kmeans.iteration_stats[-1]["time"] / iterations, iterations, kmeans.centroids


def run_sklearn(x: np.ndarray, start: np.ndarray, iterations: int) -> tuple[float, int, np.ndarray]:
    kmeans = sklearn.cluster.KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    begin = time.perf_counter()
    kmeans.fit(x)
    return (time.perf_counter() - begin) / (iterations + 1), iterations + 1, kmeans.cluster_centers_


def parts_of_an_iteration(x: np.ndarray, before: np.ndarray, after: np.ndarray, precision: str) -> str:
    """Where the time of an iteration goes, by torch's operators; of one thread, as the profiler sees but one."""
    shard = VectorPartition(x, np.arange(len(x)), precision=precision, threads=1)
    shard.assign(before)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        shard.assign(after)
    times: defaultdict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "rest")
        times[part] += event.self_cpu_time_total
    total = sum(times.values())
    return ", ".join(f"{part} {times[part] / total:.0%}" for part in (*PARTS, "rest"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--columns", type=int)
    parser.add_argument("--clusters", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument(
        "--published", action="store_true", help="the setting of faiss's wiki, where a CPU takes 11 min"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--without", nargs="*", choices=["faiss", "sklearn"], default=[])
    options = parser.parse_args()
    n, d, k, iterations = (1_000_000, 256, 20_000, 25) if options.published else (200_000, 512, 1000, 10)
    n, d, k = options.rows or n, options.columns or d, options.clusters or k
    iterations = options.iterations or iterations
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    threadpoolctl.threadpool_limits(options.threads)

    x = clip_like(n, d, clusters=2 * k)
    start = x[np.random.default_rng(0).choice(n, k, replace=False)]
    print(f"{n:,} x {d}, k={k:,}, {iterations} iterations, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    others = {"faiss": run_faiss, "sklearn": run_sklearn}
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    cpu: defaultdict[str, list[float]] = defaultdict(list)
    centroids = {}
    for _ in range(options.repeats):
        each, busy, last, shard = run_clipray(x, start, iterations, options.precision)
        centroids["clipray"] = last[-1]
        seconds["clipray"].append(each)
        cpu["clipray"].append(busy)
        for name in sorted(others.keys() - set(options.without)):
            begin = time.process_time()
            each, runs, centroids[name] = others[name](x, start, iterations)
            seconds[name].append(each)
            cpu[name].append((time.process_time() - begin) / runs)
    begin = time.perf_counter()
    inertia = {"clipray": shard.nearest(centroids["clipray"])[1].sum(dtype=np.float64)}
    print(f"  the exact pass at the end: {time.perf_counter() - begin:.2f} s")
    inertia |= {name: shard.nearest(centroids[name])[1].sum(dtype=np.float64) for name in centroids}
    torch.set_num_threads(1)
    print(f"  one more iteration on 50,000 rows: {parts_of_an_iteration(x[:50_000], *last, shard.precision)}")
    for name, times in seconds.items():
        print(
            f"{name:8} {min(times):.3f} s an iteration (at most {max(times):.3f}), {min(cpu[name]):.3f} s of the "
            f"processor: {min(times) / min(seconds['clipray']):.2f} and {min(cpu[name]) / min(cpu['clipray']):.2f} x "
            f"clipray's; inertia {inertia[name]:.2f}, {inertia[name] / inertia['clipray'] - 1:+.4%}"
        )


if __name__ == "__main__":
    main()
