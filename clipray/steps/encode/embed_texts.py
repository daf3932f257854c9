"""Step `embed_texts`: a manifest of texts -> the `texts` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.inputs.manifest import CAST, Manifest, open_manifest
from clipray.inputs.parquet_files import is_text
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
    def schema(self) -> pa.Schema:
        kept = [pa.field(IMAGE, pa.string()) if field.name == IMAGE else field for field in self.kept_fields]
        return tables.arrow_schema("texts", self.widths, element=self.settings.vector_type, extra=kept)

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {"features": {VECTOR: "output"}, "normalize": self.settings.normalize}

    def encoder(self) -> TextSpec:
        return TextSpec(model=self.model, schema=self.schema, normalize=self.settings.normalize == "l2")


def open_step(settings: EmbedTexts, context: StepContext) -> EmbedTextsStep:
    """Open and count the manifest. Raises ManifestError."""
    manifest = open_manifest(settings.manifest, settings.keep, [IMAGE], TEXTS)
    return EmbedTextsStep.of(settings, context, manifest, (*_image(manifest), *settings.keep))


def _image(manifest: Manifest) -> list[str]:
    """The column of the image that a text describes, where there is one."""
    if IMAGE not in manifest.schema.names:
        return []
    manifest.expect(IMAGE, is_text, f"string: {CAST}")
    return [IMAGE]
