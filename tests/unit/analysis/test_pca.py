"""Moments against NumPy in float64 however the rows are split and merged, components against scikit-learn's PCA."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache, reduce
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from clipray.analysis.moments import CHUNK_ROWS, Moments, combine, empty, first_bad_rows, moments
from clipray.analysis.pca import Projection, fit
from clipray.errors import SchemaError
from clipray.steps.vectors.reduce import _refuse_overflow

N, D = 20_000, 128


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products as small as these wait longer for a second thread than they take."""
    with threadpool_limits(1):
        yield


@cache
def vectors(dtype: type = np.float32, n: int = N, d: int = D, mean: float = 0.1) -> np.ndarray:
    """(n, d) correlated, unit length, off centre: as embeddings are. Variances from 1 to 1e-4 of the largest."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, d)) * np.geomspace(1, 1e-2, d) @ np.linalg.qr(random.normal(size=(d, d)))[0]
    x += mean * random.normal(size=d)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(dtype)
    x.flags.writeable = False
    return x


@cache
def oracle(dtype: type = np.float32) -> PCA:
    return PCA(svd_solver="full").fit(vectors(dtype).astype(np.float64))


def split(x: np.ndarray, blocks: int, random: np.random.Generator) -> list[np.ndarray]:
    """Rows in random order, cut at random places; some blocks may be empty."""
    cuts = np.sort(random.integers(0, len(x) + 1, blocks - 1))
    return np.split(x[random.permutation(len(x))], cuts)


def merged(states: list[Moments], random: np.random.Generator) -> Moments:
    """By a random tree: any two of what is left, until one is."""
    states = list(states)
    while len(states) > 1:
        i, j = random.choice(len(states), 2, replace=False)
        joined = combine(states[i], states[j])
        states = [state for at, state in enumerate(states) if at not in (i, j)] + [joined]
    return states[0]


def assert_same(a: Moments, b: Moments, rtol: float) -> None:
    """Means to `rtol` of a standard deviation, scatter to `rtol` of its largest value."""
    assert a.n_samples == b.n_samples
    spread = math.sqrt(b.scatter.max() / b.n_samples)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12, atol=rtol * spread)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=0, atol=rtol * b.scatter.max())


def two_pass(x: np.ndarray) -> Moments:
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def assert_components_equal(ours: Projection, theirs: PCA) -> None:
    k = ours.n_components
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_[:k], rtol=1e-4)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_[:k], rtol=1e-4)
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-7)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(k), atol=1e-12)
    cosine = np.abs((ours.components * theirs.components_[:k]).sum(axis=1))  # up to sign
    assert cosine.min() > 1 - 1e-4


@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_components_are_scikit_learns_however_the_rows_are_split_and_merged(dtype: type, blocks: int) -> None:
    for seed in range(2):
        random = np.random.default_rng([blocks, seed])
        states = [moments(block) for block in split(vectors(dtype), blocks, random)]
        for _ in range(3 if blocks > 1 else 1):
            state = merged(states, random)
            assert_components_equal(fit(state, n_components=D), oracle(dtype))
            assert_components_equal(fit(state, n_components=10), oracle(dtype))


def test_moments_agree_in_any_order() -> None:
    random = np.random.default_rng(5)
    states = [moments(block) for block in split(vectors(np.float64), 24, random)] + [empty(D)] * 3
    expected = two_pass(vectors(np.float64))
    trees = [merged(states, random) for _ in range(8)]
    for tree in [*trees, reduce(combine, states), reduce(combine, reversed(states), empty(D))]:
        assert_same(tree, expected, 1e-12)
        assert (tree.scatter == tree.scatter.T).all()
    a, b, c = states[:3]
    assert_same(combine(a, b), combine(b, a), 1e-14)
    assert_same(combine(combine(a, b), c), combine(a, combine(b, c)), 1e-14)
    assert combine(empty(D), a) is a
    assert combine(a, empty(D)) is a


def test_moments_worked_out_by_hand() -> None:
    x = np.array([[1, 5], [3, 5], [5, 8]], dtype=np.float32)
    for state in (moments(x), combine(moments(x[:1]), moments(x[1:])), combine(moments(x[:2]), moments(x[2:]))):
        assert (state.n_samples, state.n_features, state.mean.dtype) == (3, 2, np.float64)
        np.testing.assert_allclose(state.mean, [3, 6], rtol=1e-15)
        np.testing.assert_allclose(state.scatter, [[8, 6], [6, 6]], rtol=1e-15)
    one = moments(x[:1])
    assert (one.n_samples, one.mean.tolist(), one.scatter.tolist()) == (1, [1, 5], [[0, 0], [0, 0]])
    assert moments(x[:0]).n_samples == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS + 7])
def test_a_block_is_not_changed_and_may_lie_anyhow_in_memory(dtype: type, n: int) -> None:
    x = vectors(dtype)[:n]
    for view in (x, x[::-1], np.asfortranarray(x), x[:, ::3]):
        assert_same(moments(view), two_pass(view), 1e-6)


@pytest.mark.parametrize("mean", [1e4, -1e4, 1e6])
def test_large_means_cost_no_digits(mean: float) -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(N, 16)) @ random.normal(size=(16, 16)) + mean * random.uniform(0.5, 1, 16)
    x = x.astype(np.float32)  # rounded once, before the oracle sees it too
    states = [moments(block) for block in split(x, 7, random)]
    assert_same(moments(x), two_pass(x), 1e-6)
    assert_same(merged(states, random), two_pass(x), 1e-6)
    # Also where blocks differ by much more than they vary in themselves.
    far = np.concatenate([x[: N // 2], x[N // 2 :] + np.float32(1000)])
    halves = combine(moments(far[: N // 2]), moments(far[N // 2 :]))
    assert_same(halves, two_pass(far), 1e-6)
    assert_same(moments(far), two_pass(far), 1e-6)
    ours, theirs = (
        fit(moments(x), n_components=8, whiten=True),
        PCA(8, svd_solver="full", whiten=True).fit(x.astype(np.float64)),
    )
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-4)
    z = ours.transform(x)
    np.testing.assert_allclose(z, aligned(theirs.transform(x.astype(np.float64)), z), atol=1e-4)


def test_values_that_float32_cannot_square() -> None:
    x = vectors(np.float32)[:5000, :8]
    for factor in (1e25, 1e-25):
        state = moments(x * np.float32(factor))
        np.testing.assert_allclose(state.scatter / factor**2, moments(x).scatter, rtol=1e-4, atol=1e-5)
        assert len(state.constant_columns) == len(state.bad_columns) == 0
    assert moments(np.float32([[1, 0], [0, 1e-30], [2, 0]])).constant_columns.tolist() == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_constant_columns_are_told_exactly(dtype: type) -> None:
    random = np.random.default_rng(2)
    x = np.array(vectors(dtype)[: CHUNK_ROWS + 500])
    x[:, [3, 50, 99]] = dtype(0.1), dtype(0), dtype(-12345.678)
    x[:, 7] = dtype(0.3)
    x[-1, 7] = np.nextafter(dtype(0.3), dtype(1))  # constant but for one step of one row
    for state in (moments(x), merged([moments(block) for block in split(x, 9, random)], random)):
        assert state.constant_columns.tolist() == [3, 50, 99]
        assert (state.mean[[3, 50, 99]] == x[0, [3, 50, 99]]).all()
        projection = fit(state, n_components=D)
        np.testing.assert_allclose(projection.components[:100, [3, 50, 99]], 0, atol=1e-8)
        assert (projection.variance >= 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bad_rows_and_columns_are_named_without_a_warning(dtype: type) -> None:
    x = np.array(vectors(dtype)[: 2 * CHUNK_ROWS])
    assert first_bad_rows(x).tolist() == []
    assert len(moments(x).bad_columns) == 0
    x[0] = np.finfo(dtype).max  # large, but finite
    assert first_bad_rows(x).tolist() == []
    bad = {7: np.nan, 9: np.inf, CHUNK_ROWS - 1: -np.inf, CHUNK_ROWS: np.nan, CHUNK_ROWS + 5: np.nan, 8000: np.inf}
    for row, value in bad.items():
        x[row, row % 50] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_bad_rows(x).tolist() == sorted(bad)[:5]
        assert first_bad_rows(x, 2).tolist() == [7, 9]
        assert first_bad_rows(x, 100).tolist() == sorted(bad)
        assert first_bad_rows(x[:, ::-1]).tolist() == sorted(bad)[:5]
        state = moments(x[1:])
        assert state.bad_columns.tolist() == sorted({row % 50 for row in bad})
        for joined in (combine(state, moments(x[1:5])), combine(moments(x[1:5]), state)):
            assert joined.bad_columns.tolist() == state.bad_columns.tolist()


def aligned(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Columns of `theirs` with the signs of `ours`."""
    return theirs * np.sign((theirs * ours).sum(axis=0))


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_transform_is_scikit_learns(dtype: type, whiten: bool) -> None:
    x = vectors(dtype)
    projection = fit(moments(x), n_components=40, whiten=whiten)
    z = projection.transform(x)
    assert (z.dtype, z.shape) == (np.float32, (N, 40))
    theirs = PCA(40, svd_solver="full", whiten=whiten).fit(x.astype(np.float64)).transform(x.astype(np.float64))
    np.testing.assert_allclose(z, aligned(theirs, z), atol=1e-3 if whiten else 1e-4)
    for rows in (0, 1, CHUNK_ROWS, CHUNK_ROWS + 1):  # a product of fewer rows may round otherwise
        np.testing.assert_allclose(projection.transform(x[:rows]), z[:rows], atol=1e-5)


