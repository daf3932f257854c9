"""Step `embed_images`: a manifest of pictures -> the `images` table. What it is made of, and what of it is on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from clipray import tables
from clipray.encoders.encode_settings import EncodeSettings
from clipray.encoders.images import Limits
from clipray.encoders.resolve import ResolvedModel
from clipray.job import changes, fingerprint
from clipray.ledger import Stock, take_stock
from clipray.manifest import Manifest, open_manifest
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

    @property
    def table(self) -> Folder:
        return self.output.sub(self.settings.name)

    @property
    def rejects(self) -> Folder:
        return self.output.sub(f"rejects/{self.settings.name}")

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the values of a row."""
        version = tables.table_schema("images")["version"]
        own = {key: value for key, value in self.settings.identity().items() if key != "name"}
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
        vectors = dict.fromkeys(self.settings.features, self.model.embed_dim)
        extra = [self.manifest.schema.field(name).with_nullable(True) for name in self.settings.keep]
        return tables.arrow_schema("images", vectors, element=self.settings.vector_type, extra=extra)


def encode_settings(step: EmbedStep, precision: str, device: str, threads: int) -> EncodeSettings:
    """What each encoder must know of the step."""
    settings = step.settings
    return EncodeSettings(
        model=step.model,
        limits=Limits(settings.max_bytes, settings.max_pixels, settings.fetch_timeout_s, settings.schemes),
        features={name: feature.layer for name, feature in settings.features.items()},
        schema=step.schema,
        precision=precision,
        batch_size=settings.batch_size,
        normalize=settings.normalize == "l2",
        fast_decode=settings.decode == "fast",
        device=device,
        threads=threads,
    )


def prepare(settings: EmbedImages, output: Folder, spec: Model, model: ResolvedModel) -> EmbedStep:
    """Open and count the manifest. Raises ManifestError."""
    manifest = open_manifest(settings.manifest, settings.keep)
    return EmbedStep(settings, output, manifest, scan(manifest, settings.keep), model, spec.precision)


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
    if record and record.inputs.get("digest") == step.scan.digest and tables.intact(step.table, record):
        return State("finished")
    stock = (
        take_stock(step.table, step.rejects, step.scan, step.settings.keep, step.fingerprint, mend=False)
        if count
        else None
    )
    return State("partial", stock)
