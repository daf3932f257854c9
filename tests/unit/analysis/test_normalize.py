"""Unit vectors, of any length that a float has, against float64."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from clipray.analysis.normalize import l2_normalize, l2_normalize_tensor


def test_unit_vectors_of_any_length() -> None:
    rng = np.random.default_rng(5)
    directions = rng.standard_normal((9, 33))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.array([1.0, 1e-3, 1e18, 1e30, 1e37, 1e-13, 1e-20, 1e-30, 0.0])
    x = (directions * lengths[:, None]).astype(np.float32)
    expected = np.where(lengths[:, None] > 0, directions, 0)
    assert np.allclose(l2_normalize(x), expected, atol=2e-7, rtol=0)
    longer = directions * np.where(lengths == 1e30, 1e300, lengths)[:, None]
    assert np.allclose(l2_normalize(longer), expected, atol=2e-7, rtol=0)
    plain = x[:2] / np.linalg.norm(x[:2], axis=1, keepdims=True)
    assert np.array_equal(l2_normalize(x)[:2], plain)  # the same bits as ever
    assert np.isnan(l2_normalize(np.array([[np.inf, 1.0], [np.nan, 1.0]]))).any(axis=1).all()
    assert l2_normalize(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_float64_is_rounded_once() -> None:
    x = np.random.default_rng(0).normal(size=(50, 16))
    y = l2_normalize(x)
    assert y.dtype == np.float32
    assert np.array_equal(y, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def test_the_twin_is_that_of_torch() -> None:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    x[1, :, 2] = 0
    for dim in (-1, 1):
        assert torch.equal(l2_normalize_tensor(x, dim), F.normalize(x, dim=dim))
    assert l2_normalize_tensor(x.bfloat16()).dtype == torch.float32
    rows = x[:, :, 0]
    assert np.allclose(l2_normalize_tensor(rows).numpy(), l2_normalize(rows.numpy()), atol=2e-7, rtol=0)
