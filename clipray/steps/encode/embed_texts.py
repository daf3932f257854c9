"""Step `embed_texts`: a manifest of texts -> the `texts` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray.inputs.manifest import CAST, open_manifest
from clipray.inputs.parquet_files import IDS, is_id
from clipray.job import EmbedTexts
from clipray.job.row_spec import TEXTS
from clipray.pipelines.spec import TextSpec
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext

VECTOR = "embedding"
IMAGE = "image_id"


@dataclass(frozen=True)
class EmbedTextsStep(EncodeStep[EmbedTexts]):
    """Texts to vectors."""

    @property
    def widths(self) -> dict[str, int]:
        return {VECTOR: self.model.embed_dim}

    @property
    def kept_fields(self) -> list[pa.Field]:
        return [pa.field(IMAGE, pa.string()) if field.name == IMAGE else field for field in super().kept_fields]

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {"features": {VECTOR: "output"}, "normalize": self.settings.normalize}

    def encoder(self) -> TextSpec:
        return TextSpec(model=self.model, schema=self.schema, normalize=self.settings.normalize == "l2")


def open_step(settings: EmbedTexts, context: StepContext) -> EmbedTextsStep:
    """Open and count the manifest. Raises ManifestError."""
    manifest = open_manifest(settings.manifest, settings.keep, [IMAGE], TEXTS)
    has_image = manifest.has(IMAGE, is_id, f"{IDS}: {CAST}")
    return EmbedTextsStep.of(settings, context, manifest, (*([IMAGE] if has_image else []), *settings.keep))
