"""Step `embed_images`: a manifest of pictures -> the `images` table. What it is made of, and what of it is on disk."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.encoders.encode_settings import EncodeSettings
from clipray.encoders.images import Limits
from clipray.encoders.resolve import ResolvedModel
from clipray.errors import ManifestError, ModelError
from clipray.job import fingerprint
from clipray.ledger import RegionFolders, regions_of_another, take_stock
from clipray.manifest import Manifest, check_boxes, open_manifest
from clipray.scan import Scan, scan
from clipray.settings import EmbedImages
from clipray.steps.step import Given, Run, State, standing
from clipray.storage import Folder


@dataclass(frozen=True)
class EmbedStep:
    """A `Step`, ready to be looked at or run: its inputs are opened and counted, its model is found."""

    settings: EmbedImages
    output: Folder
    manifest: Manifest
    scan: Scan
    model: ResolvedModel
    precision: str
    keep: tuple[str, ...]  # columns of the manifest in the table: those that the job names, and used boxes

    @functools.cached_property
    def layers(self) -> Layers:
        """What the network's layers make of the features. Raises ModelError: there is no such layer."""
        return layers_of(self.settings, self.model)

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def total(self) -> int:
        return self.scan.rows

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
        vectors = {feature: self.layers.widths[feature]} if feature else {}
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
        return tables.arrow_schema(
            "images", self.layers.widths, element=self.settings.vector_type, extra=[*counted, *extra]
        )

    def inspect(self, *, count: bool = True) -> State:
        state = standing(self.table, self.identity, self.scan.digest)
        if state.kind == "finished" and not _regions_intact(self):
            state = State("partial")
        if state.kind in ("absent", "partial") and (other := self._other_regions()):
            return State("stale", changed=(f"{other} is of another step, choose another `regions_name`",))
        if state.kind != "partial" or not count:
            return state
        return State(
            "partial",
            take_stock(
                self.table, self.rejects, self.scan, self.keep, self.fingerprint, regions=self.regions, mend=False
            ),
        )

    def _other_regions(self) -> str | None:
        return regions_of_another(self.regions, self.fingerprint, self.name) if self.regions else None

    def describe(self, cluster: Any) -> list[str]:
        from clipray.engine.plan import make_plan

        manifest, model = self.manifest, self.model
        return [
            f"{self.name}: manifest of {len(manifest.urls)} file(s), {self.scan.rows} rows, {manifest.bytes / 2**20:.1f} MiB, {self.scan.rejects.num_rows} refused",
            f"{self.name}: {make_plan(self.settings, cluster.cpus, cluster.gpus, cluster.nodes).sentence()}",
            f"{self.name}: model {model.name}, weights {model.weights[:23]}, vectors of {', '.join(f'{width} ({name})' for name, width in self.layers.widths.items())}",
        ]

    def run(self, run: Run) -> tables.Record:
        _ = self.layers  # an unknown one is told before any work
        from clipray.engine.plan import make_plan
        from clipray.engine.progress import Progress
        from clipray.steps.attempt import Attempt

        refused = self.scan.rejects
        if refused.num_rows:
            run.say(
                f"{self.name}: {refused.num_rows} of {self.total} manifest rows have no id or a repeated one and are rejected, e.g. {refused['message'][0].as_py()}"
            )
        cluster = run.cluster()
        plan = make_plan(self.settings, cluster.cpus, cluster.gpus, cluster.nodes)
        run.say(f"{self.name}: {plan.sentence()}")
        run.events.write(
            "step_started", step=self.name, rows=self.total, plan=plan.sentence(), fingerprint=self.fingerprint
        )
        return Attempt(self, plan, Progress(), run.events, run.watch).run()


def encode_settings(step: EmbedStep, precision: str, device: str, threads: int) -> EncodeSettings:
    """What each encoder must know of the step."""
    settings = step.settings
    return EncodeSettings(
        model=step.model,
        limits=Limits(settings.max_bytes, settings.max_pixels, settings.fetch_timeout_s, settings.schemes),
        features=settings.features,
        schema=step.schema,
        region_schema=step.region_schema,
        keep_aspect=step.layers.keep_aspect,
        precision=precision,
        batch_size=settings.batch_size,
        normalize=settings.normalize == "l2",
        fast_decode=settings.decode == "fast",
        device=device,
        threads=threads,
    )


def prepare(settings: EmbedImages, given: Given) -> EmbedStep:
    """Open and count the manifest. Raises ManifestError."""
    assert given.job.model is not None
    manifest = open_manifest(settings.manifest, settings.keep, ["boxes"] if _use_of_boxes(settings) else ())
    keep = (*settings.keep, *_boxes(settings, manifest))
    return EmbedStep(
        settings, given.output, manifest, scan(manifest, keep), given.model(), given.job.model.precision, keep
    )


def _use_of_boxes(settings: EmbedImages) -> str | None:
    """`must` where a feature needs the manifest's boxes, `may` where it takes them if there are any."""
    feature = settings.features.get(settings.region_feature or "")
    return {True: "may", "boxes": "must"}.get(feature.regions) if feature else None


def _boxes(settings: EmbedImages, manifest: Manifest) -> list[str]:
    """The manifest's column of boxes, where a feature uses it."""
    use = _use_of_boxes(settings)
    if use is None:
        return []
    if "boxes" in manifest.schema.names:
        check_boxes(manifest)
        return ["boxes"]
    if use == "must":
        found = ", ".join(manifest.schema.names)
        raise ManifestError(f"{manifest.urls[0]}: `regions: boxes` needs a column `boxes`; found: {found}")
    return []


@dataclass(frozen=True)
class Layers:
    """Width of each feature's vectors; `keep_aspect`: (long side, multiple of both sides) in px, where the job asks."""

    widths: dict[str, int]
    keep_aspect: tuple[int, int] | None = None


def layers_of(settings: EmbedImages, model: ResolvedModel) -> Layers:
    """Look the features' layers up, without weights. Raises ModelError: the network has no such layer."""
    wanted = {feature.layer for feature in settings.features.values()}
    if not settings.looks_inside:
        return Layers(dict.fromkeys(settings.features, model.embed_dim))  # seconds sooner: no torch in the driver
    from clipray.encoders import layers

    tower = layers.tower_without_weights(model)
    layers.check_layers(tower, sorted(wanted), model.image_size)
    shapes = layers.layer_shapes(tower, model.image_size)
    shapes |= layers.layer_shapes(tower, model.image_size, sorted(wanted))  # timm's deeper ones are not in the list
    widths = {name: shapes[feature.layer][0] for name, feature in settings.features.items()}
    if settings.preprocess == "model":
        return Layers(widths)
    if reason := layers.allows_size(tower, sorted(wanted), model.image_size):
        raise ModelError(f"preprocess: keep_aspect: {reason}; drop `keep_aspect`, or take other layers")
    strides = [round(model.image_size[0] / shape[1]) for shape in shapes.values() if len(shape) == 3]
    return Layers(widths, (settings.long_side_px or max(model.image_size), max(strides, default=1)))


def _regions_intact(step: EmbedStep) -> bool:
    if step.regions is None:
        return True
    record = tables.read_record(step.regions.table)
    return record is not None and record.fingerprint == step.fingerprint and tables.intact(step.regions.table, record)
