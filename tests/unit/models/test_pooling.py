"""Pooling against loops over cells, the region grid against grids worked out by hand, boxes against one lit cell."""

from __future__ import annotations

import itertools
import math
import re
from functools import partial

import numpy as np
import pytest
import torch

from clipray.analysis.normalize import l2_normalize_tensor
from clipray.models.pooling import pool_boxes, pool_map, pool_regions, region_grid, rmac_from_regions

SHAPES = [
    (1, 1), (1, 7), (7, 1), (2, 2), (2, 3), (3, 2), (5, 2), (3, 3), (4, 9), (3, 11), (7, 7), (7, 9), (9, 7), (8, 8),
    (13, 20), (20, 13), (14, 14), (7, 22), (16, 12), (24, 24),
]  # fmt: skip


mac, spoc = partial(pool_map, pooling="mac"), partial(pool_map, pooling="spoc")


def gem(x: torch.Tensor, p: float = 3.0, eps: float = 1e-6) -> torch.Tensor:
    return pool_map(x, "gem", p, eps)


def rmac(x: torch.Tensor, levels: int = 2) -> torch.Tensor:
    return rmac_from_regions(pool_regions(x, region_grid(x.shape[2], x.shape[3], levels)))


def random_map(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, height, width)).astype(np.float32))


def slow_grid(height: int, width: int, levels: int) -> list[tuple[int, ...]]:
    """The definition again, for an overlap of 2/5, with neither fractions nor a shared loop over axes."""
    w, spare = min(height, width), max(height, width) - min(height, width)
    m, boxes = 1, []
    for gaps in range(1, spare + 1):  # |(w - spare / gaps) / w - 2/5| is |3 w gaps - 5 spare| / (5 w gaps)
        if m == 1 or abs(3 * w * gaps - 5 * spare) * (m - 1) < abs(3 * w * (m - 1) - 5 * spare) * gaps:
            m = gaps + 1
    for scale in range(1, levels + 1):
        side = math.floor(2 * w / (scale + 1))
        down = scale + m - 1 if height > width else scale
        across = scale + m - 1 if width > height else scale
        for i, j in itertools.product(range(down), range(across)):
            top, left = i * (height - side) // max(down - 1, 1), j * (width - side) // max(across - 1, 1)
            row = (scale, top, left, top + side, left + side)
            boxes += [row] if side and row not in boxes else []
    return boxes


def slow_rmac(x: np.ndarray, levels: int) -> np.ndarray:
    """(c, height, width) -> (c,), cell by cell in float64."""
    total = np.zeros(len(x))
    for _, top, left, bottom, right in slow_grid(*x.shape[1:], levels):
        vector = [max(float(c[i, j]) for i in range(top, bottom) for j in range(left, right)) for c in x]
        total += np.array(vector) / math.sqrt(sum(v * v for v in vector))
    return total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmac_is_the_sum_over_the_regions_cell_by_cell(shape: tuple[int, int]) -> None:
    x = random_map(*shape)
    for levels in (1, 2, 3, 5):
        assert [tuple(row) for row in region_grid(*shape, levels).tolist()] == slow_grid(*shape, levels)
        expected = np.stack([slow_rmac(one, levels) for one in x.numpy()])
        np.testing.assert_allclose(rmac(x, levels), expected, rtol=1e-5, atol=1e-5)