def test_transform_leaves_other_rows_alone_when_one_is_bad() -> None:
    projection, x = fit(moments(vectors()), n_components=4), np.array(vectors()[:10])
    x[3, 5] = np.nan
    assert np.flatnonzero(~np.isfinite(projection.transform(x)).all(axis=1)).tolist() == [3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n_components", [10, 100, D])
def test_whitened_covariance_is_the_identity(dtype: type, n_components: int) -> None:
    x = vectors(dtype)
    projection = fit(moments(x), n_components=n_components, whiten=True)
    z = projection.transform(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(z.T), np.eye(n_components), atol=1e-3)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(projection.scale, projection.variance**-0.5)


def test_the_floor_and_the_shrinkage_of_whitening_are_as_written() -> None:
    x = vectors()
    plain = fit(moments(x), n_components=D)
    v, mean = plain.variance, plain.variance.sum() / D
    assert (plain.scale == 1).all()

    def scale(**settings: float) -> np.ndarray:
        return fit(moments(x), n_components=60, whiten=True, **settings).scale

    np.testing.assert_allclose(scale(epsilon=0.1), 1 / np.sqrt(np.maximum(v, 0.1 * v[0]))[:60])
    assert scale(epsilon=0.1).max() == pytest.approx(1 / math.sqrt(0.1 * v[0]))
    np.testing.assert_allclose(scale(shrinkage=0.3), 1 / np.sqrt(0.7 * v + 0.3 * mean)[:60])
    np.testing.assert_allclose(scale(shrinkage=1), 1 / np.sqrt(mean))
    both = 0.5 * v + 0.5 * mean
    np.testing.assert_allclose(scale(epsilon=0.6, shrinkage=0.5), 1 / np.sqrt(np.maximum(both, 0.6 * both[0]))[:60])
    # The same components whatever is done to the scale.
    assert (fit(moments(x), n_components=D, whiten=True, shrinkage=0.5).components == plain.components).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95, 0.999, 1.0])
