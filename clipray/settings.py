"""The settings of a job: frozen, typed, validated once, at the door.

A field marked `Execution` changes how fast or how patiently a step runs, never which values it writes for a row,
so it is no part of a table's fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Execution = "execution"
"""Marker in a field's `Annotated` metadata; see the module's docstring."""

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
    """A vector column: the layer it is taken from. `output` is the CLIP image vector."""

    layer: Literal["output"] = "output"


Count = Annotated[int, Field(ge=1, strict=True)]
Actors = Literal["auto"] | Count | tuple[Count, Count]


FIXED_COLUMNS = ("image_id", "uri", "height", "width", "bytes", "pixels", "stage", "reason", "message")
"""Columns of the table, and those that rows carry on their way to it."""


class EmbedImages(Settings):
    """Manifest of pictures -> `images` table: one row a picture, one vector column a feature."""

    name: str = Field("images", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    manifest: Annotated[str | list[str], Execution]
    features: dict[str, Feature] = Field(default_factory=lambda: {"clip": Feature()}, min_length=1)
    keep: list[str] = Field(default_factory=list)
    decode: Literal["exact", "fast"] = "exact"
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


STEPS: dict[str, type[EmbedImages]] = {"embed_images": EmbedImages}
"""The steps a job can name, in the order in which data flows."""


class Job(Settings):
    """A validated job: a model and the steps that use it, in the order in which data flows."""

    name: str = "clipray"
    output: str
    model: Model
    address: str | None = None
    steps: list[dict[str, Any]] = Field(min_length=1)