# Worked out by hand: (height, width, levels and perhaps overlap) -> rows.
BY_HAND: dict[tuple[float, ...], list[tuple[int, ...]]] = {
    # w = 7. Scale 1: side 7. Scale 2: side floor(14/3) = 4, two per axis, at 0 and 7 - 4 = 3.
    (7, 7, 2): [(1, 0, 0, 7, 7), (2, 0, 0, 4, 4), (2, 0, 3, 4, 7), (2, 3, 0, 7, 4), (2, 3, 3, 7, 7)],
    # w = 7, 2 to spare. m = 2 overlaps by 5/7, m = 3 by 6/7: m = 2. Scale 1 at 0, 2. Scale 2, side 4: down at 0, 3;
    # across three over 9 - 4 = 5, at 0, floor(2.5) = 2, 5.
    (7, 9, 2): [
        (1, 0, 0, 7, 7), (1, 0, 2, 7, 9),
        (2, 0, 0, 4, 4), (2, 0, 2, 4, 6), (2, 0, 5, 4, 9), (2, 3, 0, 7, 4), (2, 3, 2, 7, 6), (2, 3, 5, 7, 9),
    ],
    # As much overlap as wanted takes m = 4, but there are three positions. Scale 2: across four, at 0, 5/3, 10/3, 5.
    (7, 9, 2, 0.9): [
        *[(1, 0, left, 7, left + 7) for left in (0, 1, 2)],
        *[(2, top, left, top + 4, left + 4) for top in (0, 3) for left in (0, 1, 3, 5)],
    ],
    # w = 2, 3 to spare. m = 2: -1/2, m = 3: 1/4, m = 4: 1/2, which is nearest to 2/5. Scale 1: down four at 0, 1, 2, 3.
    # Scale 2, side floor(4/3) = 1: five down, two across. Scale 3, side 1: six down and three across, ten of them new.
    (5, 2, 3): [
        *[(1, top, 0, top + 2, 2) for top in range(4)],
        *[(scale, top, left, top + 1, left + 1) for scale in (2, 3) for top in range(5) for left in range(2)],
    ],
    # w = 3, 8 to spare. m = 5: 1/3, m = 6: 7/15, both 1/15 away: the smaller. Five over 8, at 0, 2, 4, 6, 8.
    (3, 11, 1): [(1, 0, left, 3, left + 3) for left in (0, 2, 4, 6, 8)],
    # w = 1: seven positions at most, though an overlap of 2/5 would want eleven. Scale 2 would have side 0.
    (1, 7, 3): [(1, 0, left, 1, left + 1) for left in range(7)],
    (1, 1, 4): [(1, 0, 0, 1, 1)],
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_grids_worked_out_by_hand(case: tuple[int, ...]) -> None:
    grid = region_grid(*case)
    assert (grid.dtype, [tuple(row) for row in grid.tolist()]) == (np.int32, BY_HAND[case])


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.9])
def test_every_grid_is_sorted_inside_the_map_and_reaches_its_edges(overlap: float) -> None:
    for height, width in itertools.product(range(1, 24, 2), range(1, 24, 3)):
        grid = region_grid(height, width, 4, overlap)
        rows = [tuple(row) for row in grid.tolist()]
        assert rows == sorted(set(rows))
        for scale in set(grid[:, 0].tolist()):
            _, tops, lefts, bottoms, rights = grid[grid[:, 0] == scale].T
            side = 2 * min(height, width) // (scale + 1)
            assert set(bottoms - tops) == set(rights - lefts) == {side}
            assert (tops.min(), lefts.min(), bottoms.max(), rights.max()) == (0, 0, height, width)
        turned = region_grid(width, height, 4, overlap)[:, [0, 2, 1, 4, 3]]
        assert sorted(tuple(row) for row in turned.tolist()) == rows


def test_whole_map_pooling_against_numpy() -> None:
    x = random_map(5, 8).abs()
    values = x.numpy().astype(np.float64)
    torch.testing.assert_close(mac(x), x.amax((2, 3)))
    np.testing.assert_allclose(spoc(x), values.mean((2, 3)), rtol=1e-5)
    for p in (0.5, 1.0, 3.0, 7.5):
        np.testing.assert_allclose(gem(x, p), (values**p).mean((2, 3)) ** (1 / p), rtol=1e-5)
    np.testing.assert_allclose(gem(x, eps=0.5), np.cbrt((values.clip(0.5) ** 3).mean((2, 3))), rtol=1e-5)


def test_gem_goes_to_mac_and_never_overflows() -> None:
    x = random_map(6, 6).abs() + 0.01
    torch.testing.assert_close(gem(x, 1e5), mac(x), rtol=1e-4, atol=0)
    torch.testing.assert_close(gem(x, math.inf), mac(x))
    torch.testing.assert_close(gem(x * 1e30, 60.0), gem(x, 60.0) * 1e30)
    torch.testing.assert_close(gem(x * 1e-4, 60.0), gem(x, 60.0) * 1e-4)
    assert (torch.stack([gem(x, p) for p in (0.5, 1, 2, 4, 8, 1000)]).diff(dim=0) > 0).all()


@pytest.mark.parametrize("pooling", ["mac", "spoc", "gem"])
def test_regions_and_boxes_move_with_the_map(pooling: str) -> None:
    whole = {"mac": mac, "spoc": spoc, "gem": lambda part: gem(part, 2.5)}[pooling]
    x, (dy, dx) = random_map(12, 15), (4, 6)
    moved = x.roll((dy, dx), (2, 3))
    torch.testing.assert_close(whole(moved), whole(x))
    grid = np.array([[1, 2, 3, 5, 7], [1, 0, 0, 4, 4]], dtype=np.int32)
    vectors = pool_regions(x, grid, pooling, 2.5)
    torch.testing.assert_close(pool_regions(moved, grid + np.array([0, dy, dx, dy, dx]), pooling, 2.5), vectors)
    for i, (_, top, left, bottom, right) in enumerate(grid.tolist()):
        torch.testing.assert_close(vectors[:, i], whole(x[:, :, top:bottom, left:right]))
    boxes, index = torch.tensor([[1.3, 2.1, 6.2, 4.9], [2.0, 1.5, 2.4, 6.5]]), torch.tensor([1, 0])
    moved_boxes = boxes + torch.tensor([dx, dy, dx, dy])
    torch.testing.assert_close(pool_boxes(moved, moved_boxes, index, pooling), pool_boxes(x, boxes, index, pooling))


