"""Step `render_depth`: point clouds -> the `clouds` table: a CLIP vector each, of depth maps from six sides.

The vector is the weighted sum of the views' vectors. Its cosine with a text orders texts as the weighted sum of the views'
cosines does, so that the step `label` over it is the view-weighted label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipray.inputs.manifest import open_manifest
from clipray.job import RenderDepth
from clipray.job.row_spec import CLOUDS
from clipray.pipelines.spec import CloudSpec, Limits
from clipray.steps.base.step import StepContext
from clipray.steps.encode.embed_regions import PromptedStep, check_model

__all__ = ["RenderDepthStep", "check_model", "open_step"]


@dataclass(frozen=True)
class RenderDepthStep(PromptedStep[RenderDepth]):
    """Point clouds to vectors."""

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {"features": self.features("prompt", "weights", "foveal"), "normalize": "l2"}

    def encoder(self) -> CloudSpec:
        settings = self.settings
        return CloudSpec(
            model=self.model,
            limits=Limits.of(settings),
            schema=self.schema,
            how=settings,
        )


def open_step(settings: RenderDepth, context: StepContext) -> RenderDepthStep:
    """Open and count the manifest. Raises ManifestError."""
    manifest = open_manifest(settings.manifest, settings.keep, (), CLOUDS)
    return RenderDepthStep.of(settings, context, manifest, settings.keep)
