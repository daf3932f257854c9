"""Step `embed_images`: a manifest of pictures -> the `images` table. What it is made of, and what of it is on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.encoders.encode_settings import EncodeSettings
from clipray.encoders.images import Limits
from clipray.encoders.resolve import ResolvedModel
from clipray.errors import ManifestError, ModelError
from clipray.job import changes, fingerprint
from clipray.ledger import RegionFolders, Stock, take_stock
from clipray.manifest import Manifest, check_boxes, open_manifest
from clipray.scan import Scan, scan
from clipray.settings import EmbedImages, Model
from clipray.storage import Folder

STARTED = "_started.json"


@dataclass(frozen=True)
class EmbedStep:
    """The step, ready to be looked at or run: its inputs are opened and counted, its model is found."""

    settings: EmbedImages
    output: Folder
    manifest: Manifest
    scan: Scan
    model: ResolvedModel
    precision: str
    widths: dict[str, int]  # of each feature's vectors
    keep: tuple[str, ...]  # columns of the manifest in the table: those that the job names, and used boxes
    keep_aspect: tuple[int, int] | None = None  # (long side, multiple of both sides) in px

    @property
    def table(self) -> Folder:
        return self.output.sub(self.settings.name)

    @property
    def rejects(self) -> Folder:
        return self.output.sub(f"rejects/{self.settings.name}")

    @property
    def regions(self) -> RegionFolders | None:
        """Where the regions go, if a feature has any."""
        if self.settings.region_feature is None:
            return None
        name = self.settings.regions_name
        return RegionFolders(self.output.sub(name), self.output.sub(f"rejects/{name}"))

    @property
    def region_schema(self) -> pa.Schema | None:
        feature = self.settings.region_feature
        vectors = {feature: self.widths[feature]} if feature else {}
        return tables.arrow_schema("regions", vectors, element=self.settings.vector_type) if feature else None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the values of a row."""
        version = tables.table_schema("images")["version"]
        own = {key: value for key, value in self.settings.identity().items() if key != "name"}
        own["keep"] = list(self.keep)
        return {
            "step": "embed_images",
            "schema_version": version,
            "model": {**self.model.identity(), "precision": self.precision},
            **own,
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def schema(self) -> pa.Schema:
        counted = [pa.field("region_count", pa.int32(), nullable=False)] if self.regions else []
        extra = [self.manifest.schema.field(name).with_nullable(True) for name in self.keep]
        return tables.arrow_schema("images", self.widths, element=self.settings.vector_type, extra=[*counted, *extra])


def encode_settings(step: EmbedStep, precision: str, device: str, threads: int) -> EncodeSettings:
    """What each encoder must know of the step."""
    settings = step.settings
    return EncodeSettings(
        model=step.model,
        limits=Limits(settings.max_bytes, settings.max_pixels, settings.fetch_timeout_s, settings.schemes),
        features=settings.features,
        schema=step.schema,
        region_schema=step.region_schema,
        keep_aspect=step.keep_aspect,
        precision=precision,
        batch_size=settings.batch_size,
        normalize=settings.normalize == "l2",
        fast_decode=settings.decode == "fast",
        device=device,
        threads=threads,
    )


def prepare(settings: EmbedImages, output: Folder, spec: Model, model: ResolvedModel) -> EmbedStep:
    """Open and count the manifest, look up the layers.

    Raises:
        ManifestError: of the manifest. ModelError: a layer that the network does not have.
    """
    manifest = open_manifest(settings.manifest, settings.keep)
    keep = (*settings.keep, *_boxes(settings, manifest))
    widths, keep_aspect = _layers(settings, model)
    return EmbedStep(settings, output, manifest, scan(manifest, keep), model, spec.precision, widths, keep, keep_aspect)


def _boxes(settings: EmbedImages, manifest: Manifest) -> list[str]:
    """The manifest's column of boxes, where a feature uses it."""
    feature = settings.features.get(settings.region_feature or "")
    if feature is None or feature.regions == "grid":
        return []
    if "boxes" in manifest.schema.names:
        check_boxes(manifest)
        return ["boxes"]
    if feature.regions == "boxes":
        found = ", ".join(manifest.schema.names)
        raise ManifestError(f"{manifest.urls[0]}: `regions: boxes` needs a column `boxes`; found: {found}")
    return []


def _layers(settings: EmbedImages, model: ResolvedModel) -> tuple[dict[str, int], tuple[int, int] | None]:
    """Width of each feature's vectors, and what `keep_aspect` makes of a picture's sides."""
    wanted = {feature.layer for feature in settings.features.values()}
    if not settings.looks_inside:
        return dict.fromkeys(settings.features, model.embed_dim), None  # seconds sooner: no torch in the driver
    from clipray.encoders import layers

    tower = layers.tower_without_weights(model)
    layers.check_layers(tower, sorted(wanted), model.image_size)
    shapes = layers.layer_shapes(tower, model.image_size)
    shapes |= layers.layer_shapes(tower, model.image_size, sorted(wanted))  # timm's deeper ones are not in the list
    widths = {name: shapes[feature.layer][0] for name, feature in settings.features.items()}
    if settings.preprocess == "model":
        return widths, None
    if reason := layers.allows_size(tower, sorted(wanted), model.image_size):
        raise ModelError(f"preprocess: keep_aspect: {reason}; drop it, or take other layers")
    strides = [round(model.image_size[0] / shape[1]) for shape in shapes.values() if len(shape) == 3]
    return widths, (settings.long_side_px or max(model.image_size), max(strides, default=1))


@dataclass(frozen=True)
class State:
    """What is on disk: `finished`, `partial` (also: to be extended), `absent` or `stale`; `changed` says why stale."""

    kind: str
    stock: Stock | None = None
    changed: tuple[str, ...] = ()


def inspect(step: EmbedStep, *, count: bool = True) -> State:
    """Look at what is on disk without touching it."""
    record = tables.read_record(step.table)
    started = step.table.read_json(STARTED)
    before = record.settings if record else (started or {}).get("settings")
    if before is None and not tables.shard_names(step.table):
        return State("absent")
    if before is None or fingerprint(before) != step.fingerprint:
        return State(
            "stale", changed=tuple(changes(before or {}, step.identity)) or ("it was written by something else",)
        )
    same = record is not None and record.inputs.get("digest") == step.scan.digest
    if record and same and tables.intact(step.table, record) and _regions_intact(step):
        return State("finished")
    stock = (
        take_stock(step.table, step.rejects, step.scan, step.keep, step.fingerprint, regions=step.regions, mend=False)
        if count
        else None
    )
    return State("partial", stock)


def _regions_intact(step: EmbedStep) -> bool:
    if step.regions is None:
        return True
    record = tables.read_record(step.regions.table)
    return record is not None and record.fingerprint == step.fingerprint and tables.intact(step.regions.table, record)
