"""Settings of the steps that encode texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from clipray.settings.base import TABLE_NAME, Embedding, Execution, refuse_taken

TEXT_COLUMNS = ("text_id", "text", "truncated", "embedding", "image_id", "stage", "reason", "message")
"""Columns of the table, and those that rows carry on their way to it."""


class EmbedTexts(Embedding):
    """Manifest of texts -> `texts` table: one row a text, in the space of the pictures' `output` feature.

    The manifest's `image_id`, where it has one, is carried through.
    """

    name: str = Field("texts", pattern=TABLE_NAME)
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 1_024
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 65_536

    @model_validator(mode="after")
    def _column_names_are_free(self) -> EmbedTexts:
        refuse_taken(self.keep, TEXT_COLUMNS, "drop it from `keep`")
        return self