def test_explained_variance_takes_the_fewest_components_that_reach_it(share: float) -> None:
    projection = fit(moments(vectors()), explained_variance=share)
    sums = oracle().explained_variance_ratio_.cumsum()
    k = projection.n_components
    assert projection.explained_variance_ratio.sum() >= share - 1e-9
    assert k == 1 or projection.explained_variance_ratio[:-1].sum() < share
    assert k == (D if share == 1 else 1 + int((sums < share).sum()))


def test_a_share_that_is_just_reached_is_reached() -> None:
    x = np.vstack([np.eye(10), -np.eye(10)])  # ten directions of a tenth each: sums are near 0.1, 0.2, … in binary
    for k in range(1, 11):
        assert fit(moments(x), explained_variance=k / 10).n_components == k
        assert fit(moments(x), explained_variance=k / 10 - 0.001).n_components == k


def low_rank(dtype: type, n: int = 3000, rank: int = 20) -> np.ndarray:
    random = np.random.default_rng(3)
    return (random.normal(size=(n, rank)) @ random.normal(size=(rank, 64)) + 2).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_of_low_rank(dtype: type) -> None:
    x, theirs = low_rank(dtype), PCA(svd_solver="full").fit(low_rank(np.float64))
    state = moments(x)
    projection = fit(state, n_components=64)
    np.testing.assert_allclose(projection.variance[:20], theirs.explained_variance_[:20], rtol=1e-4)
    assert (projection.variance[20:] < 1e-6 * projection.variance[0]).all()
    np.testing.assert_allclose(projection.components @ projection.components.T, np.eye(64), atol=1e-12)
    assert fit(state, explained_variance=1.0, whiten=True).n_components == 20
    z = fit(state, n_components=20, whiten=True, epsilon=0).transform(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(z.T), np.eye(20), atol=1e-3)
    with pytest.raises(ValueError, match=r"n_components=21 should be <= 20 to be whitened: 3000 vectors of 64 values"):
        fit(state, n_components=21, whiten=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_small_component_counts_but_is_raised_no_more_than_the_floor_allows(dtype: type) -> None:
    x = (np.random.default_rng(8).normal(size=(N, 3)) * np.sqrt([1, 1e-4, 3e-6])).astype(dtype)
    state = moments(x)
    assert fit(state, explained_variance=1.0).n_components == 3
    projection = fit(state, n_components=3, whiten=True)
    v = projection.variance
    np.testing.assert_allclose(projection.scale, 1 / np.sqrt([v[0], v[1], 1e-5 * v[0]]))
    z = projection.transform(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(z.T), np.diag([1, 1, v[2] / v[0] / 1e-5]), atol=1e-3)
    full = fit(state, n_components=3, whiten=True, epsilon=0).transform(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(full.T), np.eye(3), atol=1e-3)


def test_fewer_vectors_than_values() -> None:
    x = vectors()[:30]
    ours, theirs = fit(moments(x), n_components=29, whiten=True), PCA(29, svd_solver="full").fit(x.astype(np.float64))
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-4)
    assert fit(moments(x), explained_variance=1.0).n_components == 29
    two = fit(moments(x[:2]), n_components=1)
    np.testing.assert_allclose(two.transform(x[:2]).ravel() ** 2, np.square(x[0] - x[1]).sum() / 4, rtol=1e-5)


