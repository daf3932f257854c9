"""Neighbouring parts of one file are one request, and every row has its own bytes or its own reason."""

from __future__ import annotations

import io

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support import AS_IT_IS, ObjectStore

from clipray.job import Model
from clipray.models.resolve import resolve
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.merged_ranges import GAP_BYTES, PIECE_BYTES, merge_ranges
from clipray.pipelines.spec import ImageSpec, Limits
from clipray.storage.uris import split_byte_range, with_byte_range
from clipray.tables.reasons import Rejected

TAR = "s3://bucket/a.tar"


def merged(*parts: tuple[int, int], max_bytes: int = 2 * PIECE_BYTES) -> list[list[int]]:
    """Rows of each piece."""
    return [sorted(piece.parts) for piece in merge_ranges([with_byte_range(TAR, *part) for part in parts], max_bytes)]


def test_what_is_near_is_one_piece_and_what_is_far_is_not() -> None:
    assert merged((0, 10), (10, 10), (20 + GAP_BYTES, 10)) == [[0, 1, 2]]
    assert merged((0, 10), (10, 10), (21 + GAP_BYTES, 10)) == [[0, 1]]
    assert merged((5_000_000, 9), (0, 9), (5_000_010, 9), (9, 9)) == [[1, 3], [0, 2]]
    assert merged((0, 1_000), (10, 10), (1_000 + GAP_BYTES, 10), (0, 1_000)) == [
        [0, 1, 2, 3]
    ]  # one in another, and twice
    half = PIECE_BYTES // 2
    assert merged((0, half), (half, half), (2 * half, half), (3 * half, half + 1)) == [[0, 1]]
    assert merged((0, PIECE_BYTES + 1), (PIECE_BYTES + 1, 5)) == []
    assert merged((0, 10), (10, 20), (30, 0), (30, 10), max_bytes=10) == [[0, 3]]


def test_other_rows_are_left_alone() -> None:
    part = "#bytes=0-9"
    assert (
        merge_ranges([None, f"/a.tar{part}", f"/a.tar{part}", TAR, TAR, f"{TAR}{part}", f"s3://b/b{part}"], 100) == []
    )


def test_a_piece_holds_the_bytes_of_its_rows() -> None:
    data = np.random.default_rng(0).bytes(1_000_000)
    parts = [(int(offset), int(size)) for offset, size in np.random.default_rng(1).integers(1, 60_000, (500, 2))]
    rows = set()
    for piece in merge_ranges([with_byte_range(TAR, *part) for part in parts], 100_000):
        where = split_byte_range(piece.uri)[1]
        assert where
        assert where.size == piece.size <= PIECE_BYTES
        held = data[where.first : where.last + 1]
        for row, part in piece.parts.items():
            offset, size = parts[row]
            assert held[part] == data[offset : offset + size]
        assert not rows & set(piece.parts)
        rows |= set(piece.parts)
    assert rows == set(range(500))


def image(number: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 251, 0, 0)).save(sink, "BMP")
    return sink.getvalue()


def test_a_thousand_images_of_a_tar_cost_a_few_requests(object_store: ObjectStore, s3: str) -> None:
    """In any order, beside whole files, with parts behind the end and one that is no image."""
    images = [image(number) for number in range(1_000)]
    pack = b"".join(data + bytes(50_000 if n == 500 else 300) for n, data in enumerate(images))
    starts = np.cumsum([0, *(len(data) + (50_000 if n == 500 else 300) for n, data in enumerate(images))]).tolist()
    fs = fsspec.filesystem("s3")
    fs.pipe({f"{s3}/merged/a.tar": pack, f"{s3}/merged/b.bmp": image(7)})
    uris = [with_byte_range(f"{s3}/merged/a.tar", starts[n], len(data)) for n, data in enumerate(images)]
    uris += [f"{s3}/merged/b.bmp", with_byte_range(f"{s3}/merged/a.tar", starts[3] + 9, 40), f"{uris[-1]}9", None]
    expected = [*(n % 251 for n in range(1_000)), 7, "not_an_image", "too_many_bytes", "no_source"]
    order = np.random.default_rng(2).permutation(len(uris))
    limits = Limits(schemes=("s3",), max_bytes=100_000)
    loader = ImageLoader(ImageSpec(model=resolve(Model(name="demo")), limits=limits, schema=pa.schema([]), threads=2))
    before = len(object_store.requests)
    loaded = list(loader.load(pa.table({"uri": [uris[n] for n in order]}), 16, [AS_IT_IS] * len(uris)))
    assert [colour_or_reason(item) for item in loaded] == [expected[n] for n in order]
    assert len(object_store.requests) - before <= 4
    assert loader._fetched.held == 0


@pytest.mark.parametrize("trouble", ["cut", "gone", "short"])
def test_where_a_piece_fails_each_row_has_its_own_outcome(object_store: ObjectStore, s3: str, trouble: str) -> None:
    images = [image(number) for number in range(20)]
    pack = b"".join(images)
    size = len(images[0])
    url = f"{s3}/merged/{trouble}.tar"
    if trouble != "gone":
        fsspec.filesystem("s3").pipe_file(url, pack[: -size - 1] if trouble == "short" else pack)
    uris = [with_byte_range(url, n * size, size) for n in range(20)]
    limits = Limits(schemes=("s3",))
    loader = ImageLoader(ImageSpec(model=resolve(Model(name="demo")), limits=limits, schema=pa.schema([]), threads=2))
    object_store.cut = 2 if trouble == "cut" else 0
    try:
        loaded = list(loader.load(pa.table({"uri": uris}), 16, [AS_IT_IS] * 20))
    finally:
        object_store.cut = 0
    expected: list[int | str] = list(range(20))
    if trouble == "short":
        expected[18:] = ["truncated", "truncated"]
    if trouble == "gone":
        expected = ["not_found"] * 20
    assert [colour_or_reason(item) for item in loaded] == expected
    assert loader._fetched.held == 0


def colour_or_reason(item: DecodedImage | Rejected) -> int | str:
    return item.reason if isinstance(item, Rejected) else int(item.pixels[0, 0, 0])
