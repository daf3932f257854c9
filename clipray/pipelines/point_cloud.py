"""Point clouds to vectors, from depth maps of six views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import ImageColor

from clipray.analysis.depth_maps import EMPTY, depth_maps, painted, view_weights
from clipray.analysis.normalize import l2_normalize
from clipray.job import VECTOR
from clipray.models.image_encoder import ImageEncoder
from clipray.pipelines.block_encoder import BlockEncoder, Row
from clipray.pipelines.cloud_reader import read_cloud
from clipray.pipelines.image_fetch import Fetcher
from clipray.pipelines.image_loader import in_order, sources
from clipray.pipelines.per_host_pool import PerHostPool
from clipray.pipelines.spec import CloudSpec, Report
from clipray.storage.uris import http_host
from clipray.tables.reasons import Rejected

VIEWS = 6


@dataclass(frozen=True)
class Rendered:
    """A cloud's images (6, h, w, 3) uint8, the boxes of their foregrounds (6, 4) xyxy px, the views' weights (6,)."""

    points: int
    pixels: np.ndarray
    boxes: np.ndarray
    weights: np.ndarray


class CloudBlockEncoder(BlockEncoder[CloudSpec, ImageEncoder, Rendered]):
    """Manifest rows -> rows of `clouds`; views are rendered in threads."""

    inputs_per_row = VIEWS

    def __init__(self, spec: CloudSpec, report: Report) -> None:
        self.how = spec.how
        foveal = self.how.foveal if self.how.prompt == "foveal" else None
        super().__init__(spec, report, partial(ImageEncoder, foveal=foveal))
        colours = (self.how.near, self.how.far, self.how.ground)
        self._colours = [np.array(ImageColor.getrgb(colour)[:3]) for colour in colours]
        self._fetcher = Fetcher(spec.limits)
        self._readers = PerHostPool(spec.threads, "render", spec.limits.connections_per_host)

    def load(self, block: pa.Table) -> Iterator[Rendered | Rejected]:
        return in_order((self._submit(uri, raw) for uri, raw in sources(block)), self.ahead)

    def _submit(self, uri: str | None, raw: pa.Scalar | None) -> Callable[[], Rendered | Rejected]:
        host = http_host(uri) if uri is not None else None
        return self._readers.submit(host, self._render, uri, raw).result

    def _render(self, uri: str | None, scalar: pa.Scalar | None) -> Rendered | Rejected:
        try:
            data = self._fetcher.read(uri, scalar.as_py() if scalar is not None else None)
            points = read_cloud(data, self.how.sampled)
            maps = depth_maps(points, self.spec.model.image_size[0], self.how.size, self.how.radius)
            boxes = boxes_of_masks(torch.from_numpy(maps != EMPTY)).numpy()
            return Rendered(len(points), painted(maps, *self._colours), boxes, view_weights(maps, self.how.weights))
        except Rejected as rejected:
            return rejected
        except Exception as error:  # a row is never worth the job
            return Rejected("decode", "undecodable", f"{type(error).__name__}: {error}")

    def encode(self, items: Sequence[Rendered]) -> list[Row]:
        """Of each cloud the weighted sum of its views' unit vectors, a unit vector again."""
        pixels = np.concatenate([cloud.pixels for cloud in items])  # (6 n, h, w, 3)
        boxes = [box[None] for cloud in items for box in cloud.boxes]
        if self.how.prompt == "foveal":
            views = self.encoder.encode(pixels, boxes).boxes
        else:
            views = self.encoder.encode(pixels).vectors[VECTOR]
        assert views is not None
        weights = np.stack([cloud.weights for cloud in items])  # (n, 6)
        vectors = l2_normalize((views.reshape(len(items), VIEWS, -1) * weights[:, :, None]).sum(axis=1))
        return [Row({"points": cloud.points, VECTOR: x}) for cloud, x in zip(items, vectors, strict=True)]


def boxes_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """Mask images (K, height, width), any above 0 -> (K, 4) xyxy in px: the box of the same centre and spread.

    A mask that is a filled box gives that box: a side is √12 standard deviations of the mask's pixels. An empty mask
    gives the whole image.
    """
    inside = (masks > 0).float()
    inside = torch.where(inside.sum((1, 2), keepdim=True) > 0, inside, torch.ones_like(inside))
    sides = []
    for axis, n in ((1, masks.shape[2]), (2, masks.shape[1])):  # x, y
        share = inside.sum(axis) / inside.sum((1, 2))[:, None]  # (K, n)
        at = torch.arange(n, device=masks.device) + 0.5
        mean = (share * at).sum(1)
        spread = (share * (at - mean[:, None]) ** 2).sum(1) + 1 / 12  # a pixel is not a point
        sides.append((mean, (3 * spread).sqrt()))
    return torch.stack([m - s for m, s in sides] + [m + s for m, s in sides], dim=1)