def test_half_precision_and_channels_last_maps_pool_alike() -> None:
    x = random_map(6, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    plain, box, index = x.float().contiguous(), torch.tensor([[0.5, 0.5, 4.0, 3.0]]), torch.tensor([1])
    for pool in (mac, spoc, gem, rmac, lambda x: pool_boxes(x, box, index)):
        assert pool(x).dtype == torch.float32
        torch.testing.assert_close(pool(x), pool(plain))


def test_the_sum_of_region_vectors_is_not_normalised() -> None:
    vectors = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]])
    torch.testing.assert_close(rmac_from_regions(vectors), torch.tensor([[0.6, 1.8]]))
    torch.testing.assert_close(l2_normalize_tensor(vectors, 1)[0, :, 1], torch.tensor([4.0, 2.0, 0.0]) / math.sqrt(20))


def test_a_box_of_whole_cells_is_pooled_nearly_as_a_region() -> None:
    x = torch.rand(4, 64, 7, 7, generator=torch.Generator().manual_seed(3))
    boxes = torch.tensor([[0, 0, 7, 7], [1, 2, 5, 6], [3, 0, 6, 3], [0, 4, 7, 7]])
    for pooling in ("mac", "spoc", "gem"):
        for n, (left, top, right, bottom) in enumerate(boxes.tolist()):
            region = pool_regions(x[n : n + 1], np.array([[1, top, left, bottom, right]]), pooling)[0, 0]
            box = pool_boxes(x, boxes[n : n + 1], torch.tensor([n]), pooling)[0]
            assert torch.cosine_similarity(region, box, dim=0) > 0.99


def test_boxes_are_pooled_alike_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, index = random_map(9, 7), torch.arange(20) % 2
    boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(1)) * 3 + torch.tensor([0.0, 0.0, 3.5, 3.5])
    whole = pool_boxes(x, boxes, index)
    monkeypatch.setattr("clipray.models.pooling.BOX_BYTES", 1)
    torch.testing.assert_close(pool_boxes(x, boxes, index), whole)


def test_boxes_of_a_constant_map_a_ramp_and_one_lit_cell() -> None:
    boxes, index = torch.tensor([[0, 0, 8, 6], [2, 1, 3, 2], [1.2, 1.4, 6.9, 1.5]]), torch.tensor([0, 1, 1])
    constant = torch.tensor([2.0, 5.0])[:, None, None, None].expand(2, 1, 6, 8)
    for pooling in ("mac", "spoc", "gem"):
        torch.testing.assert_close(pool_boxes(constant, boxes, index, pooling), torch.tensor([[2.0], [5.0], [5.0]]))
    ramp = (torch.arange(8) + 0.5).expand(2, 1, 6, 8)  # each cell says where its centre is
    torch.testing.assert_close(pool_boxes(ramp, boxes, index, "spoc")[:, 0], torch.tensor([4.0, 2.5, 4.05]))
    # The box of exactly the lit cell: per axis 14 points, 1/28, 3/28 … 13/28 from its centre on either side, see the
    # light at 27/28, 25/28 … 15/28; the mean of these is 21/28, and of their squares 457/784.
    lit, box = torch.zeros(2, 1, 6, 8), boxes[1:2]
    lit[1, 0, 1, 2] = 1
    for pooling, value in {"mac": (27 / 28) ** 2, "spoc": 0.75**2, "gem": 457 / 784}.items():
        assert pool_boxes(lit, box, torch.tensor([1]), pooling, p=2).item() == pytest.approx(value)
    assert pool_boxes(lit, box, torch.tensor([0])).item() == 0
    assert pool_boxes(lit, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 1)


X, BOX = random_map(4, 4), torch.tensor([[0.0, 0.0, 2.0, 2.0]])
BAD = {
    "height=0, width=3 should be >= 1 cell": lambda: region_grid(0, 3, 1),
    "levels=0 should be >= 1": lambda: region_grid(7, 7, 0),
    "overlap=1.0 should be in [0, 1)": lambda: region_grid(7, 9, 2, 1.0),
    "overlap=nan should be in [0, 1)": lambda: region_grid(7, 9, 2, math.nan),
    "the grid reaches 7 x 7 cells, the map has 4 x 4": lambda: pool_regions(X, region_grid(7, 7, 2)),
    "the grid has a region without cells": lambda: pool_regions(X, np.array([[1, 2, 0, 2, 4]])),
    "the grid has a region without cells or": lambda: pool_regions(X, np.array([[1, 0, 2, 4, 2]])),
    "pooling='max' is none of mac, spoc, gem": lambda: pool_regions(X, region_grid(4, 4, 1), "max"),
    "p=0, eps=1e-06 should be > 0": lambda: gem(X, 0),
    "x has shape (4, 4), expected (b, channels, height, width)": lambda: mac(X[0, 0]),
    "boxes (1, 4) and image_index (2,) should be (K, 4) and (K,)": lambda: pool_boxes(X, BOX, torch.tensor([0, 1])),
    "image_index should be in [0, 2)": lambda: pool_boxes(X, BOX, torch.tensor([2])),
    "image_index should be in [0, 2": lambda: pool_boxes(X, BOX, torch.tensor([-1])),
    "boxes should be finite": lambda: pool_boxes(X, BOX * math.nan, torch.tensor([0])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()