def test_signs_are_those_of_the_largest_coefficients() -> None:
    x = vectors()
    for k, component in enumerate(fit(moments(x), n_components=D).components):
        assert component[np.abs(component).argmax()] > 0, k
    # Turned about, mirrored or in another order, the same vectors have the same components.
    expected = fit(moments(x), n_components=20).components
    for same in (-x, x[::-1], x[np.random.default_rng(4).permutation(N)]):
        np.testing.assert_allclose(fit(moments(same), n_components=20).components, expected, atol=1e-3)
    again = fit(moments(x), n_components=20)
    assert (again.components == fit(moments(np.array(x)), n_components=20).components).all()


def test_of_equal_coefficients_the_first_is_positive() -> None:
    a, b = np.random.default_rng(6).normal(size=(2, 500, 1))
    x = np.hstack([a + 0.1 * b, -a + 0.1 * b])  # along (1, -1) and, less, along (1, 1)
    for rows in (x, -x, x[::-1]):
        components = fit(moments(np.float32(np.vstack([rows, rows[:, ::-1]]))), n_components=2).components
        np.testing.assert_allclose(components, [[math.sqrt(0.5), -math.sqrt(0.5)], [math.sqrt(0.5)] * 2], atol=1e-5)
    for nearly in (1 - 1e-7, 1 + 1e-7):  # as rounding may have it
        components = fit(moments(np.outer([-1.0, 0, 1], [1, -nearly])), n_components=1).components
        np.testing.assert_allclose(components, [[math.sqrt(0.5), -math.sqrt(0.5)]], atol=1e-6)


