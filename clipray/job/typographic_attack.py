"""Settings of the step that writes words on images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clipray.job.base import TABLE_NAME, Reference, Settings, refuse_taken
from clipray.job.images import ImageEncoding, colour_name
from clipray.job.labels import Classes, Style, distinct

ATTACK_COLUMNS = (
    "image_id", "uri", "height", "width", "bytes", "label", "word", "before", "before_probability", "after",
    "after_probability", "stage", "reason", "message",
)  # fmt: skip
Place = Literal[
    "random", "centre", "top", "bottom", "left", "right", "top_left", "top_right", "bottom_left", "bottom_right"
]


class Lettering(Settings):
    """How a word is written on an image, with Pillow's built-in font.

    Attributes:
        size: the size of the letters, as a share of the image's shorter side; smaller if the word would not fit.
        place: where the word stands; `random` draws another place for each image.
        colour, plate: the colours of the letters and of the plate behind them (null: none); any colours that Pillow
            knows.
    """

    size: Annotated[float, Field(gt=0, le=1)] = 0.15
    place: Place = "random"
    colour: str = "black"
    plate: str | None = "white"

    @field_validator("colour", "plate")
    @classmethod
    def _is_a_colour(cls, colour: str | None) -> str | None:
        return None if colour is None else colour_name(colour)


class Attack(ImageEncoding):
    """Images with labels -> `attacks` table: how labels change when a wrong class's name is written on the image.

    Attributes:
        classes: as in `label`. style: one prompt style, or the name of a kind of prompt, or of a Parquet file's style.
        word: the name of a `wrong` class, or the image's `own` class, a control that shows what the plate alone does.
        lettering: how the word is written.
        seed: the seed of the words and of their places.
    """

    name: str = Field("attacks", pattern=TABLE_NAME)
    classes: Annotated[str | list[str] | Classes, Reference]
    style: Annotated[str | Style, Reference] = "template"
    word: Literal["wrong", "own"] = "wrong"
    lettering: Lettering = Field(default_factory=Lettering)
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("classes")
    @classmethod
    def _names_differ(cls, classes: str | list[str] | Classes) -> str | list[str] | Classes:
        return distinct(classes) if isinstance(classes, list) else classes

    @model_validator(mode="after")
    def _column_names_are_free(self) -> Attack:
        refuse_taken(self.keep, ATTACK_COLUMNS, "drop it from `keep`")
        return self

    @property
    def decoding(self) -> Literal["auto", "tasks", "actors", "none"]:
        return "actors"

    @property
    def tables(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_classes")
