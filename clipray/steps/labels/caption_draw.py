"""Captions drawn from a whole table of regions, and the mean of their vectors: what a box has with any caption."""

from __future__ import annotations

import functools
import heapq
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from clipray.inputs.key_index import hash_strings, seed_of
from clipray.inputs.vector_column import VectorColumn
from clipray.models.resolve import ResolvedModel
from clipray.steps.base.monitor import Ticker
from clipray.storage.parquet import RowGroup

if TYPE_CHECKING:
    from clipray.models.text_encoder import TextEncoder

CAPTION = "caption"
Draw = tuple[int, str, str]
"""A number drawn for a region, the region's id, its caption."""


def drawn_captions(
    source: VectorColumn, files: Sequence[list[RowGroup]], count: int, random_state: int, ticker: Ticker
) -> list[str]:
    """`count` captions of different regions, or all where there are fewer; drawn by the regions' ids.

    So the same ones are drawn however the rows lie in files.
    """
    items = [(source, row_groups, count, random_state) for row_groups in files]
    draws = itertools.chain.from_iterable(ticker.map_tasks(draw_of_file, items))
    return [caption for _, _, caption in heapq.nsmallest(count, draws)]


def draw_of_file(item: tuple[VectorColumn, list[RowGroup], int, int]) -> list[Draw]:
    """Runs in a worker: the `count` lowest draws of some row groups."""
    source, row_groups, count, random_state = item
    least: list[Draw] = []
    for row_group in row_groups:
        regions = row_group.read([source.ids[-1], CAPTION])
        ids = regions[source.ids[-1]].cast(pa.string())
        numbers = hash_strings(ids, seed_of("captions", random_state)).tolist()
        draws = zip(numbers, ids.to_pylist(), regions[CAPTION].to_pylist(), strict=True)
        captioned = (draw for draw in draws if draw[2] and draw[2].strip())
        least = heapq.nsmallest(count, [*least, *captioned])
    return least


def mean_vector(item: tuple[ResolvedModel, str, str, Sequence[str]]) -> np.ndarray:
    """Runs in a worker: (d,) float32, the mean of the captions' vectors of unit length; see `encode_captions`."""
    mean: np.ndarray = encode_captions(*item).mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def encode_captions(model: ResolvedModel, precision: str, template: str, captions: Sequence[str]) -> np.ndarray:
    """(n, d) float32 of unit length, of captions put in a template."""
    vectors: np.ndarray = _encoder(json.dumps(asdict(model)), precision).encode(
        [template.replace("{}", caption) for caption in captions]
    )[0]
    return vectors


@functools.lru_cache(maxsize=1)
def _encoder(model: str, precision: str) -> TextEncoder:
    """The text tower, once in a worker. model: a `ResolvedModel` as JSON."""
    from clipray.models.text_encoder import TextEncoder

    return TextEncoder(ResolvedModel(**json.loads(model)), precision=precision, batch_size=64)
