"""Images to vectors, and to vectors of their regions."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from clipray.models.features import Features
from clipray.models.geometry import Geometry
from clipray.models.image_encoder import ImageEncoder
from clipray.pipelines.block_encoder import BlockEncoder, Row
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.image_loader import ImageLoader, unpacked
from clipray.pipelines.region_boxes import Boxes, ImageRegions, RawBoxes, box_regions, grid_regions, joined, sort_boxes
from clipray.pipelines.spec import ImageSpec, Report
from clipray.tables.reasons import Rejected

BATCHES_OF_SIZES = 4  # that are gathered before images are grouped by size

ImageAndBoxes = tuple[DecodedImage, RawBoxes]


class ImageBlockEncoder(BlockEncoder[ImageSpec, ImageEncoder, ImageAndBoxes]):
    """Manifest rows, or rows with `pixels`, -> rows of `images`."""

    def __init__(self, spec: ImageSpec, report: Report) -> None:
        super().__init__(spec, report, partial(ImageEncoder, features=spec.features))
        self._loader = ImageLoader(spec)
        wants_boxes = any(feature.regions in (True, "boxes") for feature in spec.features.values())
        self._boxes = wants_boxes and "boxes" in spec.schema.names

    @property
    def chunk_rows(self) -> int:
        """Images of many sizes are encoded size by size: the more at once, the fuller the batches."""
        return self.batch_rows * (BATCHES_OF_SIZES if self.spec.keep_aspect else 1)

    def load(self, block: pa.Table) -> Iterator[ImageAndBoxes | Rejected]:
        packed = "pixels" in block.column_names
        images = unpacked(block, self.spec) if packed else self._loader.load(block, self.ahead)
        boxes = block["boxes"].to_pylist() if self._boxes else itertools.repeat(None)
        for image, its_boxes in zip(images, boxes, strict=False):
            yield image if isinstance(image, Rejected) else (image, its_boxes)

    def shape(self, item: ImageAndBoxes) -> Hashable:
        return item[0].pixels.shape

    def encode(self, items: Sequence[ImageAndBoxes]) -> list[Row]:
        pixels = np.stack([image.pixels for image, _ in items])
        if self.spec.region_schema is None:
            regions: Sequence[ImageRegions | None] = [None] * len(items)
            features = self.encoder.encode(pixels)
        else:
            places = [self.spec.geometry(image.height, image.width) for image, _ in items]
            boxes = [sort_boxes(raw, place) for (_, raw), place in zip(items, places, strict=True)]
            features = self.encoder.encode(pixels, [b.on_input for b in boxes] if self._boxes else None)
            regions = _regions(features, places, boxes if self._boxes else None)
        return [
            Row(
                {"height": image.height, "width": image.width, **{name: x[n] for name, x in features.vectors.items()}},
                regions[n],
            )
            for n, (image, _) in enumerate(items)
        ]


def _regions(
    features: Features[np.ndarray], places: Sequence[Geometry], boxes: Sequence[Boxes] | None
) -> list[ImageRegions]:
    """The regions of each image. `features`: of them all, the vectors of boxes one image after the other."""
    assert features.cells is not None
    assert features.covered_px is not None
    starts = np.cumsum([0, *(len(b.number) for b in boxes or ())])
    regions = []
    for n, place in enumerate(places):
        parts = []
        if features.grid is not None and features.regions is not None:
            parts.append(grid_regions(place, features.cells, features.covered_px, features.grid, features.regions[n]))
        if boxes and features.boxes is not None:
            parts.append(box_regions(boxes[n], features.boxes[starts[n] : starts[n + 1]]))
        regions.append(joined(parts))
    return regions
