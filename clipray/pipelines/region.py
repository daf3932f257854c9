"""Images with boxes to a vector for each box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter

from clipray.job import OF_BOXES, VECTOR, EmbedRegions
from clipray.models.geometry import Geometry, geometry, scaled_size, squashed
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import RGB_BYTES, Preprocess, preprocess_of, too_large_scaled
from clipray.pipelines.block_encoder import BlockEncoder, Row
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.region_boxes import Boxes, RawBoxes, box_regions, reject_boxes, sort_boxes
from clipray.pipelines.spec import RegionSpec, Report
from clipray.tables.reasons import Rejected

COPIES = {"crop": 1, "blur": 2, "circle": 1}  # of the whole image that a prompt makes at most
VIEWS_PER_IMAGE = 4  # that a chunk is sized for, where each box is an image of its own

ImageAndRow = tuple[DecodedImage, dict[str, Any]]


class RegionBlockEncoder(BlockEncoder[RegionSpec, ImageEncoder, ImageAndRow]):
    """Manifest rows -> rows of `region_pictures` with their regions.

    An image is decoded once for all its boxes. With `foveal` and `none` it is one image for the network too; the other
    prompts make one of each box, in the decoding threads.
    """

    def __init__(self, spec: RegionSpec, report: Report) -> None:
        self.how = spec.how
        self._foveal = self.how.prompt == "foveal"
        self._drawn = self.how.prompt in COPIES
        self.inputs_per_row = VIEWS_PER_IMAGE if self._drawn else 1
        super().__init__(spec, report, partial(ImageEncoder, foveal=self.how.foveal if self._foveal else None))
        preprocess = spec.model.preprocess
        self._preprocess = squashed(preprocess) if self.how.preprocess == "squash" else preprocess
        model = replace(spec.model, preprocess=self._preprocess)
        self._to_pixels = preprocess_of(model, spec.limits.max_pixels)
        self._loader = ImageLoader(spec)

    def load(self, block: pa.Table) -> Iterator[ImageAndRow | Rejected]:
        rows = block.select(["boxes", *(name for name in OF_BOXES if name in block.column_names)]).to_pylist()
        rejected = [rejection(row, self.how.max_regions) for row in rows]
        ways = (self._way(row["boxes"]) for row in rows)
        for image, row in zip(self._loader.load(block, self.ahead, ways, rejected), rows, strict=True):
            yield image if isinstance(image, Rejected) else (image, row)

    def encode(self, items: Sequence[ImageAndRow]) -> list[Row]:
        boxes = [self._sorted(row["boxes"], image.height, image.width) for image, row in items]
        vectors = self._vectors([image.pixels for image, _ in items], boxes)
        starts = np.cumsum([len(b.number) for b in boxes])[:-1]
        return [
            Row({"height": image.height, "width": image.width}, box_regions(b, x, _columns(row, b)))
            for (image, row), b, x in zip(items, boxes, np.split(vectors, starts), strict=True)
        ]

    def _vectors(self, pixels: list[np.ndarray], boxes: list[Boxes]) -> np.ndarray:
        """(K, d) float32, of all boxes of all images."""
        if self._foveal:
            of_boxes = self.encoder.encode(np.stack(pixels), [b.on_input for b in boxes]).boxes
            assert of_boxes is not None
            return of_boxes
        if not self._drawn:
            whole = self.encoder.encode(np.stack(pixels)).vectors[VECTOR]
            return np.repeat(whole, [len(b.number) for b in boxes], axis=0)
        drawn = np.concatenate(pixels)
        return self.encoder.encode(drawn).vectors[VECTOR] if len(drawn) else np.zeros((0, self.spec.model.embed_dim))

    def _geometry(self, height: int, width: int) -> Geometry:
        """A box that is cut out is seen wherever it lies."""
        return geometry(height, width, squashed(self._preprocess) if self.how.prompt == "crop" else self._preprocess)

    def _sorted(self, raw: RawBoxes, height: int, width: int) -> Boxes:
        """The boxes of an image of `height` x `width` px; one too thin to be cut out and scaled is rejected alone."""
        boxes = sort_boxes(raw, self._geometry(height, width))
        if self.how.prompt != "crop":
            return boxes
        return reject_boxes(boxes, "too_many_pixels", [self._too_thin(box) for box in boxes.original.tolist()])

    def _too_thin(self, box: list[float]) -> str | None:
        height, width = _sides(box)
        scaled = scaled_size(height, width, self._preprocess)
        return too_large_scaled(height, width, scaled, self.spec.limits.max_pixels)

    def _way(self, raw: RawBoxes) -> Preprocess:
        """How an image is preprocessed: (H, W, 3), or (K, H, W, 3) where each good box is an image of its own."""
        if not self._drawn:
            return self._to_pixels

        def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
            boxes = self._sorted(raw, height, width).original
            pixels = [self._to_pixels(view) for view in views(image, boxes, self.how)]
            return np.stack(pixels) if pixels else np.zeros((0, *self.spec.model.image_size, 3), np.uint8)

        def scratch_bytes(height: int, width: int) -> int:
            copies = COPIES[self.how.prompt] * RGB_BYTES * height * width
            if self.how.prompt != "crop":
                return copies + self._to_pixels.scratch_bytes(height, width)
            sides = [_sides(box) for box in self._sorted(raw, height, width).original.tolist()]
            return copies + max((self._to_pixels.scratch_bytes(*side) for side in sides), default=0)

        return Preprocess(to_pixels, scratch_bytes)


def _sides(box: list[float]) -> tuple[int, int]:
    """Height and width in px of what is cut out for a box."""
    left, top, right, bottom = whole_px(box)
    return bottom - top, right - left


def rejection(row: dict[str, Any], max_regions: int) -> Rejected | None:
    """Why a manifest's row cannot be worked on, from its boxes and the lists that go with them."""
    count = len(row["boxes"] or ())
    lists = {name: row[name] for name in OF_BOXES if row.get(name)}
    if lists and not count:
        return Rejected("manifest", "no_boxes", f"`{next(iter(lists))}` without `boxes`: there is nothing to refer to")
    for name, values in lists.items():
        if len(values) != count:
            message = f"`{name}` has {len(values)} entries for {count} boxes; expected one each"
            return Rejected("manifest", "unequal_lists", message)
    if count > max_regions:
        return Rejected("manifest", "too_many_boxes", f"{count} boxes, more than max_regions={max_regions}")
    return None


