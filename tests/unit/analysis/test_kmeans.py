"""K-means against scikit-learn, faiss and loops by hand; the same result whatever the split, the kill, the precision."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import faiss
import numpy as np
import pytest
import sklearn.cluster
import threadpoolctl
import torch

from clipray.analysis import nearest_centroid, seeding, vector_partition
from clipray.analysis.errors import DataError
from clipray.analysis.kmeans import KMeans, best_start, kmeans, mini_batch
from clipray.analysis.kmeans_data import Assigned, choose, combine
from clipray.analysis.seeding import plus_plus, seeds
from clipray.analysis.tensors import native_bf16
from clipray.analysis.vector_partition import VectorPartition


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Vectors are few here, and threads that wait for each other on a busy machine slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def clustered(n: int = 3000, d: int = 24, clusters: int = 60, noise: float = 0.6, seed: int = 0) -> np.ndarray:
    """(n, d) float32 as of CLIP: unit length, clusters of several sizes about directions in a cone."""
    rng = np.random.default_rng(seed)
    sizes = rng.dirichlet(np.full(clusters, 3.0))
    x = rng.normal(size=(clusters, d))[rng.choice(clusters, n, p=sizes)] + noise * rng.normal(size=(n, d))
    x = x + 2 * rng.normal(size=d)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class LocalShards:
    """Shards in this process, as `KMeansData`: what any other implementation should agree with."""

    def __init__(self, shards: Sequence[VectorPartition]) -> None:
        self.shards, self.n_features = shards, shards[0].n_features
        self.n_samples = sum(shard.n_samples for shard in shards)

    def assign(self, centroids: np.ndarray) -> Assigned:
        return combine(shard.assign(centroids) for shard in self.shards)

    def sample(self, n: int, random_state: int, centroids: np.ndarray | None = None) -> np.ndarray:
        rows, order = choose([shard.draw(n, random_state, centroids) for shard in self.shards], n)
        return np.concatenate([shard.rows(chosen) for shard, chosen in zip(self.shards, rows)])[order]

    def nearest(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `VectorPartition.nearest`, shard after shard."""
        labels, distances = zip(*(shard.nearest(centroids) for shard in self.shards))
        return np.concatenate(labels), np.concatenate(distances)


def local(
    x: np.ndarray | torch.Tensor, parts: int | Sequence[int] = 1, precision: str = "fp32", threads: int = 1
) -> LocalShards:
    """`x` in shards; a row's key is its number in `x`."""
    rows = np.array_split(np.arange(len(x)), parts)
    return LocalShards([VectorPartition(x[some], some, precision=precision, threads=threads) for some in rows])


