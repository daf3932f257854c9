"""faiss indexes: the type that fits, parts that are filled apart, tuning to a recall, query expansion."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
import pytest
import torch

from clipray.analysis import vector_index as vi
from clipray.errors import JobError


def clustered(n: int, d: int = 16, groups: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, d))[rng.integers(0, groups, n)] + 0.5 * rng.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


X = clustered(6_000)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Vectors are few here, and threads that wait for each other on a busy machine slow."""
    threads, torch_threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(torch_threads)


@pytest.mark.parametrize(
    ("rows", "width", "memory_gib", "kind"),
    [
        (9_000, 512, 0, "Flat"),
        (60_000, 512, 0, "HNSW32"),
        (60_000, 512, 0.05, "OPQ64_256,IVF1024,PQ64"),
        (1_000_000, 256, 4, "IVF4096,Flat"),
        (1_000_000, 256, 0.5, "OPQ64_256,IVF4096,PQ64"),
        (1_000_000, 20, 0.05, "OPQ8_16,IVF4096,PQ8"),
        (1_000_000, 6, 0.01, "IVF4096,SQ8"),
    ],
)
def test_the_type_follows_rows_and_memory(rows: int, width: int, memory_gib: float, kind: str) -> None:
    assert vi.choose_type(rows, width, memory_gib * 2**30) == kind
    assert vi.empty_index(kind, width, "cosine").d == width


def built(kind: str, metric: str, parts: int, x: np.ndarray = X) -> faiss.Index:
    index = vi.empty_index(kind, x.shape[1], metric)
    wanted = vi.training_rows(index, len(x))
    if wanted:
        vi.train(index, x[:wanted], 0)
    trained = faiss.serialize_index(index)
    index = faiss.deserialize_index(trained)
    for rows in np.array_split(np.arange(len(x)), parts):
        part = faiss.deserialize_index(trained)
        vi.fill(part, x[rows], int(rows[0]))
        index.merge_from(part, 0)
    return index


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("kind", ["Flat", "IVF32,Flat", "IVF32,SQ8", "PCA12,IVF32,Flat"])
def test_parts_that_are_merged_find_what_a_whole_does(kind: str, metric: str) -> None:
    assert vi.mergeable(vi.empty_index(kind, 16, metric))
    whole, parts = built(kind, metric, 1), built(kind, metric, 7)
    for index in (whole, parts):
        assert index.ntotal == len(X)
        vi.set_effort(index, vi.effort_of(index), 32)
    scores, rows = whole.search(X[:200], 10)
    np.testing.assert_allclose(parts.search(X[:200], 10)[0], scores, atol=1e-5)
    if kind in ("Flat", "IVF32,Flat"):
        exact = vi.nearest_exactly(X[:200], X, metric, 0, 10)
        np.testing.assert_allclose(scores, exact[0], atol=1e-5)
        assert vi.overlap(rows, exact[1]) > 0.999


def test_graphs_are_not_merged() -> None:
    assert not vi.mergeable(vi.empty_index("HNSW32", 16, "l2"))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_brute_force_in_parts_is_brute_force(metric: str) -> None:
    parts = [
        vi.nearest_exactly(X[:50], X[rows], metric, int(rows[0]), 20) for rows in np.array_split(np.arange(6_000), 9)
    ]
    scores, rows = vi.best_of(parts, metric, 20)
    products = X[:50] @ X.T
    key = -products if metric == "cosine" else 2 - 2 * products
    order = np.argsort(key, axis=1)[:, :20]
    np.testing.assert_allclose(scores, np.take_along_axis(products if metric == "cosine" else key, order, 1), atol=1e-5)
    assert vi.overlap(rows, order) > 0.999


@pytest.mark.parametrize(("kind", "parameter"), [("IVF64,Flat", "nprobe"), ("HNSW16", "efSearch")])
def test_the_effort_is_the_least_that_reaches_the_recall(kind: str, parameter: str) -> None:
    x = clustered(6_000, groups=1)  # no clusters: neighbours lie in many lists
    index = built(kind, "cosine", 1, x) if kind.startswith("IVF") else vi.empty_index(kind, 16, "cosine")
    if index.ntotal == 0:
        vi.fill(index, x, 0)
    own = np.arange(300)
    truth = vi.without(vi.nearest_exactly(x[:300], x, "cosine", 0, 101)[1], own, 100)
    found = [vi.tune(index, x[:300], own, truth, target) for target in (0.5, 0.9, 0.97)]
    assert {tuned.parameter for tuned in found} == {parameter}
    assert [tuned.recall[10] >= target for tuned, target in zip(found, (0.5, 0.9, 0.97), strict=True)] == [True] * 3
    assert found[0].value <= found[1].value <= found[2].value
    assert found[0].value < found[2].value
    vi.set_effort(index, parameter, found[2].value)
    again = vi.overlap(vi.without(index.search(x[:300], 11)[1], own, 10), truth[:, :10])
    assert again == pytest.approx(found[2].recall[10])


def test_own_rows_are_left_out_of_answers() -> None:
    found = np.array([[5, 1, 2], [3, 4, 9], [7, 8, 2]])
    assert vi.without(found, np.array([5, 9, 0]), 2).tolist() == [[1, 2], [3, 4], [7, 8]]
    assert vi.overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])) == 0.75


def test_expansion_by_hand() -> None:
    x = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    index = vi.empty_index("Flat", 2, "cosine")
    vi.fill(index, x, 0)
    query = np.array([[0.8, 0.6]], np.float32)  # its cosines are 0.8, 0.96, 0.6, -0.8
    average = query + x[1] + x[0]
    np.testing.assert_allclose(vi.expanded(index, query, 2, 0, "cosine"), average / np.linalg.norm(average), atol=1e-6)
    weighted = query + 0.96**3 * x[1] + 0.8**3 * x[0]
    expected = weighted / np.linalg.norm(weighted)
    np.testing.assert_allclose(vi.expanded(index, query, 2, 3, "cosine"), expected, atol=1e-6)


def test_bad_types_are_told() -> None:
    with pytest.raises(JobError, match="type 'Foo': faiss cannot make it for vectors of 16: could not parse"):
        vi.empty_index("Foo", 16, "l2")
    with pytest.raises(JobError, match="faiss cannot make it for vectors of 16"):
        vi.empty_index("IVF16,PQ5", 16, "l2")
    with pytest.raises(JobError, match=r"n_samples=500 should be >= 1000 to train an index of 1000 lists"):
        vi.training_rows(vi.empty_index("IVF1000,Flat", 16, "l2"), 500)