def _columns(row: dict[str, Any], boxes: Boxes) -> dict[str, list[str | None]]:
    """What the manifest has for each good box, by column of the regions table."""
    numbers = boxes.number.tolist()
    return {column: [row[name][n] if row.get(name) else None for n in numbers] for name, column in OF_BOXES.items()}


def views(image: Image.Image, boxes: np.ndarray, how: EmbedRegions) -> Iterator[Image.Image]:
    """An image for each box, by the prompt `crop`, `blur` or `circle`.

    Args:
        image: RGB. boxes: (K, 4) x1, y1, x2, y2 in px, inside the image.
    """
    short = min(image.size)
    if how.prompt == "blur":  # once for all boxes
        blurred = image.filter(ImageFilter.GaussianBlur(how.blur.radius * short))
    for box in boxes.tolist():
        if how.prompt == "crop":
            yield image.crop(whole_px(box))
        elif how.prompt == "blur":
            view, within = blurred.copy(), whole_px(box)
            view.paste(image.crop(within), within[:2])
            yield view
        else:
            yield circled(image, box, how.circle.colour, max(1, round(how.circle.width * short)))


def whole_px(box: list[float]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches, at least one in each direction."""
    x1, y1 = int(np.floor(box[0])), int(np.floor(box[1]))
    return x1, y1, max(x1 + 1, int(np.ceil(box[2]))), max(y1 + 1, int(np.ceil(box[3])))


def circled(image: Image.Image, box: list[float], colour: str, width_px: int) -> Image.Image:
    """The image with the ellipse that touches the box's sides from within, as in Shtedritski et al. 2023 (arXiv 2304.06712)."""
    view = image.copy()
    x1, y1, x2, y2 = box
    last = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow counts the last pixel in
    ImageDraw.Draw(view).ellipse([x1, y1, *last], outline=colour, width=width_px)
    return view
