"""Blocks of pictures with boxes to blocks of pictures with a vector for each box."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from clipray.job import OF_BOXES, VECTOR
from clipray.models.foveal_encoder import FovealEncoder
from clipray.models.geometry import Geometry, geometry, scaled_size
from clipray.models.image_encoder import ImageEncoder
from clipray.models.load import split_transform, too_large_scaled
from clipray.models.preprocess import RGB_BYTES, Preprocess
from clipray.pipelines.block_encoder import start_encoder
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.decode_ahead import PictureLoader
from clipray.pipelines.image import Row, result_table
from clipray.pipelines.messages import Report, fatal, worker_facts
from clipray.pipelines.region_boxes import Boxes, PictureRegions, refuse_boxes, sort_boxes
from clipray.pipelines.region_prompts import views, whole_px
from clipray.pipelines.spec import RegionSettings
from clipray.tables import fits
from clipray.tables.reasons import Rejected

COPIES = {"crop": 1, "blur": 2, "circle": 1}  # of the whole picture that a prompt makes at most
VIEWS_OF_A_PICTURE = 4  # that a chunk is made for, where each box is a picture of its own


class RegionBlocks:
    """Manifest rows -> rows of `region_pictures` with their regions, with `stage`, `reason`, `message` where one failed.

    A picture is decoded once for all its boxes. With `foveal` and `none` it is one picture for the network too; the other
    prompts make one of each box, in the decoding threads.
    """

    def __init__(self, settings: RegionSettings, report: Report) -> None:
        with fatal(report):
            self.settings, self.report, self.how = settings, report, settings.how
            self._foveal = self.how.prompt == "foveal"
            self._drawn = self.how.prompt in ("crop", "blur", "circle")
            make: Callable[..., ImageEncoder] = (
                partial(FovealEncoder, foveal=self.how.foveal) if self._foveal else ImageEncoder
            )
            self._networks, self._encoder = start_encoder(make, settings)
            squash = {"resize_mode": "squash"} if self.how.preprocess == "squash" else {}
            self._preprocess = {**settings.model.preprocess, **squash}
            model = replace(settings.model, preprocess=self._preprocess)
            self._to_pixels = split_transform(model, settings.limits.max_pixels)[0]
            self._loader = PictureLoader(settings)
            report(worker_facts(self._encoder.facts, settings.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._encode_block(block)

    def _encode_block(self, block: pa.Table) -> pa.Table:
        rows = block.select(["boxes", *(name for name in OF_BOXES if name in block.column_names)]).to_pylist()
        refused = [refusal(row, self.how.max_regions) for row in rows]
        good = [n for n, no in enumerate(refused) if no is None]
        size = max(1, self._encoder.batch_size // (VIEWS_OF_A_PICTURE if self._drawn else 1))
        wanted = block.take(pa.array(good, pa.int64()))
        pictures = self._loader.load(wanted, 2 * size, [self._way(rows[n]["boxes"]) for n in good])
        work = zip(pictures, (rows[n] for n in good), strict=True)
        waiting = []
        while chunk := list(itertools.islice(work, size)):
            waiting.append(self._networks.submit(self._encode, chunk))
        made = dict(zip(good, (row for future in waiting for row in future.result()), strict=True))
        results = [no or made[n] for n, no in enumerate(refused)]
        return result_table(block, results, self.settings)

    def _geometry(self, height: int, width: int) -> Geometry:
        """A box that is cut out is seen wherever it lies."""
        squash = {"resize_mode": "squash"} if self.how.prompt == "crop" else {}
        return geometry(height, width, {**self._preprocess, **squash})

    def _sorted(self, boxes: Any, height: int, width: int) -> Boxes:
        """The boxes of a picture of `height` x `width` px; one too thin to be cut out and scaled is refused alone."""
        found = sort_boxes(boxes, self._geometry(height, width))
        if self.how.prompt != "crop":
            return found
        return refuse_boxes(found, "too_many_pixels", [self._too_thin(box) for box in found.original.tolist()])

    def _too_thin(self, box: list[float]) -> str | None:
        height, width = _sides(box)
        scaled = scaled_size(height, width, self._preprocess)
        return too_large_scaled(height, width, scaled, self.settings.limits.max_pixels)

    def _way(self, boxes: Any) -> Preprocess:
        """How a picture is preprocessed: (H, W, 3), or (K, H, W, 3) where each good box is a picture of its own."""
        if not self._drawn:
            return self._to_pixels

        def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
            good = self._sorted(boxes, height, width).original
            made = [self._to_pixels(view) for view in views(image, good, self.how)]
            return np.stack(made) if made else np.zeros((0, *self.settings.model.image_size, 3), np.uint8)

        def scratch_bytes(height: int, width: int) -> int:
            copies = COPIES[self.how.prompt] * RGB_BYTES * height * width
            if self.how.prompt != "crop":
                return copies + self._to_pixels.scratch_bytes(height, width)
            sides = [_sides(box) for box in self._sorted(boxes, height, width).original.tolist()]
            return copies + max((self._to_pixels.scratch_bytes(*side) for side in sides), default=0)

        return Preprocess(to_pixels, scratch_bytes)

    def _encode(self, chunk: list[tuple[DecodedImage | Rejected, dict[str, Any]]]) -> list[Row | Rejected]:
        start = time.perf_counter()
        found = self._try([(picture, row) for picture, row in chunk if isinstance(picture, DecodedImage)])
        self.report({"stage": "encode", "rows": len(chunk), "seconds": time.perf_counter() - start})
        return [next(found) if isinstance(picture, DecodedImage) else picture for picture, _ in chunk]

    def _try(self, work: list[tuple[DecodedImage, dict[str, Any]]]) -> Iterator[Row | Rejected]:
        """A picture that the network cannot take is refused alone."""
        if not work:
            return iter(())
        try:
            return iter(self._rows(work))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
                raise
            if len(work) > 1:
                return (row for one in work for row in self._try([one]))
            return iter([Rejected("encode", "encode_failed", f"{type(error).__name__}: {error}")])

    def _rows(self, work: list[tuple[DecodedImage, dict[str, Any]]]) -> list[Row | Rejected]:
        given = [self._sorted(row["boxes"], p.height, p.width) for p, row in work]
        counts = [len(boxes.number) for boxes in given]
        vectors = np.split(self._vectors([p for p, _ in work], given), np.cumsum(counts)[:-1])
        assert self.settings.region_schema is not None
        kind = self.settings.region_schema.field(VECTOR).type
        return [
            _row(*one, boxes, x)
            if fits(x, kind)
            else Rejected("encode", "encode_failed", "a vector is not finite, or too large for its column")
            for one, boxes, x in zip(work, given, vectors, strict=True)
        ]

    def _vectors(self, pictures: list[DecodedImage], given: list[Boxes]) -> np.ndarray:
        """(K, d) float32, of all boxes of all pictures."""
        if self._foveal:
            found = self._encoder.encode(np.stack([p.pixels for p in pictures]), [boxes.on_input for boxes in given])
            assert found.boxes is not None
            return found.boxes
        if self._drawn:
            pixels = np.concatenate([p.pixels for p in pictures])
            return (
                self._encoder.encode(pixels).vectors[VECTOR]
                if len(pixels)
                else np.zeros((0, self.settings.model.embed_dim), np.float32)
            )
        whole = self._encoder.encode(np.stack([p.pixels for p in pictures])).vectors[VECTOR]
        return np.repeat(whole, [len(boxes.number) for boxes in given], axis=0)


def _sides(box: list[float]) -> tuple[int, int]:
    """Height and width in px of what is cut out for a box."""
    left, top, right, bottom = whole_px(box)
    return bottom - top, right - left


def refusal(row: dict[str, Any], max_regions: int) -> Rejected | None:
    """Why a manifest's row cannot be worked on, from its lists of boxes and of what is said of them."""
    count = len(row["boxes"] or ())
    said = {name: row[name] for name in OF_BOXES if row.get(name)}
    if said and not count:
        return Rejected("manifest", "no_boxes", f"`{next(iter(said))}` without `boxes`: there is nothing to refer to")
    for name, values in said.items():
        if len(values) != count:
            return Rejected(
                "manifest", "unequal_lists", f"`{name}` has {len(values)} entries for {count} boxes; expected one each"
            )
    if count > max_regions:
        return Rejected("manifest", "too_many_boxes", f"{count} boxes, more than max_regions={max_regions}")
    return None


def _row(picture: DecodedImage, row: dict[str, Any], boxes: Boxes, vectors: np.ndarray) -> Row:
    said = {
        column: [row[name][n] if row.get(name) else None for n in boxes.number.tolist()]
        for name, column in OF_BOXES.items()
    }
    names = [f"b{n}" for n in boxes.number.tolist()]
    scales = np.zeros(len(names), np.int32)
    regions = PictureRegions(names, boxes.original, scales, boxes.clipped, vectors, boxes.refused, said)
    return Row(picture.height, picture.width, {}, regions)
