"""Settings of the steps with foveal attention, `embed_regions` and `render_depth`, and of `refer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from clipray.job.base import (
    TABLE_NAME,
    ColumnInput,
    Count,
    Embedding,
    Execution,
    ModelStep,
    Settings,
    added_later,
)
from clipray.job.images import FIXED_COLUMNS, Colour, FileEncoding, ImageEncoding
from clipray.job.vectors import Column

Prompt = Literal["foveal", "crop", "blur", "circle", "none"]
VECTOR = "clip"
"""The vector column of `embed_regions` and of `render_depth`."""
OF_BOXES = {"box_ids": "box_id", "box_captions": "caption", "box_labels": "label"}
"""Columns of a manifest with a list for each image, an entry a box -> the column of the regions table."""


def _of_mask(whole_image: Any, falip: Any) -> Callable[[dict[str, Any]], Any]:
    """A default that depends on the mask."""
    return lambda before: falip if before.get("mask") == "falip" else whole_image


class Foveal(Settings):
    """How strongly the class token's attention is drawn to a region, and where in the network.

    Attributes:
        mask: where the bump lies: over the `whole_image`, as wide as the box, or within the box's patches only, as in
            the code of FALIP's authors (`falip`). The other defaults depend on it; those of FALIP are in brackets.
        alpha: the highest value that is added to the attention logits (0.2); 0 is the plain network.
        sigma: the width of the Gaussian bump, as a share of half the box's sides; for `falip` in patches (100).
        blocks: the number of last blocks of the transformer, a list of blocks (from 0), or `all` (8 to 11, of a ViT of
            12).
        heads: a list of heads (from 0), or `all`.
    """

    mask: Literal["whole_image", "falip"] = added_later("whole_image")
    alpha: Annotated[float, Field(ge=0, le=1000)] = Field(default_factory=_of_mask(8.0, 0.2))
    sigma: Annotated[float, Field(gt=0, le=100)] = Field(default_factory=_of_mask(1.0, 100.0))
    blocks: Literal["all"] | Annotated[int, Field(ge=1, strict=True)] | list[int] = Field(
        default_factory=_of_mask(2, [8, 9, 10, 11])
    )
    heads: Literal["all"] | list[int] = "all"

    @field_validator("blocks", "heads")
    @classmethod
    def _are_numbers(cls, chosen: Any) -> Any:
        if isinstance(chosen, list) and (not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen)):
            raise ValueError("expected a list of different numbers from 0")
        return chosen


class Blur(Settings):
    """Everything outside a box is blurred.

    Attributes:
        radius: the radius of the Gaussian, as a share of the image's shorter side.
    """

    radius: Annotated[float, Field(gt=0, le=1)] = 0.03


class Circle(Settings):
    """An ellipse is drawn around a box.

    Attributes:
        colour: the colour of the line; any colour that Pillow knows.
        width: the width of the line, as a share of the image's shorter side.
    """

    colour: Colour = "red"
    width: Annotated[float, Field(gt=0, le=1)] = 0.02


def _preprocess(foveal: Foveal | None) -> Literal["model", "squash"]:
    return "squash" if foveal is not None and foveal.mask == "falip" else "model"


class EmbedRegions(ImageEncoding, Embedding):
    """Manifest of images with `boxes` -> `regions` table: a CLIP vector for each box.

    Attributes:
        prompt: what directs the network to a box: its attention (`foveal`), the box cut out (`crop`), the rest blurred
            (`blur`), an ellipse around it (`circle`), or nothing (`none`: the whole image's vector).
        foveal, blur, circle: settings of the prompt of that name.
        preprocess: `squash` shows the network the whole image, its sides scaled separately, and is the default of
            `foveal: {mask: falip}`; `model` may crop the centre.
        max_regions: an image with more boxes is rejected.
    """

    companion: ClassVar[str] = "pictures"
    fixed_columns: ClassVar[tuple[str, ...]] = (*FIXED_COLUMNS, *OF_BOXES)

    name: str = Field("regions", pattern=TABLE_NAME)
    prompt: Prompt = "foveal"
    foveal: Foveal = Field(default_factory=Foveal)
    blur: Blur = Field(default_factory=Blur)
    circle: Circle = Field(default_factory=Circle)
    preprocess: Literal["model", "squash"] = Field(default_factory=lambda before: _preprocess(before.get("foveal")))
    max_regions: Annotated[int, Execution, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _settings_of_the_prompt(self) -> EmbedRegions:
        for name in ("foveal", "blur", "circle"):
            self.refuse_without(name, "prompt", name)
        return self

    def identity(self) -> dict[str, Any]:
        """The settings of the chosen prompt."""
        others = {"foveal", "blur", "circle"} - {self.prompt}
        return {key: value for key, value in super().identity().items() if key not in others}

    @property
    def needs_architecture(self) -> bool:
        return self.prompt == "foveal"

    @property
    def primary_table(self) -> str:
        return self.tables[1]


class RenderDepth(FileEncoding):
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

    fixed_columns: ClassVar[tuple[str, ...]] = (
        "cloud_id",
        "uri",
        "bytes",
        "points",
        VECTOR,
        "stage",
        "reason",
        "message",
    )

    name: str = Field("clouds", pattern=TABLE_NAME)
    prompt: Literal["foveal", "none"] = "foveal"
    foveal: Foveal = Foveal(alpha=2)
    weights: Literal["area", "equal"] = "area"
    sampled: Annotated[int, Field(ge=8, le=10_000_000)] = 8_192
    size: Annotated[float, Field(gt=0, le=1)] = 0.5
    radius: Annotated[float, Field(ge=0, le=0.25)] = 0.03
    near: Colour = "white"
    far: Colour = "#b0b0b0"
    ground: Colour = "gray"
    vector_type: Literal["float32", "float16"] = "float32"
    max_bytes: Annotated[int, Execution, Field(ge=1)] = 256 * 2**20
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 32

    @model_validator(mode="after")
    def _settings_of_the_prompt(self) -> RenderDepth:
        self.refuse_without("foveal", "prompt", "foveal")
        return self

    @property
    def needs_architecture(self) -> bool:
        return self.prompt == "foveal"


class Refer(ModelStep):
    """Regions with captions -> `referred` table: for each caption the box of its image that it fits best.

    Attributes:
        input: the regions' vectors, of the same model, in a table with a column `caption`.
        template: the text into which every caption is put.
        subtract: what is subtracted from each box's similarity to a caption: the mean of its similarities to the
            image's `others`, or to captions drawn from the whole `dataset` (as the authors of FALIP do), or `nothing`.
        dataset_captions: how many captions are drawn; all if there are fewer. random_state: the seed of the draw.
    """

    needs_text: ClassVar[bool] = True

    name: str = Field("referred", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    template: str = "{}"
    subtract: Literal["others", "dataset", "nothing"] = "others"
    dataset_captions: Count = added_later(500)
    random_state: Annotated[int, Field(ge=0)] = added_later(0)

    @field_validator("template")
    @classmethod
    def _captions_have_a_place(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError("expected a text with `{}` where the caption goes")
        return template

    @model_validator(mode="after")
    def _settings_of_the_draw(self) -> Refer:
        for name in ("dataset_captions", "random_state"):
            self.refuse_without(name, "subtract", "dataset")
        return self
