"""Step `render_depth`: point clouds -> the `clouds` table: a CLIP vector each, of depth maps from six sides.

The vector is the weighted sum of the views' vectors. Its cosine with a text orders texts as the weighted sum of the views'
cosines does, so that the step `label` over it is the view-weighted label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.inputs.manifest import open_manifest
from clipray.job import VECTOR, RenderDepth
from clipray.job.row_spec import CLOUDS
from clipray.models.resolve import ResolvedModel
from clipray.pipelines.limits import Limits
from clipray.pipelines.spec import CloudSpec
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext


@dataclass(frozen=True)
class RenderDepthStep(EncodeStep[RenderDepth]):
    """Point clouds to vectors."""

    @property
    def widths(self) -> dict[str, int]:
        if self.settings.needs_architecture:
            check_model(self.settings, self.model)
        return {VECTOR: self.model.embed_dim}

    @property
    def schema(self) -> pa.Schema:
        width = {VECTOR: self.model.embed_dim}
        return tables.arrow_schema(
            "clouds", width, element=self.settings.vector_type, extra=[*self.hash_fields, *self.kept_fields]
        )

    @property
    def row_provenance(self) -> dict[str, Any]:
        how = self.settings.identity()
        of_views = {key: how[key] for key in ("prompt", "weights", "foveal") if key in how}
        return {"features": {VECTOR: {"layer": "output", **of_views}}, "normalize": "l2"}

    def encoder(self) -> CloudSpec:
        settings = self.settings
        return CloudSpec(
            model=self.model,
            limits=Limits(settings.max_bytes, 0, settings.fetch_timeout_s, settings.schemes),
            schema=self.schema,
            how=settings,
        )


def check_model(settings: RenderDepth, model: ResolvedModel) -> None:
    """Raises ModelError: the network's attention cannot be turned to the foreground."""
    from clipray.models import foveal, layers

    foveal.check(layers.tower_without_weights(model), settings.foveal)


def open_step(settings: RenderDepth, context: StepContext) -> RenderDepthStep:
    """Open and count the manifest. Raises ManifestError."""
    manifest = open_manifest(settings.manifest, settings.keep, (), CLOUDS)
    return RenderDepthStep.of(settings, context, manifest, settings.keep)
