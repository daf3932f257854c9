"""Settings of the step that encodes images."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from clipray import __version__
from clipray.job.base import TABLE_NAME, Decoding, Embedding, Encoding, Execution, LabelSelector, Settings, refuse_taken

SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "http", "https")
"""URI schemes that a manifest may name unless the job says otherwise."""
USER_AGENT = f"clipray/{__version__}"
RobotsDirective = Literal["noai", "noimageai", "noindex", "noimageindex"]


def _header_value(value: str) -> str:
    """The value itself. Raises ValueError where no HTTP header can have it."""
    if not (value.strip() and value.isascii() and value.isprintable()):
        raise ValueError("expected printable ASCII, such as mybot/1.0 (+https://example.org/bot)")
    return value


def _colour_name(colour: str) -> str:
    """The colour itself. Raises ValueError where Pillow knows none of that name."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(colour)
    except ValueError:
        raise ValueError("expected a colour: a name such as white, or #rrggbb") from None
    return colour


Colour = Annotated[str, AfterValidator(_colour_name)]


class Feature(Settings):
    """A vector column: the layer it is taken from, and how that layer's map becomes one vector.

    `output` is the image vector, of CLIP or of a vision model. Every other layer is a map of (channels, height, width)
    and needs a `pooling`.

    Attributes:
        layer: `output`, or one that `clipray layers MODEL` lists.
        pooling: how a map becomes one vector: `mac` (max), `spoc` (mean), `gem` (power mean) or `rmac` (sum of
            normalised regional maxima).
        levels, overlap: the number of scales of the region grid, and the target overlap of neighbours (`rmac`, and
            `regions`).
        p: the exponent of `gem`.
        l2_before: normalise each cell of the map before pooling. l2_after: normalise the vector, and each region's;
            None follows the step's `normalize`.
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


FIXED_COLUMNS = (
    "image_id", "uri", "height", "width", "bytes", "boxes", "region_count",
    "pixels", "regions", "refused_boxes", "stage", "reason", "message",
)  # fmt: skip
"""Columns of the table, and those that rows carry on their way to it."""
REGION_COLUMNS = ("region_id", "box_xyxy", "scale", "clipped")
"""Columns of the regions table, beside `image_id` and the feature's vector."""


class FileEncoding(Encoding):
    """Settings of all steps that encode a file for each row. Rows already written stay valid when these change.

    Attributes:
        max_bytes: a larger file is rejected.
        fetch_timeout_s: the seconds for one file from a server, including repeated requests.
        user_agent: how requests over http and https introduce themselves.
        connections_per_host: the most files that a worker fetches from one host over http and https at the same time.
        disallowed_header_directives: directives of the header `X-Robots-Tag` by which a file is rejected; an empty list
            ignores the header.
        schemes: the schemes that a `uri` may have.
        check_sources: `size_mtime`: notice files that were replaced under the same `uri`.
    """

    max_bytes: Annotated[int, Execution, Field(ge=1)] = 64 * 2**20
    fetch_timeout_s: Annotated[float, Execution, Field(gt=0)] = 30.0
    user_agent: Annotated[str, Execution, AfterValidator(_header_value)] = USER_AGENT
    connections_per_host: Annotated[int, Execution, Field(ge=1)] = 16
    disallowed_header_directives: Annotated[tuple[RobotsDirective, ...], Execution] = get_args(RobotsDirective)
    schemes: Annotated[tuple[str, ...], Execution] = SCHEMES
    check_sources: Annotated[Literal["none", "size_mtime"], Execution] = "none"

    @property
    def decoding(self) -> Decoding:
        return "actors"

    @property
    def checked_schemes(self) -> tuple[str, ...]:
        """Those of storages that list their files: over http each file is a request, and servers answer each in its own way."""
        listed = tuple(scheme for scheme in self.schemes if scheme not in ("http", "https"))
        return listed if self.check_sources == "size_mtime" else ()


class ImageEncoding(FileEncoding):
    """What one image may cost.

    Attributes:
        max_pixels: a larger image is rejected before it is decoded.
    """

    max_pixels: Annotated[int, Execution, Field(ge=1)] = 100_000_000


class EmbedImages(ImageEncoding, Embedding):
    """Manifest of images -> `images` table: one row an image, one vector column a feature.

    A feature with `regions` also fills the table `regions_name`, one row a region.

    Attributes:
        regions_name: the name of the regions table, if a feature has one.
        features: vector columns by name, all from one forward pass.
        decode: `exact`: exactly the pixels of the model's own transform; `fast`: JPEGs may be decoded at a reduced
            scale.
        preprocess: `keep_aspect`: the whole image, its long side scaled to `long_side_px`, no crop.
        long_side_px: the length of the long side, with `keep_aspect` only; by default the network's own.
        decode_in: `actors`: threads of the encoder; `tasks`: CPU tasks, on any node.
        decode_on: labels of the nodes for decoding tasks, as Ray selects them.
    """

    name: str = Field("images", pattern=TABLE_NAME)
    regions_name: str = Field("regions", pattern=TABLE_NAME)
    features: dict[str, Feature] = Field(default_factory=lambda: {"clip": Feature()}, min_length=1)
    decode: Literal["exact", "fast"] = "exact"
    preprocess: Literal["model", "keep_aspect"] = "model"
    long_side_px: Annotated[int, Field(ge=1)] | None = None
    decode_in: Annotated[Literal["auto", "tasks", "actors"], Execution] = "auto"
    decode_on: Annotated[LabelSelector, Execution] = Field(default_factory=dict)

    @property
    def decoding(self) -> Decoding:
        return self.decode_in

    @property
    def decoding_on(self) -> dict[str, str]:
        return self.decode_on

    @model_validator(mode="after")
    def _settings_go_together(self) -> EmbedImages:
        if self.long_side_px is not None and self.preprocess != "keep_aspect":
            raise ValueError("`long_side_px` goes with `preprocess: keep_aspect`")
        if self.decode_on and self.decode_in == "actors":
            raise ValueError(
                "`decode_on` names nodes for decoding tasks; with `decode_in: actors` decoding is where the encoders are"
            )
        return self

    @field_validator("features")
    @classmethod
    def _features_are_columns(cls, features: dict[str, Feature]) -> dict[str, Feature]:
        odd = [
            name
            for name in features
            if not name.isprintable() or name.strip() in ("", ".", "..") or set(name) & set("/\\")
        ]
        if odd:
            raise ValueError(f"{odd[0]!r} names no column: expected a name without slashes and control characters")
        return features

    @model_validator(mode="after")
    def _column_names_are_free(self) -> EmbedImages:
        refuse_taken([*self.features, *self.keep], FIXED_COLUMNS, "rename the feature or drop it from `keep`")
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

    @property
    def region_feature(self) -> str | None:
        """The feature that writes regions, if any."""
        return next((name for name, feature in self.features.items() if feature.regions), None)

    @property
    def needs_architecture(self) -> bool:
        return self.preprocess != "model" or any(feature.layer != "output" for feature in self.features.values())

    @property
    def tables(self) -> tuple[str, ...]:
        return (self.name, self.regions_name) if self.region_feature else (self.name,)
