"""JPEGs that are decoded smaller are scaled by their originals' sides; tables of before keep the way they were begun in."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clipray.job import EmbedImages, Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import Preprocess, preprocess_of
from clipray.models.resolve import resolve
from clipray.pipelines.decode import DecodedImage, load_image
from clipray.pipelines.spec import Limits
from clipray.steps.encode.embed_images import EmbedStep

MODEL = resolve(Model(name="demo"))  # 64 px


def smooth(height: int, width: int) -> bytes:
    """A JPEG of blurred noise, in which a shift shows."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(12))
    low, high = np.asarray(image).min(), np.asarray(image).max()
    sink = io.BytesIO()
    stretched = (np.asarray(image).astype(float) - low) * 255 / (high - low)
    Image.fromarray(stretched.astype(np.uint8)).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def pixels(data: bytes, preprocess: Preprocess, draft_px: int | None) -> np.ndarray:
    picture = load_image(None, data, Limits(), preprocess, draft_px)
    assert isinstance(picture, DecodedImage)
    return picture.pixels.astype(int)


def error(data: bytes, fast: Preprocess, exact: Preprocess) -> float:
    """Root mean square, in levels of 255."""
    return float(np.sqrt(np.mean((pixels(data, fast, 128) - pixels(data, exact, None)) ** 2)))


SIZES = [(513, 1025), (1025, 513), (1030, 1537), (257, 999)]  # sides that no power of two divides


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fast_pixels_are_those_of_the_whole_image_but_for_details(height: int, width: int) -> None:
    data, exact = smooth(height, width), preprocess_of(MODEL)
    by_original, by_rounded = error(data, exact, exact), error(data, preprocess_of(MODEL, rounded=True), exact)
    assert by_original < 1
    assert by_rounded > 1.5 * by_original


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_also_where_the_aspect_is_kept(height: int, width: int) -> None:
    data, exact = smooth(height, width), preprocess_of(MODEL, keep_aspect=(96, 16))
    rounded = preprocess_of(MODEL, keep_aspect=(96, 16), rounded=True)
    by_original, by_rounded = error(data, exact, exact), error(data, rounded, exact)
    assert by_original < 1
    assert by_rounded > by_original


def test_photos_keep_their_vectors(photos: Any) -> None:
    """At 64 px, where the shift was the largest: a cosine of 0.957 before."""
    encoder = ImageEncoder(MODEL, precision="fp32", batch_size=32)
    exact = preprocess_of(MODEL)
    data = [path.read_bytes() for path in sorted(photos.iterdir())[::5]]
    vectors = [
        encoder.encode(np.stack([pixels(one, exact, draft_px) for one in data]).astype(np.uint8)).vectors["clip"]
        for draft_px in (None, 128)
    ]
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.997


@pytest.mark.parametrize(
    ("decode", "before", "scaling"),
    [
        ("fast", None, "original"),  # nothing is there
        ("fast", {"attempt": 1}, None),  # begun or finished by a version before
        ("fast", {"attempt": 1, "draft_scaling": "original"}, "original"),
        ("exact", None, None),
    ],
)
def test_a_table_keeps_the_way_it_was_begun_in(decode: Any, before: dict[str, Any] | None, scaling: str | None) -> None:
    step: Any = SimpleNamespace(settings=EmbedImages(name="images", manifest="m", decode=decode), before=before)
    assert EmbedStep.draft_scaling.fget(step) == scaling  # type: ignore[attr-defined]