def test_columns_of_very_different_size() -> None:
    x = (np.random.default_rng(7).normal(size=(N, 6)) * 10.0 ** np.arange(-3, 3) + 5).astype(np.float32)
    np.testing.assert_allclose(
        np.sqrt(moments(x).scatter.diagonal() / (len(x) - 1)), x.astype(np.float64).std(axis=0, ddof=1), rtol=1e-6
    )


X = vectors()[:50]
EQUAL = np.full((9, 4), 0.3, dtype=np.float32)
NAN = np.where(np.arange(D) == 5, np.float32(np.nan), X)


def bad_input() -> Iterator[tuple[str, Callable[[], object]]]:
    state = moments(X)
    yield "n_components=129 should be <= n_features=128", lambda: fit(state, n_components=129)
    yield (
        "n_components=50 should be <= 49: n_samples=50 vectors vary in at most 49 directions around their mean",
        lambda: fit(state, n_components=50),
    )
    yield "n_components=0 should be >= 1", lambda: fit(state, n_components=0)
    yield "n_samples=1 should be >= 2", lambda: fit(moments(X[:1]), n_components=1)
    yield "n_samples=0 should be >= 2", lambda: fit(empty(4), n_components=1)
    yield "all 9 vectors are equal: they have no", lambda: fit(moments(EQUAL), explained_variance=0.9)
    yield (
        "all 9 vectors are equal",
        lambda: fit(combine(moments(EQUAL[:4]), moments(EQUAL[4:])), n_components=1, whiten=True),
    )
    yield (
        "vectors should be finite: NaN or infinite in 1 of 128 columns, first in 5",
        lambda: fit(moments(NAN), n_components=2),
    )
    for share in (0.0, 1.1, -1.0, math.nan):
        yield (
            f"explained_variance={share} should be in (0, 1]",
            lambda share=share: fit(state, explained_variance=share),
        )
    yield "expected one of n_components and explained_variance, found neither", lambda: fit(state)
    yield (
        "expected one of n_components and explained_variance, found both",
        lambda: fit(state, n_components=2, explained_variance=0.5),
    )
    yield "epsilon=-1 should be in [0, 1]", lambda: fit(state, n_components=2, epsilon=-1)
    yield "shrinkage=nan should be in [0, 1]", lambda: fit(state, n_components=2, shrinkage=math.nan)
    constant = np.hstack([X[:, :3], np.zeros((50, 2), np.float32)])
    yield (
        "n_components=4 should be <= 3 to be whitened: 50 vectors of 5 values vary in 3 directions "
        "(2 columns are constant)",
        lambda: fit(moments(constant), n_components=4, whiten=True),
    )
    yield "x has 5 columns, the components were fitted on 128", lambda: fit(state, n_components=2).transform(constant)
    yield "x has shape (128,), expected (n, d) with d >= 1", lambda: moments(X[0])
    yield "x has shape (50, 0), expected (n, d) with d >= 1", lambda: first_bad_rows(X[:, :0])
    yield "x is int64, expected float16, float32 or float64", lambda: moments(np.ones((2, 2), np.int64))
    yield "cannot combine vectors of 128 and of 4 values", lambda: combine(state, empty(4))


BAD = dict(bad_input())


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()


def test_components_that_the_table_cannot_hold_are_refused() -> None:
    ids = pa.table({"image_id": ["a", "b", "c"]})
    y = np.array([[1.0, -2.0], [3.0, -7e4], [65_504.0, 0.0]])
    for kind, named in (("float32", None), ("float16", "'b'")):
        step = SimpleNamespace(
            name="reduced", settings=SimpleNamespace(vector_type=kind), source=SimpleNamespace(ids=("image_id",))
        )
        if named is None:
            _refuse_overflow(step, ids, y)  # type: ignore[arg-type]
        else:
            with pytest.raises(SchemaError, match=f"components beyond 65504, the largest float16, image_id: {named};"):
                _refuse_overflow(step, ids, y)  # type: ignore[arg-type]
