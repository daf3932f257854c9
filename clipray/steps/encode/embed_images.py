"""Step `embed_images`: a manifest of images -> the `images` table."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.errors import ManifestError, ModelError
from clipray.inputs.committed_rows import RegionFolders
from clipray.inputs.manifest import has_boxes, open_manifest
from clipray.job import EmbedImages, Feature
from clipray.models.resolve import ResolvedModel
from clipray.pipelines.spec import ImageSpec, Limits
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import StepContext

ORIGINAL = "original"  # JPEGs that `decode: fast` decodes smaller are scaled by their originals' sides


@dataclass(frozen=True)
class EmbedStep(EncodeStep[EmbedImages]):
    """`keep` also holds the boxes that a feature uses."""

    @functools.cached_property
    def layers(self) -> Layers:
        """What the network's layers make of the features. Raises ModelError: there is no such layer."""
        return layers_of(self.settings, self.model)

    @property
    def widths(self) -> dict[str, int]:
        return self.layers.widths

    @property
    def regions(self) -> RegionFolders | None:
        if self.settings.region_feature is None:
            return None
        return RegionFolders.of(self.output, self.settings.regions_name)

    @property
    def region_schema(self) -> pa.Schema | None:
        feature = self.settings.region_feature
        vectors = {feature: self.widths[feature]} if feature else {}
        return tables.arrow_schema("regions", vectors, element=self.settings.vector_type) if feature else None

    @property
    def extra_fields(self) -> list[pa.Field]:
        counted = [pa.field("region_count", pa.int32(), nullable=False)] if self.regions else []
        return [*counted, *super().extra_fields]

    @property
    def row_provenance(self) -> dict[str, Any]:
        settings = self.settings
        features = {name: _feature(feature) for name, feature in settings.features.items()}
        scaling = {"draft_scaling": self.draft_scaling} if self.draft_scaling else {}
        how = {"preprocess": settings.preprocess, "normalize": settings.normalize}
        return {"features": features, "decode": settings.decode, **scaling, **how}

    @property
    def draft_scaling(self) -> str | None:
        """With `decode: fast`, by what JPEGs are scaled that were decoded smaller; a table of before keeps its own way."""
        if self.settings.decode != "fast":
            return None
        return ORIGINAL if self.before is None else self.before.get("draft_scaling")

    def encoder(self) -> ImageSpec:
        settings = self.settings
        return ImageSpec(
            model=self.model,
            limits=Limits.of(settings, settings.max_pixels),
            features=settings.features,
            schema=self.schema,
            keep_aspect=self.layers.keep_aspect,
            normalize=settings.normalize == "l2",
            fast_decode=settings.decode == "fast",
            rounded_draft=self.draft_scaling != ORIGINAL,
        )


def _feature(feature: Feature) -> dict[str, Any] | str:
    """A feature in a table's provenance: what was set, or the layer where that says it all."""
    options = feature.model_dump(mode="json", exclude_defaults=True, exclude={"layer"})
    return {"layer": feature.layer, **options} if options else feature.layer


def open_step(settings: EmbedImages, context: StepContext) -> EmbedStep:
    """Open and count the manifest, with its column of boxes where a feature uses it. Raises ManifestError."""
    feature = settings.features.get(settings.region_feature or "", Feature())
    use_boxes = feature.regions in (True, "boxes")
    manifest = open_manifest(settings.manifest, settings.keep, ["boxes"] if use_boxes else ())
    boxes = ["boxes"] if use_boxes and has_boxes(manifest) else []
    if feature.regions == "boxes" and not boxes:
        columns = ", ".join(manifest.schema.names)
        raise ManifestError(f"{manifest.urls[0]}: `regions: boxes` needs a column `boxes`; found: {columns}")
    return EmbedStep.of(settings, context, manifest, (*settings.keep, *boxes))


def check_model(settings: EmbedImages, model: ResolvedModel) -> None:
    """Raises ModelError: the network has no such layer."""
    layers_of(settings, model)


@dataclass(frozen=True)
class Layers:
    """Width of each feature's vectors; `keep_aspect`: (long side, multiple of both sides) in px, where the job asks."""

    widths: dict[str, int]
    keep_aspect: tuple[int, int] | None = None


def layers_of(settings: EmbedImages, model: ResolvedModel) -> Layers:
    """Look the features' layers up, without weights. Raises ModelError: the network has no such layer."""
    wanted = {feature.layer for feature in settings.features.values()}
    if not settings.needs_architecture:
        return Layers(dict.fromkeys(settings.features, model.embed_dim))  # seconds sooner: no torch in the driver
    from clipray.models import layers

    tower = layers.tower_without_weights(model)
    if reason := layers.refusal(tower, sorted(wanted), model.image_size):
        raise ModelError(reason)
    shapes = layers.layer_shapes(tower, model.image_size)
    shapes |= layers.layer_shapes(tower, model.image_size, sorted(wanted))  # timm's deeper ones are not in the list
    widths = {name: shapes[feature.layer][0] for name, feature in settings.features.items()}
    if settings.preprocess == "model":
        return Layers(widths)
    height, width = model.image_size
    if reason := layers.refusal(tower, sorted(wanted), (height, 2 * width)):
        raise ModelError(f"preprocess: keep_aspect: {reason}; drop `keep_aspect`, or take other layers")
    strides = [round(model.image_size[0] / shape[1]) for shape in shapes.values() if len(shape) == 3]
    return Layers(widths, (settings.long_side_px or max(model.image_size), max(strides, default=1)))
