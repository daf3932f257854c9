"""What an index finds, against brute force in NumPy: rows count by distance, and new rows are not those of the graph."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
import pytest

from clipray.analysis import vector_index as vi
from clipray.analysis.recall import (
    Nearest,
    Queries,
    best_of,
    nearest_exactly,
    recall_at,
    recalls,
    tune,
)

METRICS = ["cosine", "l2", "dot"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Vectors are few here, and threads that wait for each other on a busy machine slow."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def clustered(n: int, d: int = 16, groups: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, d))[rng.integers(0, groups, n)] + 0.5 * rng.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


X = clustered(4_000)
NEW, X = X[:200], X[200:]


def brute_force(queries: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    """(q, n) float64, the smaller the nearer."""
    queries, x = queries.astype(np.float64), x.astype(np.float64)
    return np.square(queries[:, None] - x).sum(2) if metric == "l2" else -queries @ x.T


def slow_recall(index: faiss.Index, queries: np.ndarray, x: np.ndarray, metric: str, k: int) -> float:
    """Query by query, in Python."""
    hits = 0
    for query, distances in zip(queries, brute_force(queries, x, metric), strict=True):
        kth = np.sort(distances)[k - 1]
        answers = index.search(query[None], k)[1][0]
        hits += sum(bool(row >= 0 and distances[row] <= kth + 1e-6 * abs(kth)) for row in answers)
    return hits / (k * len(queries))


def built(kind: str, metric: str, x: np.ndarray) -> faiss.Index:
    index = vi.empty_index(kind, x.shape[1], metric)
    if not index.is_trained:
        vi.train(index, x[:3_000], 0)
    vi.fill(index, x, 0)
    return index


def asked(queries: np.ndarray, x: np.ndarray, metric: str, top: int = 100) -> Queries:
    return Queries(queries, nearest_exactly(queries, x, metric, np.arange(len(x)), top))


@pytest.mark.parametrize("metric", METRICS)
def test_brute_force_in_parts_is_brute_force(metric: str) -> None:
    numbers = np.random.default_rng(0).permutation(len(X))
    parts = [nearest_exactly(NEW, X[some], metric, numbers[some], 20) for some in np.array_split(np.arange(3_800), 9)]
    nearest = best_of([best_of(parts[:4], 20), *parts[4:], Nearest(np.zeros((200, 0)), np.zeros((200, 0)))], 20)
    distances = brute_force(NEW, X, metric)
    np.testing.assert_allclose(nearest.distances, np.sort(distances, axis=1)[:, :20], rtol=1e-12, atol=1e-12)
    rows = np.argsort(numbers)[nearest.numbers.astype(int)]
    np.testing.assert_allclose(np.take_along_axis(distances, rows, 1), nearest.distances, rtol=1e-12, atol=1e-12)


def test_of_equally_near_rows_the_lower_number_comes_first() -> None:
    parts = [Nearest(np.array([[1.0, 2.0]]), np.array([[7, 9]])), Nearest(np.array([[1.0, 2.0]]), np.array([[3, 4]]))]
    assert best_of(parts, 3).numbers.tolist() == [[3, 7, 4]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["Flat", "IVF32,Flat", "HNSW8", "IVF32,SQ4", "SQ4"])
def test_recall_is_that_of_a_loop(kind: str, metric: str) -> None:
    index, queries = built(kind, metric, X), asked(NEW, X, metric)
    found = recalls(index, queries, metric)
    assert list(found) == ["recall@1", "recall@10", "recall@100"]
    for k in (1, 10, 100):
        assert found[f"recall@{k}"] == pytest.approx(slow_recall(index, NEW, X, metric, k), abs=1e-4)
    assert kind == "Flat" or found["recall@10"] < 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["Flat", "IVF32,Flat", "HNSW16", "IVF32,SQ8", "SQ8"])
def test_ties_cost_no_recall(kind: str, metric: str) -> None:
    """Each vector is there 20 times: any ten of the nearest twenty are right."""
    distinct = X[:190]
    x = np.tile(distinct, (20, 1)) if kind != "HNSW16" else np.repeat(distinct, 20, axis=0)
    index, queries = built(kind, metric, x), asked(distinct, x, metric)
    if kind.startswith("IVF"):
        index.nprobe = 32
    if kind == "HNSW16":
        index.hnsw.efSearch = 400
    for k in (1, 10):
        assert recall_at(index, queries, metric, k) >= 0.99
    assert tune(index, queries, metric, 0.9)[1] <= 64


def test_ties_of_more_rows_than_are_kept() -> None:
    """All vectors are one: whatever is found is right, of codes too."""
    x = np.tile(X[:1], (600, 1))
    for kind in ("Flat", "SQ8"):
        assert recall_at(built(kind, "l2", x), asked(x[:5], x, "l2"), "l2", 100) == 1


def test_wrong_answers_are_not_ties() -> None:
    """Rows a little farther than the tenth are none of the ten."""
    x = np.zeros((40, 4), np.float32)
    x[:, 0] = 1 + 1e-4 * np.arange(40)
    queries = asked(np.zeros((1, 4), np.float32), x, "l2", 40)
    shifted = built("Flat", "l2", x)
    shifted.reset()
    shifted.add(np.roll(x, 5, axis=0))  # answers are five places off where vectors are not looked at
    assert recall_at(shifted, queries, "l2", 10) == 1
    far = built("Flat", "l2", np.concatenate([x[:7], x[20:]]))
    assert recall_at(far, queries, "l2", 10) == pytest.approx(0.7)


@pytest.mark.parametrize(("kind", "parameter"), [("IVF64,Flat", "nprobe"), ("HNSW16", "efSearch")])
def test_the_effort_is_the_least_that_reaches_the_recall(kind: str, parameter: str) -> None:
    x = clustered(6_300, groups=1)  # no clusters: neighbours lie in many lists
    new, x = x[:300], x[300:]
    index, queries = built(kind, "cosine", x), asked(new, x, "cosine")
    targets = (0.5, 0.9, 0.97)
    parameters, efforts = zip(*(tune(index, queries, "cosine", target) for target in targets), strict=True)
    assert set(parameters) == {parameter}
    for effort, target in zip(efforts, targets, strict=True):
        vi.set_effort(index, parameter, effort)
        assert slow_recall(index, new, x, "cosine", 10) >= target
    assert efforts[0] <= efforts[1] <= efforts[2]
    assert efforts[0] < efforts[2]
    vi.set_effort(index, parameter, efforts[2] * 15 // 16 - 1)
    assert recall_at(index, queries, "cosine", 10) < 0.97


def test_an_effort_that_is_not_enough_is_the_greatest() -> None:
    index = built("IVF32,SQ4", "cosine", X)
    assert tune(index, asked(NEW, X, "cosine"), "cosine", 1) == ("nprobe", 32)
    assert tune(built("Flat", "cosine", X), asked(NEW, X, "cosine"), "cosine", 1) == ("", 0)


def test_rows_of_a_graph_are_found_more_often_than_new_ones() -> None:
    """Why rows are held out: a row of the graph has edges to its neighbours."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6_000, 24)).astype(np.float32)
    new, x = x[:1_000], x[1_000:]
    index = built("HNSW8", "l2", x)
    own = recall_at(index, asked(x[:1_000], x, "l2"), "l2", 10)
    assert own > recall_at(index, asked(new, x, "l2"), "l2", 10) + 0.03
