"""The settings of a job: frozen, typed, validated once, at the door.

A field marked `Execution` changes how fast or how patiently a step runs, never which values it writes for a row,
so it is no part of a table's fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Execution = "execution"
"""Marker in a field's `Annotated` metadata; see the module's docstring."""

TABLE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"

SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "http", "https")
"""URI schemes that a manifest may name unless the job says otherwise."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written: everything but `Execution` fields, as plain JSON values."""
        skip = {name for name, field in type(self).model_fields.items() if Execution in field.metadata}
        return self.model_dump(mode="json", exclude=skip)


class Model(Settings):
    """An open_clip model.

    `name` is a built-in name (`ViT-B-32`), `hf-hub:org/model`, `local-dir:/path`, the path of an open_clip config
    (`*.json`), or the built-in `demo` (a ViT) or `demo-rn` (a ResNet). `pretrained` is a tag of that name, the path or URL of a checkpoint, or `random`.
    """

    name: str
    pretrained: str | None = None
    seed: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @model_validator(mode="after")
    def _random_needs_a_seed(self) -> Model:
        if self.pretrained == "random" and self.seed is None:
            raise ValueError("`pretrained: random` needs a `seed`, so that every worker draws the same weights")
        if self.pretrained != "random" and self.seed is not None:
            raise ValueError("`seed` goes with `pretrained: random` only")
        return self


class Feature(Settings):
    """A vector column: the layer it is taken from, and how that layer's map becomes one vector.

    `output` is the CLIP image vector. Every other layer is a map of (channels, height, width) and needs a `pooling`.

    Attributes:
        levels, overlap: scales of the region grid and the wanted overlap of neighbours (`rmac`, and `regions`).
        p: exponent of `gem`.
        l2_before: normalise each cell of the map before pooling. l2_after: normalise the vector, and each region's; None
            follows the step's `normalize`.
        regions: write a row per region into the regions table: `grid`, the manifest's `boxes`, or true for both.
    """

    layer: str = "output"
    pooling: Literal["mac", "spoc", "gem", "rmac"] | None = None
    levels: Annotated[int, Field(ge=1, le=16)] = 2
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.4
    p: Annotated[float, Field(gt=0)] = 3.0
    l2_before: bool = True
    l2_after: bool | None = None
    regions: bool | Literal["grid", "boxes"] = False

    @model_validator(mode="after")
    def _maps_are_pooled(self) -> Feature:
        if self.layer != "output" and self.pooling is None:
            raise ValueError(f"layer {self.layer!r} is a map: it needs `pooling`: mac, spoc, gem or rmac")
        if self.layer == "output" and (self.pooling or self.regions):
            raise ValueError(
                "layer 'output' is one vector, no map: it has no `pooling` and no `regions`; `clipray layers MODEL` lists the maps"
            )
        return self


Count = Annotated[int, Field(ge=1, strict=True)]
Actors = Literal["auto"] | Count | tuple[Count, Count]


FIXED_COLUMNS = (
    "image_id", "uri", "height", "width", "bytes", "boxes", "region_count",
    "pixels", "regions", "refused_boxes", "stage", "reason", "message",
)  # fmt: skip
"""Columns of the table, and those that rows carry on their way to it."""
REGION_COLUMNS = ("region_id", "box_xyxy", "scale", "clipped")
"""Columns of the regions table, beside `image_id` and the feature's vector."""


