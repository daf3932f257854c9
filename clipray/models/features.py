"""The features of a job from one forward pass: layers tapped and pooled on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipray.analysis.normalize import l2_normalize_tensor
from clipray.job import Feature
from clipray.models import pooling
from clipray.models.layers import Taps

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class Features(Generic[Array]):
    """The encoded features of b images of one size.

    Attributes:
        vectors: (b, d) float32 by feature.
        cells: (height, width) of the map that regions come from; None where no feature has regions. covered_px: the
            part of the input that they divide: patches of 14 px leave 6 of 384 px unread.
        grid: (R, 5) int32 `scale, top, left, bottom, right` in its cells. regions: (b, R, c) float32, a vector each.
        boxes: (K, c) float32, one vector for each box.
    """

    vectors: dict[str, Array]
    cells: tuple[int, int] | None = None
    covered_px: tuple[int, int] | None = None
    grid: np.ndarray | None = None
    regions: Array | None = None
    boxes: Array | None = None


def joined(parts: Sequence[Features[Tensor]]) -> Features[np.ndarray]:
    """Batches of one size, one after the other, on the CPU."""

    def join(tensors: list[Tensor | None]) -> np.ndarray | None:
        arrays = [t.cpu().numpy() for t in tensors if t is not None]
        return np.concatenate(arrays) if arrays else None

    vectors = {name: np.concatenate([part.vectors[name].cpu().numpy() for part in parts]) for name in parts[0].vectors}
    regions, boxes = join([part.regions for part in parts]), join([part.boxes for part in parts])
    return Features(vectors, parts[0].cells, parts[0].covered_px, parts[0].grid, regions, boxes)


class FeatureNetwork(torch.nn.Module):
    """An image tower with a job's features on top.

    Args:
        tower: what `image_tower` returns.
        features: by column name.
        normalize: whether vectors whose feature has `l2_after: None` are L2-normalised.

    Raises:
        ModelError: the tower has no such layer.
    """

    def __init__(self, tower: torch.nn.Module, features: Mapping[str, Feature], normalize: bool) -> None:
        super().__init__()
        self.taps = Taps(tower, [feature.layer for feature in features.values()])
        self._features, self._normalize = dict(features), normalize

    def forward(self, batch: Tensor, boxes: Tensor | None = None, owner: Tensor | None = None) -> Features[Tensor]:
        """Encode a batch.

        Args:
            batch: (b, 3, height, width), normalised, in the tower's dtype.
            boxes: (K, 4) float32 x1, y1, x2, y2 in px of `batch`. owner: (K,) int64, each box's image in `batch`.
        """
        maps = self.taps(batch)
        unit = {name: _unit_cells(maps[name]) for name in {f.layer for f in self._features.values() if _cells(f)}}
        vectors: dict[str, Tensor] = {}
        regional = Features(vectors)
        for name, feature in self._features.items():
            x = unit[feature.layer] if _cells(feature) else maps[feature.layer].float()
            if feature.pooling is None:  # the vector of the tower
                vectors[name] = self._finished(feature, x)
                continue
            height, width = x.shape[2:]
            plain: pooling.Pooling = "mac" if feature.pooling == "rmac" else feature.pooling  # over one region's cells
            grid = regions = None
            if feature.pooling == "rmac" or feature.regions in (True, "grid"):
                grid = pooling.region_grid(height, width, feature.levels, feature.overlap)
                regions = pooling.pool_regions(x, grid, plain, feature.p)  # (b, R, c)
            if feature.pooling == "rmac" and regions is not None:
                pooled = pooling.rmac_from_regions(regions)
            else:
                pooled = pooling.pool_map(x, plain, feature.p)
            vectors[name] = self._finished(feature, pooled)
            if feature.regions:
                of_boxes, covered = None, self.taps.covered_px(batch.shape)
                if feature.regions != "grid" and boxes is not None and owner is not None:
                    cells = boxes * boxes.new_tensor([width / covered[1], height / covered[0]] * 2)
                    of_boxes = self._finished(feature, pooling.pool_boxes(x, cells, owner, plain, feature.p))
                of_grid = None
                if feature.regions != "boxes" and regions is not None:
                    of_grid = self._finished(feature, regions)
                regional = Features(vectors, (height, width), covered, grid, of_grid, of_boxes)
        return regional

    def _finished(self, feature: Feature, vectors: Tensor) -> Tensor:
        unit = self._normalize if feature.l2_after is None else feature.l2_after
        return l2_normalize_tensor(vectors) if unit else vectors


def _unit_cells(x: Tensor) -> Tensor:
    """(b, c, h, w) with cells of unit length; channels lie last in memory, which is faster to normalise and to pool."""
    return l2_normalize_tensor(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _cells(feature: Feature) -> bool:
    """Whether the cells of the feature's map are normalised before they are pooled."""
    return feature.pooling is not None and feature.l2_before
