"""Step `embed_regions`: images with boxes -> the `regions` table, a CLIP vector for each box.

Images take the way of `embed_images`. Rows are counted by image, in the table `<name>_pictures`. The regions of an image
lie in a shard of the same name, which is written first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from clipray import tables
from clipray.errors import ManifestError
from clipray.inputs.committed_rows import RegionFolders
from clipray.inputs.manifest import Manifest, has_boxes, is_texts, open_manifest
from clipray.job import OF_BOXES, VECTOR, EmbedRegions, RenderDepth
from clipray.job.row_spec import REGION_IMAGES
from clipray.models.resolve import ResolvedModel
from clipray.pipelines.spec import Limits, RegionSpec
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext

Prompted = TypeVar("Prompted", EmbedRegions, RenderDepth)


@dataclass(frozen=True)
class PromptedStep(EncodeStep[Prompted]):
    """The network's output is directed by a prompt, which may draw its attention to a part of the image."""

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        if self.settings.needs_architecture:
            check_model(self.settings, self.model)
        return {VECTOR: self.model.embed_dim}

    def features(self, *names: str) -> dict[str, Any]:
        """The feature's provenance: those of the settings that apply."""
        settings = self.settings.identity()
        return {VECTOR: {"layer": "output", **{name: settings[name] for name in names if name in settings}}}


@dataclass(frozen=True)
class EmbedRegionsStep(PromptedStep[EmbedRegions]):
    """`keep` also holds the lists of boxes and of their texts."""

    @property
    def regions(self) -> RegionFolders:
        return RegionFolders.of(self.output, self.name)

    @property
    def schema(self) -> pa.Schema:
        return tables.arrow_schema("region_pictures", extra=self.extra_fields)

    @property
    def region_schema(self) -> pa.Schema:
        texts = [pa.field(column, pa.string()) for name, column in OF_BOXES.items() if name in self.keep]
        return tables.arrow_schema("regions", self.widths, element=self.settings.vector_type, extra=texts)

    @property
    def row_provenance(self) -> dict[str, Any]:
        settings = self.settings
        features = self.features("prompt", settings.prompt)
        return {"features": features, "preprocess": settings.preprocess, "normalize": settings.normalize}

    def encoder(self) -> RegionSpec:
        settings = self.settings
        return RegionSpec(
            model=self.model,
            limits=Limits.of(settings, settings.max_pixels),
            schema=self.schema,
            normalize=settings.normalize == "l2",
            how=settings,
        )


def check_model(settings: EmbedRegions | RenderDepth, model: ResolvedModel) -> None:
    """Raises ModelError: the network's attention cannot be drawn to a part of the image, or not in these blocks or heads."""
    from clipray.models import foveal, layers

    foveal.check(layers.tower_without_weights(model), settings.foveal)


def open_step(settings: EmbedRegions, context: StepContext) -> EmbedRegionsStep:
    """Open and count the manifest. Raises ManifestError: no images there, no `boxes`, or lists of another type."""
    manifest = open_manifest(settings.manifest, settings.keep, ["boxes", *OF_BOXES], REGION_IMAGES)
    return EmbedRegionsStep.of(settings, context, manifest, (*settings.keep, *_lists(manifest)))


def _lists(manifest: Manifest) -> list[str]:
    """The manifest's columns with an entry for each box."""
    if not has_boxes(manifest):
        columns = ", ".join(manifest.schema.names)
        raise ManifestError(f"{manifest.urls[0]}: `embed_regions` needs a column `boxes`; found: {columns}")
    expected = "list<string>: for each image a text for each box"
    return ["boxes", *(name for name in OF_BOXES if manifest.has(name, is_texts, expected))]