def brute_force(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Squared distances (n, k) float64."""
    return np.square(x.astype(np.float64)[:, None] - c.astype(np.float64)).sum(2)


def assert_same_choice(labels: np.ndarray, others: np.ndarray, x: np.ndarray, c: np.ndarray) -> None:
    """Labels that agree, or disagree on a tie."""
    distances, rows = brute_force(x, c), np.arange(len(x))
    np.testing.assert_allclose(distances[rows, labels], distances[rows, others], rtol=1e-5, atol=1e-6)


X = clustered()
START = X[np.random.default_rng(1).choice(len(X), 40, replace=False)]

SQUARE = np.array([[0, 0], [0, 2], [10, 0], [10, 2], [5, 1]], dtype=np.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_iterations_by_hand(precision: str) -> None:
    data, start = local(SQUARE, 2, precision), np.array([[0, 0], [10, 0]], dtype=np.float32)
    # (5, 1) is as far from both, and goes to the first.
    state = data.assign(start)
    np.testing.assert_array_equal(state.sums, [[5, 3], [20, 2]])
    np.testing.assert_array_equal(state.counts, [3, 2])
    np.testing.assert_array_equal(state.squares, [0 + 4 + 26, 100 + 104])
    np.testing.assert_array_equal(state.inertia(start), [0 + 4 + 26, 0 + 4])
    # The means are (5/3, 1) and (10, 1), nearest to the same rows: 2 (25/9 + 1) + 100/9 = 56/3, and 2.
    labels, distances = data.nearest(np.array([[5 / 3, 1], [10, 1]]))
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 0])
    np.testing.assert_allclose(distances, [34 / 9, 34 / 9, 1, 1, 100 / 9], rtol=1e-6)
    done = kmeans(data, 2, start=start, tol=0)
    np.testing.assert_allclose(done.centroids, [[5 / 3, 1], [10, 1]], rtol=1e-6)
    assert (done.n_iterations, done.converged) == (2, True)
    assert done.inertia == pytest.approx((34, 56 / 3 + 2))


def test_equal_to_scikit_learn_from_the_same_start() -> None:
    for tol, iterations in ((0, 8), (1e-4, 300), (1e-2, 300)):
        ours = kmeans(local(X, 3), 40, start=START, tol=tol, max_iter=iterations)
        theirs = sklearn.cluster.KMeans(40, init=START, n_init=1, max_iter=iterations, tol=tol, algorithm="lloyd").fit(
            X
        )
        assert ours.n_iterations == theirs.n_iter_
        np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
        labels, distances = local(X).nearest(ours.centroids)
        assert distances.sum() == pytest.approx(theirs.inertia_, rel=1e-5)
        assert_same_choice(labels, theirs.labels_, X, ours.centroids)


def test_equal_to_faiss_from_the_same_start() -> None:
    theirs = faiss.Kmeans(X.shape[1], 40, niter=10, min_points_per_centroid=1, max_points_per_centroid=len(X))
    theirs.train(X, init_centroids=START)
    ours = kmeans(local(X), 40, start=START, tol=0, max_iter=10)
    np.testing.assert_allclose(ours.inertia, theirs.obj, rtol=1e-5)
    np.testing.assert_allclose(ours.centroids, theirs.centroids, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_split_gives_the_same_result(precision: str) -> None:
    """To the bit where a product's rounding does not depend on the number of rows, as here; 1e-5 leaves room for others."""
    whole = kmeans(local(X, 1, precision), 40, max_iter=12, tol=0, random_state=3)
    for parts in (2, 7, 64, [0, 5, 5, 2999]):  # some of them empty
        split = kmeans(local(X, parts, precision), 40, max_iter=12, tol=0, random_state=3)
        np.testing.assert_allclose(split.centroids, whole.centroids, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(split.inertia, whole.inertia, rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_threads_give_the_same_bits(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_partition, "BLOCK_ROWS", (100, 100))
    alone = local(X, 2, precision)
    for threads in (2, 5):
        together = local(X, 2, precision, threads)
        for some in (START, START[::-1], X[-400:]):
            for a, b in zip(together.nearest(some), alone.nearest(some)):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(together.assign(some).sums, alone.assign(some).sums)
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(vector_partition, "ranking", lambda *_: lambda: lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        together.assign(START)
    monkeypatch.undo()
    np.testing.assert_array_equal(together.assign(START).sums, alone.assign(START).sums)


def test_states_add_up_to_the_same_bits() -> None:
    start = X[:5]
    labels = VectorPartition(X, np.arange(len(X))).nearest(start)[0]
    far = X + 100 * labels[:, None]  # no row is near a border
    far /= np.linalg.norm(far, axis=1).max()
    centroids = np.stack([far[labels == i].mean(0) for i in range(5)])
    expected = VectorPartition(far, np.arange(len(X))).assign(centroids)
    np.testing.assert_array_equal(expected.counts, np.bincount(labels))
    np.testing.assert_allclose(expected.sums[2], far[labels == 2].astype(np.float64).sum(0), rtol=1e-8)
    order = np.random.default_rng(0).permutation(len(X))
    # The longest vector goes first: each shard then has one of that length.
    order = order[order != np.linalg.norm(far, axis=1).argmax()]
    for parts in (3, 50):
        states = [VectorPartition(far[some], some).assign(centroids) for some in np.array_split(order, parts)]
        states.append(VectorPartition(np.delete(far, order, 0), np.delete(np.arange(len(X)), order)).assign(centroids))
        for some in (states, states[::-1], [combine(states[:2]), combine(states[2:])]):
            np.testing.assert_allclose(combine(some).sums, expected.sums, rtol=1e-9)
    unit = [VectorPartition(X[some], some).assign(X[:1]) for some in np.array_split(order, 30)]
    for some in (unit[::-1], [combine(unit[:7]), combine(unit[7:])]):
        for field in ("sums", "counts", "squares"):
            np.testing.assert_array_equal(getattr(combine(some), field), getattr(combine(unit), field))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_of_changed_rows_do_not_drift(precision: str) -> None:
    used, rng = local(X, 3, precision), np.random.default_rng(0)
    for k in (7, 7, 300, 300, 300, 7):
        centroids = X[rng.choice(len(X), k, replace=False)]
        again, fresh = used.assign(centroids), local(X, 3, precision).assign(centroids)
        for field in ("sums", "counts", "squares"):
            np.testing.assert_array_equal(getattr(again, field), getattr(fresh, field))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spherical", [False, True])
def test_a_run_that_goes_on_ends_in_the_same_bits(precision: str, spherical: bool) -> None:
    states: list[KMeans] = []
    settings = {"max_iter": 9, "tol": 0, "random_state": 5, "spherical": spherical}
    whole = kmeans(local(X, 2, precision), 150, on_iteration=states.append, **settings)
    assert [s.n_iterations for s in states] == list(range(1, 10))
    for state in (states[0], states[4], states[8]):
        resumed = kmeans(local(X, 2, precision), 150, start=state, **settings)
        np.testing.assert_array_equal(resumed.centroids, whole.centroids)
        assert resumed.inertia == whole.inertia
    done = KMeans(whole.centroids, whole.inertia, converged=True)
    assert kmeans(local(X), 150, start=done, max_iter=99) is done


def test_random_states_matter_and_repeat() -> None:
    runs = [kmeans(local(X), 20, random_state=s, max_iter=2).centroids for s in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_empty_clusters_are_split_from_the_largest(precision: str) -> None:
    start = START.copy()
    start[[3, 17, 20]] += 50
    states: list[KMeans] = []
    data = local(X, 2, precision)
    done = kmeans(data, 40, start=start, tol=0, max_iter=30, on_iteration=states.append)
    assert (data.assign(start).counts[[3, 17, 20]] == 0).all()
    assert (data.assign(done.centroids).counts > 0).all()
    # After the first iteration the three sit in pairs about the largest clusters' means.
    first, state = states[0].centroids, data.assign(start)
    means = state.sums / np.maximum(state.counts, 1)[:, None]
    donors = np.flatnonzero(np.abs(first - means).max(1) > 1e-6)
    others = np.setdiff1d(donors, [3, 17, 20])
    largest = np.argsort(-state.inertia(means.astype(np.float32)))[:3]
    assert set(others) <= set(largest)
    middle = (first[3] + first[others]) / 2
    assert np.abs(middle - means[others]).max(1).min() < 1e-6
    np.testing.assert_array_equal(kmeans(local(X, 7, precision), 40, start=start, tol=0, max_iter=1).centroids, first)
    assert done.inertia[-1] < kmeans(local(X), 37, start=np.delete(START, [3, 17, 20], 0)).inertia[-1] * 1.05


def test_clusters_of_equal_vectors_are_not_split() -> None:
    x = np.repeat(np.eye(6, dtype=np.float32), [900, 50, 30, 10, 5, 5], axis=0)
    start = np.zeros((6, 6), dtype=np.float32) + np.arange(6, dtype=np.float32)[:, None]
    done = kmeans(local(x, 4), 6, start=start, tol=0)
    assert sorted(local(x).assign(done.centroids).counts) == [5, 5, 10, 30, 50, 900]
    assert done.inertia[-1] == pytest.approx(0, abs=1e-6)


def slow_spherical(x: np.ndarray, c: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        labels = (x @ c.T).argmax(1)
        c = np.stack([x[labels == i].sum(0) for i in range(len(c))])
        c /= np.linalg.norm(c, axis=1, keepdims=True)
    return c


def test_spherical_is_by_cosine() -> None:
    expected = slow_spherical(X.astype(np.float64), START.astype(np.float64), 6)
    done = kmeans(local(X, 2), 40, start=3 * START, tol=0, max_iter=6, spherical=True)
    np.testing.assert_allclose(done.centroids, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(done.centroids, axis=1), 1, rtol=1e-6)
    opposite = np.array([[1, 0], [-1, 0]], dtype=np.float32)  # whose mean has no direction
    assert np.isfinite(kmeans(local(opposite), 1, spherical=True).centroids).all()


def test_samples_depend_on_neither_split_nor_order() -> None:
    for centroids in (None, START):
        expected = local(X).sample(100, 7, centroids)
        assert len(np.unique(expected, axis=0)) == 100
        for parts in (2, 7, 64):
            np.testing.assert_array_equal(local(X, parts).sample(100, 7, centroids), expected)
        order = np.random.default_rng(0).permutation(len(X))
        shuffled = LocalShards([VectorPartition(X[some], some, precision="fp32") for some in np.array_split(order, 5)])
        np.testing.assert_array_equal(shuffled.sample(100, 7, centroids), expected)
        np.testing.assert_array_equal(local(X).sample(30, 7, centroids), expected[:30])
        assert not np.array_equal(local(X).sample(100, 8, centroids), expected)
    assert len(local(X).sample(10**6, 0)) == len(X)
    draws = [shard.draw(9, 1) for shard in local(X, 3).shards]
    assert sum(map(len, choose(draws, 9)[0])) == 9


def test_samples_are_uniform_or_by_squared_distance() -> None:
    x = np.arange(8, dtype=np.float32)[:, None]
    counts, weighted = np.zeros(8), np.zeros(8)
    shard = VectorPartition(x, np.arange(8), precision="fp32")
    for state in range(4000):
        counts[shard.draw(1, state).rows] += 1
        weighted[shard.draw(1, state, x[:1]).rows] += 1
    assert np.abs(counts / 4000 - 1 / 8).max() < 0.02
    assert np.abs(weighted / 4000 - np.arange(8) ** 2 / 140).max() < 0.025
    assert sorted(shard.draw(8, 0, x[2:5]).rows) == [0, 1, 5, 6, 7]


@pytest.mark.parametrize("k", [1, 2, 100, 256, 257, 384, 700])
def test_nearest_is_exact(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_partition, "SCORES", 100_000)
    monkeypatch.setattr(vector_partition, "BLOCK_ROWS", (64, 200))
    for offset in (0, 1, 30):
        x, c = X[:1000] + np.float32(offset), X[2000 : 2000 + k] + np.float32(offset)
        labels, distances = local(x, 3).nearest(c)
        expected = brute_force(x, c)
        assert (labels.dtype, distances.dtype) == (np.int32, np.float32)
        np.testing.assert_allclose(distances, expected[np.arange(1000), labels], rtol=1e-5)
        np.testing.assert_allclose(distances, expected.min(1), rtol=1e-4)
        if offset < 30:
            chosen, own = LocalShards(local(x, 3, "bf16").shards).shards[1].nearest(c, "bf16")
            assert (chosen != labels[334:667]).mean() < 0.01 * offset + 1e-9
            np.testing.assert_allclose(own, distances[334:667], rtol=0.003 * offset + 1e-6)


def test_bf16_ends_where_fp32_does() -> None:
    x = clustered(8000, 64, 100, noise=1.0)
    start = x[:70]
    ours = kmeans(local(x, 1, "bf16"), 70, start=start, tol=0, max_iter=10)
    theirs = sklearn.cluster.KMeans(70, init=start, n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(x)
    assert local(x).nearest(ours.centroids)[1].sum() == pytest.approx(theirs.inertia_, rel=1e-4)
    labels, distances = local(x).nearest(ours.centroids)
    shard = VectorPartition(x, np.arange(len(x)), precision="bf16")
    chosen, own = shard.nearest(ours.centroids, "bf16")
    assert_same_choice(chosen, labels, x, ours.centroids)
    np.testing.assert_allclose(own, distances, rtol=1e-5)


def test_close_scores_are_compared_exactly() -> None:
    """Scores that bf16 takes for equal, of more than two centroids and of some in one lane."""
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(500, 32)).astype(np.float32), 9 * rng.normal(size=(500, 32)).astype(np.float32)
    c[[3, 5, 7, 131, 259, 400]] = 0.9 * x[0] + 3e-4 * rng.normal(size=(6, 32))
    shard = VectorPartition(x, np.arange(500), precision="bf16")
    labels, distances = shard.nearest(c, "bf16")
    expected = brute_force(x, c)
    assert len(np.unique(labels)) == 6
    assert (labels == expected.argmin(1)).mean() > 0.98
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-5)
    c[131] = c[5]
    assert 131 not in shard.nearest(c, "bf16")[0]


def near_ties(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and centroids (float32) whose order a product in float32 cannot tell."""
    rng = np.random.default_rng(0)
    if name == "heavy points at 0 and narrow groups at 50":
        groups = 50 + 1e-3 * rng.normal(size=(20, 8))
        members = groups[rng.integers(0, 20, 535)] + 2e-4 * rng.normal(size=(535, 8))
        return np.concatenate([np.zeros((800, 8)), members]), np.concatenate([np.zeros((1, 8)), groups])
    x = rng.normal(size=(600, 64))
    if name == "a lattice":  # all corners of a cube are equally near
        return grid(6) * 2 + 1, grid(7) * 2
    if name == "equal centroids":
        return x, np.repeat(x[:30] + 0.1, 20, axis=0)
    if name == "far from the origin":
        return x + 1000, x[:300] + 1000 + 1e-4 * rng.normal(size=(300, 64))
    if name == "one centroid far away":
        return x, np.concatenate([x[:199], 1e6 * x[:1]])
    return 1e-22 * x, 1e-22 * x[:300]


def grid(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "heavy points at 0 and narrow groups at 50",
        "a lattice",
        "equal centroids",
        "far from the origin",
        "one centroid far away",
        "tiny",
    ],
)
def test_near_ties_are_those_of_float64(name: str, precision: str) -> None:
    """Each row is at its nearest centroid, and at the first of equal ones."""
    x, c = (values.astype(np.float32) for values in near_ties(name))
    labels, _ = VectorPartition(x, np.arange(len(x)), precision=precision, threads=1).nearest(c, precision)
    np.testing.assert_array_equal(labels, brute_force(x, c).argmin(1))


def test_few_rows_are_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comparing costs hangs on how many rows are close: a far centroid must not make them all so."""
    compared = []
    monkeypatch.setattr(nearest_centroid, "_nearer", lambda x, _c, labels, _others: compared.append(len(x)) or labels)
    far = np.concatenate([START, 1e3 * START[:1]])
    for centroids in (START, far):
        compared.clear()
        local(X).nearest(centroids)
        assert sum(compared) < 0.01 * len(X)


def test_precision_follows_the_hardware_and_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_f": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert VectorPartition(X, np.arange(len(X))).precision == expected
        assert VectorPartition(X + 100, np.arange(len(X))).precision == "fp32"
    assert native_bf16(torch.device("cpu")) is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_precision_vectors_count_as_what_they_are(dtype: torch.dtype, precision: str) -> None:
    half = torch.from_numpy(X).to(dtype)
    held, wide = local(half, 2, precision), local(half.float(), 2, precision)
    for a, b in ((held.assign(START), wide.assign(START)),):
        np.testing.assert_array_equal(a.sums, b.sums)
        np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_array_equal(held.nearest(START)[1], wide.nearest(START)[1])
    np.testing.assert_array_equal(held.sample(5, 0), wide.sample(5, 0))


def test_vectors_are_read_only_and_may_be_of_any_number_type() -> None:
    frozen = X.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard = VectorPartition(frozen, np.arange(len(X)))
        done = kmeans(shard, 5, max_iter=3)
    np.testing.assert_array_equal(done.centroids, kmeans(local(X), 5, max_iter=3).centroids)
    np.testing.assert_array_equal(frozen, X)
    assert shard._x.data_ptr() == frozen.ctypes.data
    for dtype in (np.float64, np.int32, np.uint8):
        state = local(SQUARE.astype(dtype)[::-1]).assign(SQUARE[:2])
        np.testing.assert_array_equal(state.sums.sum(0), SQUARE.sum(0))


def test_seeds_are_rows_of_the_table_in_parts_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clustered(4000, 16, 90, noise=0.1)
    inertia = {}
    for part in (1000, 25):
        monkeypatch.setattr(seeding, "PART", part)
        chosen = seeds(local(x), 90, 0)
        np.testing.assert_array_equal(seeds(local(x, 5), 90, 0), chosen)
        assert len({row.tobytes() for row in chosen} & {row.tobytes() for row in x}) == 90
        inertia[part] = local(x).nearest(chosen)[1].sum()
    uniform = np.mean([local(x).nearest(local(x).sample(90, s))[1].sum() for s in range(5)])
    theirs = [local(x).nearest(sklearn.cluster.kmeans_plusplus(x, 90, random_state=s)[0])[1].sum() for s in range(5)]
    assert inertia[1000] < 1.1 * np.mean(theirs)
    assert inertia[1000] < inertia[25] < 0.8 * uniform


def test_of_several_starts_the_best_is_gone_on_with() -> None:
    data, k = local(X, 3), 40
    start = best_start(data, k, 4, 7)
    np.testing.assert_array_equal(best_start(data, k, 1, 7), seeds(data, k, 7))
    np.testing.assert_array_equal(best_start(local(X), k, 4, 7), start)

    def inertia(start: np.ndarray) -> float:
        return kmeans(data, k, start=start, max_iter=5, tol=0, random_state=7).inertia[-1]

    singles = [inertia(seeds(data, k, state)) for state in range(7, 15)]
    assert inertia(start) <= singles[0]
    assert inertia(start) < np.mean(singles)


@pytest.mark.parametrize("part", [1000, 4])
def test_rare_vectors_among_many_equal_ones_are_found(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "PART", part)
    monkeypatch.setattr(seeding, "SAMPLE_ROWS", (2, 10))
    x = np.concatenate([np.tile(X[:1], (2000, 1)), X[1:30]])
    done = kmeans(local(x, 3), 30, tol=0)
    assert done.inertia[-1] == pytest.approx(0, abs=1e-5)
    assert sorted(local(x).assign(done.centroids).counts) == [1] * 29 + [2000]


def test_plus_plus_sees_past_an_outlier() -> None:
    x = np.concatenate([X[:50], 1e3 * X[50:51]])
    assert len(np.unique(plus_plus(x, 20, np.random.default_rng(0)), axis=0)) == 20


def test_one_row_and_as_many_clusters_as_rows() -> None:
    one = kmeans(local(X[:1]), 1)
    np.testing.assert_array_equal(one.centroids, X[:1])
    assert (one.inertia[-1], one.converged) == (pytest.approx(0, abs=1e-9), True)
    every = kmeans(local(X[:20], 3), 20)
    np.testing.assert_allclose(np.unique(every.centroids, axis=0), np.unique(X[:20], axis=0), atol=1e-9)


def test_mini_batches_against_scikit_learn() -> None:
    theirs = sklearn.cluster.MiniBatchKMeans(40, init=START, n_init=1, reassignment_ratio=0, batch_size=500)
    centroids, counts = START, np.zeros(40, dtype=np.int64)
    for batch in np.array_split(X, 6):
        centroids, counts = mini_batch(centroids, counts, local(batch).assign(centroids))
        theirs.partial_fit(batch)
        np.testing.assert_allclose(centroids, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert counts.sum() == len(X)


class InBatches(LocalShards):
    """`Batches` of vectors in this process; a batch is the shard of its rows."""

    def __init__(self, x: np.ndarray) -> None:
        super().__init__(local(x).shards)
        self.x = x

    def batches(self, rows: int, random_state: int) -> list[Any]:
        order = np.random.default_rng(random_state).permutation(len(self.x))
        return [local(self.x[some]) for some in np.array_split(order, -(-len(self.x) // rows))]

    def assign_batch(self, batch: Any, centroids: np.ndarray) -> Assigned:
        return batch.assign(centroids)


@pytest.mark.parametrize("spherical", [False, True])
def test_passes_of_mini_batches_end_near_lloyds(spherical: bool) -> None:
    x = X / np.linalg.norm(X, axis=1, keepdims=True) if spherical else X
    whole = kmeans(local(x), 40, spherical=spherical, start=START)
    found = kmeans(InBatches(x), 40, batch_rows=500, spherical=spherical, start=START, tol=1e-4)
    assert found.converged
    assert 1 < found.n_iterations < 100
    inertia = [local(x).assign(state.centroids).inertia(state.centroids).sum() for state in (whole, found)]
    assert inertia[1] < 1.02 * inertia[0]  # it may well end in a better minimum
    assert found.counts.sum() == found.n_iterations * len(x)
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)


def test_a_centroid_far_from_all_batches_takes_half_of_another() -> None:
    start = np.concatenate([START[:39], START[:1] + 1e4]).astype(np.float32)
    states: list[KMeans] = []
    kmeans(InBatches(X), 40, batch_rows=500, start=start, max_iter=2, on_iteration=states.append)
    assert np.abs(states[0].centroids).max() < 100
    assert sorted(states[0].counts)[:2] == [0, 0]
    assert states[1].counts.min() > 0


def test_the_driver_needs_no_torch() -> None:
    code = "import sys, clipray.analysis.kmeans; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


NAN, EQUAL = X.copy(), np.ones((10, 3), dtype=np.float32)
NAN[[3, 9, 11, 12, 13, 2000], 5] = [np.nan, np.inf, -np.inf, 1e30, 3e12, np.nan]
BAD = {
    "n_samples=3 should be >= n_clusters=5": (DataError, lambda: kmeans(local(X[:3]), 5)),
    "distinct vectors=1 should be >= n_clusters=2": (DataError, lambda: kmeans(local(EQUAL), 2)),
    "distinct vectors=1 should be >= n_clusters=2:": (DataError, lambda: kmeans(local(EQUAL), 2, start=EQUAL[:2])),
    "mean squared length=9 should be 1": (DataError, lambda: kmeans(local(3 * X), 2, spherical=True)),
    "6 of 3000 vectors are not finite (or too long), in rows 3, 9, 11, 12, 13, …": (DataError, lambda: local(NAN)),
    "x (3000,) and keys (3000,) should be (n, d >= 1) and (n,)": (
        ValueError,
        lambda: VectorPartition(X[:, 0], np.arange(3000)),
    ),
    "x (3000, 24) and keys (5,) should be": (ValueError, lambda: VectorPartition(X, np.arange(5))),
    "centroids have shape (2, 3), expected (k >= 1, 24)": (ValueError, lambda: local(X).assign(np.zeros((2, 3)))),
    "centroids should be finite": (ValueError, lambda: local(X).nearest(np.full((2, 24), np.nan))),
    "start has shape (4, 24), expected (5, 24), all finite": (ValueError, lambda: kmeans(local(X), 5, start=X[:4])),
    "n_clusters=0 should be >= 1": (ValueError, lambda: kmeans(local(X), 0)),
    "max_iter=0 should be >= 1": (ValueError, lambda: kmeans(local(X), 1, max_iter=0)),
    "tol=nan, random_state=0 should be >= 0": (ValueError, lambda: kmeans(local(X), 1, tol=np.nan)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    error, call = BAD[message]
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    assert isinstance(raised.value, ValueError)


def test_an_empty_shard_has_an_empty_state() -> None:
    state = VectorPartition(X[:0], np.arange(0)).assign(START)
    assert isinstance(state, Assigned)
    assert (state.sums.shape, state.counts.sum(), state.squares.sum()) == ((40, 24), 0, 0)
