"""Settings of the steps that encode texts: `embed_texts` and `score_captions`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from clipray.job.base import TABLE_NAME, Embedding, Encoding, Execution, Reference, refuse_taken
from clipray.job.vectors import Column, table_of

TEXT_COLUMNS = ("text_id", "text", "truncated", "embedding", "image_id", "stage", "reason", "message")
"""Columns of the table, and those that rows carry on their way to it."""
PAIR_COLUMNS = (
    "pair_id", "image_id", "caption", "truncated", "clipscore", "ref_clipscore", "references",
    "gathered", "stage", "reason", "message",
)  # fmt: skip


class EmbedTexts(Embedding):
    """Manifest of texts -> `texts` table: one row a text, in the space of the images' `output` feature.

    If the manifest has a column `image_id`, it is carried through.
    """

    name: str = Field("texts", pattern=TABLE_NAME)
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 1_024
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 65_536

    @model_validator(mode="after")
    def _column_names_are_free(self) -> EmbedTexts:
        refuse_taken(self.keep, TEXT_COLUMNS, "drop it from `keep`")
        return self


class ScoreCaptions(Encoding):
    """Pairs of images and captions -> `caption_scores` table: CLIPScore, and RefCLIPScore where there are references.

    Attributes:
        input: the images' vectors, of the job's model.
        prefix: the text before every caption and reference.
    """

    name: str = Field("caption_scores", pattern=TABLE_NAME)
    input: Annotated[str | Column, Reference]
    prefix: str = "A photo depicts "
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 1_024
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @model_validator(mode="after")
    def _column_names_are_free(self) -> ScoreCaptions:
        refuse_taken(self.keep, PAIR_COLUMNS, "drop it from `keep`")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        return table_of(self.input)
