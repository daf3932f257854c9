"""Step `embed_texts`: a manifest of texts -> the `texts` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.errors import ManifestError
from clipray.inputs.manifest import Manifest, open_manifest
from clipray.inputs.parquet_files import is_text
from clipray.inputs.row_index import scan
from clipray.job import EmbedTexts
from clipray.job.row_spec import TEXTS
from clipray.pipelines.spec import TextSettings
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext

VECTOR = "embedding"
PICTURE = "image_id"


@dataclass(frozen=True)
class EmbedTextsStep(EncodeStep[EmbedTexts]):
    """A `Step`; see `EncodeStep`."""

    @property
    def widths(self) -> dict[str, int]:
        return {VECTOR: self.model.embed_dim}

    @property
    def schema(self) -> pa.Schema:
        kept = [
            pa.field(name, pa.string()) if name == PICTURE else self.manifest.schema.field(name).with_nullable(True)
            for name in self.keep
        ]
        return tables.arrow_schema("texts", self.widths, element=self.settings.vector_type, extra=kept)

    @property
    def made(self) -> dict[str, Any]:
        return {"features": {VECTOR: "output"}, "normalize": self.settings.normalize}

    def encoder(self, precision: str, device: str, threads: int) -> TextSettings:
        settings = self.settings
        return TextSettings(
            model=self.model,
            schema=self.schema,
            precision=precision,
            batch_size=settings.batch_size,
            normalize=settings.normalize == "l2",
            device=device,
            threads=threads,
        )


def prepare(settings: EmbedTexts, given: StepContext) -> EmbedTextsStep:
    """Open and count the manifest. Raises ManifestError."""
    assert given.job.model is not None
    manifest = open_manifest(settings.manifest, settings.keep, [PICTURE], TEXTS)
    keep = (*_picture(manifest), *settings.keep)
    return EmbedTextsStep(
        settings, given.output, manifest, scan(manifest, keep), given.model(), given.job.model.precision, keep
    )


def _picture(manifest: Manifest) -> list[str]:
    """The column of the picture that a text describes, where there is one."""
    if PICTURE not in manifest.schema.names:
        return []
    kind = manifest.schema.field(PICTURE).type
    if not is_text(kind):
        raise ManifestError(
            f"{manifest.urls[0]}: column `{PICTURE}` is {kind}; expected string: cast it when you write the manifest"
        )
    return [PICTURE]
