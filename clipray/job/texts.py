"""Settings of the steps that encode texts: `embed_texts` and `score_captions`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from clipray.job.base import TABLE_NAME, ColumnInput, Embedding, Encoding, Execution
from clipray.job.vectors import Column


class EmbedTexts(Embedding):
    """Manifest of texts -> `texts` table: one row a text, in the space of the images' `output` feature.

    If the manifest has a column `image_id`, it is carried through.
    """

    needs_text: ClassVar[bool] = True
    fixed_columns: ClassVar[tuple[str, ...]] = (
        "text_id", "text", "truncated", "embedding", "image_id", "stage", "reason", "message",
    )  # fmt: skip

    name: str = Field("texts", pattern=TABLE_NAME)
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 1_024
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 65_536


class ScoreCaptions(Encoding):
    """Pairs of images and captions -> `caption_scores` table: CLIPScore, and RefCLIPScore where there are references.

    Attributes:
        input: the images' vectors, of the same model.
        prefix: the text before every caption and reference.
    """

    needs_text: ClassVar[bool] = True
    fixed_columns: ClassVar[tuple[str, ...]] = (
        "pair_id", "image_id", "caption", "truncated", "clipscore", "ref_clipscore", "references",
        "gathered", "stage", "reason", "message",
    )  # fmt: skip

    name: str = Field("caption_scores", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    prefix: str = "A photo depicts "
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 1_024
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072
