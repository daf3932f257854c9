"""The model of an index, which encodes queries: words and images that are no rows of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipray import tables
from clipray.errors import JobError, ManifestError, ModelError, SchemaError
from clipray.inputs.vector_column import layer_of
from clipray.job import SCHEMES, Model
from clipray.storage.folder import absolute

if TYPE_CHECKING:
    from clipray.models.image_encoder import ImageEncoder
    from clipray.models.resolve import ResolvedModel
    from clipray.models.text_encoder import TextEncoder

AT_ONCE = 32  # texts or images in a batch


class QueryEncoder:
    """Loads each tower when it is first needed, and once. Thread-safe: one query is encoded at a time.

    Args:
        index: the index's name. record: of it.
        model: that of the index, where its record does not say where to find it.
        precision: as of an `Encoder`.

    Attributes:
        why_not: why words and new images cannot be compared with the index's vectors; "" where they can.
    """

    def __init__(self, index: str, record: tables.Record, model: Model | None, precision: str) -> None:
        self._index, self._recorded, self._model = index, record.provenance.get("model"), model
        self._precision = precision
        self.why_not = _why_not(index, record)
        self._loading, self._encoding = threading.RLock(), threading.Lock()
        self._resolved: ResolvedModel | None = None
        self._texts: TextEncoder | None = None
        self._images: ImageEncoder | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the next query need not wait for a tower: that of texts, or of images where a model has no other."""
        has_text = self._resolved is None or self._resolved.has_text
        return (self._texts if has_text else self._images) is not None

    def resolved(self) -> ResolvedModel:
        """The model. Raises SchemaError: `why_not`. ModelError, JobError: the model cannot be had, or is another."""
        if self.why_not:
            raise SchemaError(self.why_not)
        with self._loading:
            if self._resolved is None:
                self._resolved = self._resolve()
            return self._resolved

    def texts(self) -> TextEncoder:
        """The text tower. Raises as `resolved`; ModelError: the model has none."""
        model = self.resolved()
        if not model.has_text:
            raise ModelError(
                f"index {self._index} is of {model.name}, a vision model without a text tower: "
                "search with --image PATH or --like ID"
            )
        with self._loading:
            if self._texts is None:
                from clipray.models.text_encoder import TextEncoder

                self._texts = TextEncoder(model, precision=self._precision, batch_size=AT_ONCE)
            return self._texts

    def images(self) -> ImageEncoder:
        """The image tower. Raises as `resolved`."""
        model = self.resolved()
        with self._loading:
            if self._images is None:
                from clipray.models.image_encoder import ImageEncoder

                self._images = ImageEncoder(model, precision=self._precision, batch_size=AT_ONCE)
            return self._images

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of unit length. Raises as `texts`."""
        from clipray.analysis.tensors import few_threads

        encoder = self.texts()
        with self._encoding, few_threads():
            return encoder.encode(texts)[0]

    def encode_images(self, images: Sequence[bytes | str]) -> np.ndarray:
        """(n, d) float32 of unit length. Raises as `resolved`; ManifestError: a bad image, with the reason.

        Args:
            images: bytes of image files, or paths or URLs.
        """
        from clipray.analysis.tensors import few_threads

        pixels = self._pixels(images)
        encoder = self.images()
        with self._encoding, few_threads():
            return encoder.encode(pixels).vectors["clip"]

    def is_of(self, model: Model) -> bool:
        """Whether these are the settings of its model, and words and images can be encoded."""
        if self.why_not or self._recorded is None:
            return False
        try:
            return (self._model or _model_of(self._recorded)) == model
        except JobError:  # of a config file of its own
            return False

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[QueryEncoder]:
        """Its towers for the time of the block, in which no query is encoded."""
        with self._encoding:
            yield self

    def _pixels(self, images: Sequence[bytes | str]) -> np.ndarray:
        """(n, height, width, 3) uint8."""
        from clipray.models.preprocess import preprocess_of
        from clipray.pipelines.decode import load_image, prepare_pillow
        from clipray.pipelines.spec import Limits
        from clipray.tables.reasons import Rejected

        prepare_pillow()
        limits = Limits(schemes=SCHEMES)
        preprocess = preprocess_of(self.resolved(), limits.max_pixels)
        pixels = []
        for image in images:
            uri, data = (absolute(image), None) if isinstance(image, str) else (None, image)
            loaded = load_image(uri, data, limits, preprocess)
            if isinstance(loaded, Rejected):
                where = image if isinstance(image, str) else f"an image of {len(image)} bytes"
                raise ManifestError(f"{where}: {loaded.reason}: {loaded.message}")
            pixels.append(loaded.pixels)
        return np.stack(pixels)

    def _resolve(self) -> ResolvedModel:
        from clipray.models.resolve import resolve

        recorded = self._recorded
        assert recorded is not None  # else there is a `why_not`
        resolved = resolve(self._model or _model_of(recorded))
        if resolved.identity()["weights"] != recorded["weights"]:
            raise ModelError(
                f"index {self._index} was made with other weights of {recorded['name']}: {recorded['weights'][:23]}…"
            )
        return resolved


def _why_not(index: str, record: tables.Record) -> str:
    """Why an index cannot be searched with words and new images; "" if it can."""
    recorded, space = record.provenance.get("model"), dict(record.provenance["space"])
    layer = layer_of(space)
    if recorded and layer == "output":
        return ""
    held = f"components of {record.inputs['input']}" if "reduce" in space else f"vectors of layer {layer!r}"
    held = held if recorded or "reduce" in space else "vectors of which no model is known"
    return (
        f"index {index} holds {held}: words and new images cannot be compared with these; "
        "search with --like ID, or make an index over a model's `output`"
    )


def _model_of(recorded: dict[str, Any]) -> Model:
    """The settings of the model in a table's record."""
    if recorded["name"] in ("demo", "demo-rn"):
        return Model(name=recorded["name"])
    if recorded.get("config"):
        raise JobError(
            f"the model {recorded['name']} has a config file of its own: name it with --model {recorded['config']} --pretrained …"
        )
    pretrained = "random" if str(recorded["weights"]).startswith("random:") else recorded["pretrained"]
    return Model(name=recorded["name"], pretrained=pretrained, seed=recorded["seed"])
