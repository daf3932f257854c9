"""faiss indexes: the type that fits, parts that are filled apart, query expansion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from clipray.analysis import vector_index as vi
from clipray.analysis.errors import DataError
from clipray.analysis.recall import Queries, nearest_exactly, recall_at


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
    scores, _ = whole.search(X[:200], 10)
    np.testing.assert_allclose(parts.search(X[:200], 10)[0], scores, atol=1e-5)
    if kind in ("Flat", "IVF32,Flat"):
        nearest = nearest_exactly(X[:200], X, metric, np.arange(len(X)), 10)
        np.testing.assert_allclose(scores, nearest.distances * (1 if metric == "l2" else -1), atol=1e-5)
        assert recall_at(whole, Queries(X[:200], nearest), metric, 10) == 1


def test_graphs_are_not_merged() -> None:
    assert not vi.mergeable(vi.empty_index("HNSW32", 16, "l2"))


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
    with pytest.raises(DataError, match="type 'Foo': faiss cannot make it for vectors of 16: could not parse"):
        vi.empty_index("Foo", 16, "l2")
    with pytest.raises(DataError, match="faiss cannot make it for vectors of 16"):
        vi.empty_index("IVF16,PQ5", 16, "l2")
    with pytest.raises(DataError, match=r"n_samples=500 should be >= 1000 to train an index of 1000 lists"):
        vi.training_rows(vi.empty_index("IVF1000,Flat", 16, "l2"), 500)


def test_lists_on_disk_are_read_by_the_thread_that_searches(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    for index_type in ("Flat", "IVF4,Flat", "RR8,IVF4,Flat"):
        index = vi.empty_index(index_type, 8, "cosine")
        index.train(x)
        index.add(x)
        faiss.write_index(index, str(tmp_path / "index.faiss"))
        mapped = faiss.read_index(str(tmp_path / "index.faiss"), faiss.IO_FLAG_MMAP)
        vi.without_prefetch(mapped)
        ivf = faiss.try_extract_index_ivf(mapped)
        assert ivf is None or faiss.downcast_InvertedLists(ivf.invlists).prefetch_nthread == 0
        assert mapped.search(x[:5], 3)[1].tolist() == index.search(x[:5], 3)[1].tolist()