class EmbedImages(Settings):
    """Manifest of pictures -> `images` table: one row a picture, one vector column a feature.

    A feature with `regions` also fills the table `regions_name`, one row a region.
    """

    name: str = Field("images", pattern=TABLE_NAME)
    regions_name: str = Field("regions", pattern=TABLE_NAME)
    manifest: Annotated[str | list[str], Execution]
    features: dict[str, Feature] = Field(default_factory=lambda: {"clip": Feature()}, min_length=1)
    keep: list[str] = Field(default_factory=list)
    decode: Literal["exact", "fast"] = "exact"
    preprocess: Literal["model", "keep_aspect"] = "model"
    long_side_px: Annotated[int, Field(ge=1)] | None = None
    normalize: Literal["l2", "none"] = "l2"
    vector_type: Literal["float32", "float16"] = "float32"
    # Limits on one picture. Rows already written stay valid when they change.
    max_bytes: Annotated[int, Execution, Field(ge=1)] = 64 * 2**20
    max_pixels: Annotated[int, Execution, Field(ge=1)] = 100_000_000
    fetch_timeout_s: Annotated[float, Execution, Field(gt=0)] = 30.0
    schemes: Annotated[tuple[str, ...], Execution] = SCHEMES
    max_reject_rate: Annotated[float, Execution, Field(ge=0, le=1)] = 0.01
    # How it runs.
    actors: Annotated[Actors, Execution] = "auto"
    gpus_per_actor: Annotated[Literal["auto"] | Annotated[float, Field(ge=0)], Execution] = "auto"
    cpus_per_actor: Annotated[Literal["auto"] | Annotated[float, Field(gt=0)], Execution] = "auto"
    decode_in: Annotated[Literal["auto", "tasks", "actors"], Execution] = "auto"
    batch_size: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], Execution] = "auto"
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 128
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 16_384
    flush_s: Annotated[float, Execution, Field(ge=0)] = 20.0

    @field_validator("actors")
    @classmethod
    def _min_before_max(cls, actors: Any) -> Any:
        if isinstance(actors, tuple) and actors[0] > actors[1]:
            raise ValueError(f"[min, max] with min={actors[0]} > max={actors[1]}")
        return actors

    @model_validator(mode="after")
    def _column_names_are_free(self) -> EmbedImages:
        named = [*self.features, *self.keep]
        taken = [name for name in named if name in FIXED_COLUMNS or named.count(name) > 1]
        if taken:
            raise ValueError(f"the column name {taken[0]!r} is taken: rename the feature or drop it from `keep`")
        return self

    @model_validator(mode="after")
    def _one_feature_has_regions(self) -> EmbedImages:
        named = [name for name, feature in self.features.items() if feature.regions]
        if len(named) > 1:
            raise ValueError(
                f"one feature of a step can write regions, found {', '.join(named)}: put the other in a second embed_images step"
            )
        if named and named[0] in REGION_COLUMNS:
            raise ValueError(f"the column name {named[0]!r} is taken in the regions table: rename the feature")
        if named and self.regions_name == self.name:
            raise ValueError(f"`name` and `regions_name` are both {self.name!r}: the tables need two names")
        return self

    @model_validator(mode="after")
    def _long_side_belongs_to_keep_aspect(self) -> EmbedImages:
        if self.long_side_px is not None and self.preprocess != "keep_aspect":
            raise ValueError("`long_side_px` goes with `preprocess: keep_aspect`")
        return self

    @property
    def region_feature(self) -> str | None:
        """The feature that writes regions, if any."""
        return next((name for name, feature in self.features.items() if feature.regions), None)

    @property
    def looks_inside(self) -> bool:
        """Whether the driver must know the network's layers, and not only what it returns."""
        return self.preprocess != "model" or any(feature.layer != "output" for feature in self.features.values())

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the step writes."""
        return (self.name, self.regions_name) if self.region_feature else (self.name,)


class Column(Settings):
    """A vector column of any Parquet: a file, a glob or a folder; `id` is the column that names a row."""

    path: str
    column: str
    id: str = "image_id"


class Reduce(Settings):
    """Vector column -> `reduced` table: principal components, whitened if asked.

    Give `components` (how many) or `explained_variance` (the smallest number that reaches this share), or `fit`: the
    reduced table of another run, whose projection is applied as it is.
    """

    name: str = Field("reduced", pattern=TABLE_NAME)
    input: str | Column
    components: Annotated[int, Field(ge=1)] | None = None
    explained_variance: Annotated[float, Field(gt=0, le=1)] | None = None
    whiten: bool = False
    epsilon: Annotated[float, Field(ge=0, le=1)] = 1e-5
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.0
    normalize: Literal["none", "before", "after", "both"] = "none"
    fit: str | None = None
    vector_type: Literal["float32", "float16"] = "float32"
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @model_validator(mode="after")
    def _one_way(self) -> Reduce:
        given = [name for name in ("components", "explained_variance", "fit") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected one of `components`, `explained_variance` and `fit`, found {' and '.join(given) or 'none'}"
            )
        return self

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the step writes."""
        return (self.name, f"{self.name}_components")


class Cluster(Settings):
    """Vector column -> `clusters` table: K-means.

    Attributes:
        clusters: how many.
        tolerance: stop when the squared moves of all centroids add up to at most this share of a column's variance.
        spherical: by cosine; vectors are L2-normalised, and so are centroids.
        hold: how the vectors lie in memory; `float16` halves it.
        precision: of the product that ranks the centroids; `auto` is bf16 where the hardware multiplies it natively.
            Distances in the table are fp32 either way.
        labels: `table.column` with a label for each row, to measure the clusters against.
    """

    name: str = Field("clusters", pattern=TABLE_NAME)
    input: str | Column
    clusters: Annotated[int, Field(ge=1)]
    max_iterations: Annotated[int, Field(ge=1)] = 100
    tolerance: Annotated[float, Field(ge=0)] = 1e-4
    spherical: bool = False
    normalize: Literal["none", "l2"] = "none"
    random_state: Annotated[int, Field(ge=0)] = 0
    hold: Literal["float32", "float16"] = "float32"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    labels: Annotated[str | None, Execution] = None
    actors: Annotated[Literal["auto"] | Count, Execution] = "auto"
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 1_048_576

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the step writes."""
        return (self.name, f"{self.name}_centroids")


StepSettings = EmbedImages | Reduce | Cluster
STEPS: dict[str, type[EmbedImages] | type[Reduce] | type[Cluster]] = {
    "embed_images": EmbedImages,
    "reduce": Reduce,
    "cluster": Cluster,
}
"""The steps a job can name, in the order in which data flows."""


class Job(Settings):
    """A validated job: a model and the steps that use it, in the order in which data flows."""

    name: str = "clipray"
    output: str
    model: Model | None = None
    address: str | None = None
    steps: list[dict[str, Any]] = Field(min_length=1)
