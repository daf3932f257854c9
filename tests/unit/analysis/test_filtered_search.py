"""A search among some rows finds what brute force finds among these rows, with every type of index."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from clipray.analysis import filtered_search
from clipray.analysis.filtered_search import search_among

ROWS, WIDTH, TOP = 2_000, 16, 10
TYPES = ["Flat", "SQ8", "PQ4x4np", "HNSW8", "IVF16,Flat", "IVF16,SQ8", "RR16,IVF16,PQ4x4np", "IVF16_HNSW8,Flat"]


def in_clusters(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (n, d) around 20 centres, and the centre of each."""
    rng = np.random.default_rng(seed)
    centres, cluster = rng.normal(size=(20, WIDTH)), rng.integers(20, size=ROWS)
    x = (centres[cluster] + 0.4 * rng.normal(size=(ROWS, WIDTH))).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), cluster


@pytest.fixture(scope="module")
def indexes() -> dict[str, faiss.Index]:
    x, _ = in_clusters(0)
    faiss.omp_set_num_threads(1)  # which wait for each other on a busy machine
    built = {}
    for name in TYPES:
        built[name] = faiss.index_factory(WIDTH, name, faiss.METRIC_INNER_PRODUCT)
        built[name].train(x)
        built[name].add(x)
    return built


def masks() -> dict[str, np.ndarray]:
    rng, (_, cluster) = np.random.default_rng(1), in_clusters(0)
    return {
        "few": rng.random(ROWS) < 0.01,
        "a third": rng.random(ROWS) < 0.3,
        "one cluster": cluster == 3,
        "one row": np.arange(ROWS) == 77,
        "no row": np.zeros(ROWS, bool),
        "all": np.ones(ROWS, bool),
    }


def exact_scores(index: faiss.Index, queries: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The best scores (q, t) of the rows as the index stores them, the best first."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.make_direct_map()
    scores = queries @ index.reconstruct_n(0, ROWS)[mask].T
    return -np.sort(-scores, axis=1)[:, :TOP]


@pytest.mark.parametrize("gathered_bytes", [0, 2**20])
@pytest.mark.parametrize("n_queries", [4, 20])
@pytest.mark.parametrize("chosen", list(masks()))
@pytest.mark.parametrize("index_type", TYPES)
def test_it_finds_what_brute_force_finds(
    indexes: dict[str, faiss.Index], index_type: str, chosen: str, n_queries: int, gathered_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(filtered_search, "GATHERED_BYTES", gathered_bytes)
    mask, (x, cluster) = masks()[chosen], in_clusters(0)
    queries = x[cluster == 5][:n_queries]  # far from the one cluster
    scores, numbers = search_among(indexes[index_type], queries, TOP, mask)
    assert numbers.shape == (n_queries, min(TOP, mask.sum()))
    assert mask[numbers].all()
    np.testing.assert_allclose(scores, exact_scores(indexes[index_type], queries, mask), atol=2e-5)


@pytest.mark.parametrize("chosen", ["few", "one cluster", "a third"])
@pytest.mark.parametrize("index_type", ["HNSW8", "IVF16,Flat"])
def test_where_it_may_not_compare_all(
    indexes: dict[str, faiss.Index], index_type: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtered_search, "EXACT_BYTES", 0)
    monkeypatch.setattr(filtered_search, "GATHERED_BYTES", 0)
    mask, (x, cluster) = masks()[chosen], in_clusters(0)
    queries = x[cluster == 5][:20]
    scores, numbers = search_among(indexes[index_type], queries, TOP, mask)
    assert mask[numbers].all()
    exact = exact_scores(indexes[index_type], queries, mask)
    assert (scores >= exact[:, -1:] - 2e-5).mean() > 0.9


def test_the_selector_is_freed(indexes: dict[str, faiss.Index]) -> None:
    """FAISS's Python once kept every selector (faiss issue 2996)."""
    mask = np.ones(ROWS, bool)
    for name in ("Flat", "IVF16,Flat", "HNSW8"):
        before = faiss.get_mem_usage_kb()
        wide = np.concatenate([mask, np.zeros(2**23, bool)])  # a bitmap of 1 MiB
        for _ in range(64):
            search_among(indexes[name], in_clusters(0)[0][:1], TOP, wide)
        assert faiss.get_mem_usage_kb() - before < 32 * 1024
