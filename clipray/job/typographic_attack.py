"""Settings of the step that writes words on images."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from clipray.job.base import TABLE_NAME, Reference, Settings
from clipray.job.images import Colour, ImageEncoding
from clipray.job.labels import ClassesInput, Style

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
    colour: Colour = "black"
    plate: Colour | None = "white"


class Attack(ImageEncoding):
    """Images with labels -> `attacks` table: how labels change when a wrong class's name is written on the image.

    Attributes:
        classes: as in `label`. style: one prompt style, or the name of a kind of prompt, or of a Parquet file's style.
        word: the name of a `wrong` class, or the image's `own` class, a control that shows what the plate alone does.
        lettering: how the word is written.
        seed: the seed of the words and of their places.
    """

    needs_text: ClassVar[bool] = True
    companion: ClassVar[str] = "classes"
    fixed_columns: ClassVar[tuple[str, ...]] = (
        "image_id", "uri", "height", "width", "bytes", "label", "word", "before", "before_probability", "after",
        "after_probability", "stage", "reason", "message",
    )  # fmt: skip

    name: str = Field("attacks", pattern=TABLE_NAME)
    classes: ClassesInput
    style: Annotated[str | Style, Reference] = "template"
    word: Literal["wrong", "own"] = "wrong"
    lettering: Lettering = Field(default_factory=Lettering)
    seed: Annotated[int, Field(ge=0)] = 0
