"""Settings of the step about point clouds: `render_depth`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clipray.job.base import TABLE_NAME, Encoding, Execution, refuse_taken
from clipray.job.images import SCHEMES, CheckSources, colour_name, listed_schemes
from clipray.job.regions import VECTOR, Foveal

CLOUD_COLUMNS = ("cloud_id", "uri", "bytes", "points", VECTOR, "stage", "reason", "message")


class RenderDepth(Encoding):
    """Manifest of point clouds -> `clouds` table: a CLIP vector for each cloud, from depth maps of six sides.

    Attributes:
        prompt: `foveal` draws the network's attention to each map's foreground.
        foveal: settings of that prompt.
        weights: the weights of the six views: the areas of their foregrounds, or equal.
        sampled: the number of points drawn from the surface of a mesh (`.off` with faces).
        size: the longest side of a cloud in a map, as a share of the map's side. radius: the radius of a point,
            likewise.
        near, far, ground: the colours of the nearest point, of the farthest point and of the background.
    """

    name: str = Field("clouds", pattern=TABLE_NAME)
    prompt: Literal["foveal", "none"] = "foveal"
    foveal: Foveal = Foveal(alpha=2)
    weights: Literal["area", "equal"] = "area"
    sampled: Annotated[int, Field(ge=8, le=10_000_000)] = 8_192
    size: Annotated[float, Field(gt=0, le=1)] = 0.5
    radius: Annotated[float, Field(ge=0, le=0.25)] = 0.03
    near: str = "white"
    far: str = "#b0b0b0"
    ground: str = "gray"
    vector_type: Literal["float32", "float16"] = "float32"
    max_bytes: Annotated[int, Execution, Field(ge=1)] = 256 * 2**20
    fetch_timeout_s: Annotated[float, Execution, Field(gt=0)] = 30.0
    schemes: Annotated[tuple[str, ...], Execution] = SCHEMES
    check_sources: Annotated[CheckSources, Execution] = "none"
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 32

    @field_validator("near", "far", "ground")
    @classmethod
    def _is_a_colour(cls, colour: str) -> str:
        return colour_name(colour)

    @model_validator(mode="after")
    def _settings_of_the_prompt(self) -> RenderDepth:
        if "foveal" in self.model_fields_set and self.prompt != "foveal":
            raise ValueError(f"`foveal` goes with `prompt: foveal`, found `prompt: {self.prompt}`")
        refuse_taken(self.keep, CLOUD_COLUMNS, "drop it from `keep`")
        return self

    @property
    def decoding(self) -> Literal["auto", "tasks", "actors", "none"]:
        return "actors"

    @property
    def checked_schemes(self) -> tuple[str, ...]:
        return listed_schemes(self.schemes) if self.check_sources == "size_mtime" else ()

    @property
    def needs_architecture(self) -> bool:
        return self.prompt == "foveal"
